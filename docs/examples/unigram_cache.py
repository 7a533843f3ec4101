"""An adapter of your own: a unigram cache of the document so far.

Each lane counts the tokens that it has scored of the current document. A target's distribution p
becomes (1 − weight) · p + weight · q, with q the counts as a distribution. Put the file beside your
config, or run in its folder, and name the class there:

    evaluation:
      adapters: [lora, {"unigram_cache:UnigramCache": {weight: 0.05}}]

Shapes: B lanes, V vocabulary, m scored targets. Source: Kuhn & De Mori, "A cache-based natural
language model" (1990).
"""

import torch
from pydantic import Field

from fairway.evaluation.adapters.base import Adapted, Adapter


class UnigramCache(Adapter):
    """Words that a document has used, it uses again."""

    title = "Unigram cache"
    is_mixture = True

    class Settings(Adapter.Settings):
        """How much the cache counts."""

        weight: float = Field(0.05, ge=0, lt=1)
        """The share of the cache in the mixture."""

    counts = None  # float32 [B, V], as soon as V is known

    def adapt(self, batch, logits, scored):
        """Mix each lane's counts into the targets of the document that they are from."""
        if self.counts is None:
            self.counts = scored.new_zeros(self.context.rows, scored.shape[1])
        counts = self.counts[batch.row]  # [m, V]
        seen = counts.sum(1, keepdim=True)
        applies = batch.in_slice_document.unsqueeze(1) & (seen > 0)
        weight = torch.where(applies, self.settings.weight, 0.0)
        p = (1 - weight) * torch.softmax(scored.float(), 1) + weight * counts / seen.clamp(min=1)
        return Adapted(logits, p.log())

    def learn(self, batch):
        """Forget a document that has ended; count the slice's targets of the current one."""
        documents = batch.text.documents
        current = documents[batch.ends]  # [B, 1]
        self.counts *= current == batch.slice_documents
        counted = documents[batch.positions] == current[batch.row, 0]
        self.counts.index_put_(
            (batch.row[counted], batch.targets[counted]),
            self.counts.new_ones(()),
            accumulate=True,
        )
