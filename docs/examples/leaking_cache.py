"""The unigram cache with a fault, which the audit finds: it counts the whole document.

A document's later tokens are not known yet when its earlier ones are scored.
"""

import torch
from unigram_cache import UnigramCache


class LeakingCache(UnigramCache):
    """The fault: `prepare` sees the whole text, and what it makes of it knows the targets."""

    title = "Leaking cache"

    @classmethod
    def prepare(cls, settings, text):
        """int64 [documents + 1, vocabulary in use]: each document's counts."""
        size = int(text.documents.max()) + 1, int(text.tokens.max()) + 1
        counts = torch.zeros(size, dtype=torch.int64, device=text.tokens.device)
        one = counts.new_ones(())
        return counts.index_put_((text.documents, text.tokens), one, accumulate=True)

    def adapt(self, batch, logits, scored):
        """As the cache, with the counts of each lane's whole document."""
        counts = self.context.prepared[batch.slice_documents[:, 0]]
        self.counts = scored.new_zeros(self.context.rows, scored.shape[1])
        self.counts[:, : counts.shape[1]] = counts
        return super().adapt(batch, logits, scored)

    def learn(self, batch):
        """Nothing: it knows it all."""
