"""The evaluation: sliding windows whose distributions adapters change as they go along.

The declared order is that of the text: every distribution is a function of the tokens before it.

An adapter sees a target only after its score is fixed, keeps its own state for each lane, and
changes the distributions of what follows. Adapters compose: each takes up the logits that the one
before it left.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from fairway.data.token_bytes import byte_counts
from fairway.evaluation.adapters.base import Adapter, Context
from fairway.evaluation.forward import TimedForward, forward_pass
from fairway.evaluation.global_updates import (
    scored_tokens,
    take_from_first_rank,
    train_on,
    undone_afterwards,
)
from fairway.evaluation.settings import EvaluationSettings
from fairway.evaluation.text import (
    LanguageModel,
    ScoredBatch,
    Text,
    WindowBatch,
    cut_text,
    on_device,
)
from fairway.evaluation.token_table import RankScores, rank_scores, token_table
from fairway.evaluation.windows import (
    Windows,
    lane_groups,
    lane_steps,
    padded,
    segments,
    sliding_windows,
)
from fairway.model.runtime import compiles
from fairway.model.settings import RuntimeSettings

if TYPE_CHECKING:  # an exported evaluation does without
    import pandas as pd


@dataclass(frozen=True)
class Distributions:
    """The distributions that scored a text, and the account of how they were used.

    log_probs: float32 [n, V]; row i is the distribution that scored tokens[i + 1].
    positions: int64 [n], the targets in the order in which they were scored.
    nats: float64 [n], the loss charged for each of them. lanes: int64 [n], where it was scored.
    """

    log_probs: Tensor
    positions: Tensor
    nats: Tensor
    lanes: Tensor


class Evaluator:
    """A model and how it is evaluated.

        model = load_artifact("results/quickstart/seed-42/shared/gptq/artifact.bin", "cpu")
        evaluator = Evaluator(model, EvaluationSettings(adapters=["ngram"]), bos_id=1)
        tokenizer = load_tokenizer("results/data/embedded/tokenizer.model")
        table = evaluator.score_documents(["To be, or not to be: that is the question."], tokenizer)
        table_metrics(table)["val_bpb"]

    model: is left as it was, but for `requires_grad`, which LoRA switches off. Global updates train
        it while a text is scored, so they need a `GPT`, and score one text at a time.
    bos_id: the token that begins each document.
    seed: of what adapters draw.
    runtime: as the model was prepared with; says whether its forward pass is compiled or captured.
        None launches it as it is.
    """

    def __init__(
        self,
        model: LanguageModel,
        settings: EvaluationSettings,
        *,
        bos_id: int,
        seed: int = 0,
        runtime: RuntimeSettings | None = None,
    ) -> None:
        self.model, self.settings, self.bos_id, self.seed = model, settings, bos_id, seed
        self.forward = TimedForward(forward_pass(model, runtime) if runtime else model)
        self.compiled = runtime is not None and compiles(runtime, model)

    def with_settings(self, settings: EvaluationSettings) -> "Evaluator":
        """One with other settings that shares this one's model and forward pass."""
        other = copy.copy(self)
        other.settings = settings
        return other

    @property
    def adapters(self) -> list[dict[str, str]]:
        """Each adapter's name, title and kernels, in their order, for metrics.json."""
        return [
            {
                "name": choice.label,
                "title": choice.type.title,
                "kernels": choice.type.kernels(choice.settings, self.model.kernels),
            }
            for choice in self.settings.adapters
        ]

    @torch.no_grad()
    def score(self, tokens: Tensor, rank: int = 0, world_size: int = 1) -> Iterator[ScoredBatch]:
        """Score every target of `tokens` int64 [n + 1], or this rank's share of them, once.

        Lanes are split in groups of `forward_windows`, or one by one, that never meet and always
        have the same shapes. Rank r takes groups r, r + world_size, …, so the scores are bitwise
        the same for any number of ranks. Within a lane targets come in order. Raises UserError
        where there are fewer than two tokens.
        """
        text = cut_text(tokens, self.settings, self.bos_id)
        prepared = [choice.type.prepare(choice.settings, text) for choice in self.settings.adapters]
        first, *later = self._segments(len(text.windows))
        yield from self._score_segment(text, first, prepared, rank, world_size)
        if not later:
            return
        with undone_afterwards(self.model):
            for scored, segment in zip([first, *later], later, strict=False):
                self._update(scored_tokens(text, scored), world_size)
                yield from self._score_segment(text, segment, prepared, rank, world_size)

    def _segments(self, num_windows: int) -> list[range]:
        return segments(num_windows, self.settings.global_updates.after)

    def _score_segment(
        self,
        text: Text,
        windows: range,
        prepared: Sequence[object],
        rank: int,
        world_size: int,
    ) -> Iterator[ScoredBatch]:
        alone = self.settings.windows_scored_together is not None
        groups = lane_groups(windows, self.settings, alone)
        rows = self.settings.forward_windows if alone else len(groups[0])
        for group in groups[rank::world_size]:
            adapters = self._new_adapters(text, rows, prepared)
            if alone:
                ((lane, windows),) = group
                yield from adapters[0].score_lane(lane, windows)
            else:
                yield from self._score_group(text, group, rows, adapters)

    def score_rank(
        self,
        tokens: Tensor,
        rank: int = 0,
        world_size: int = 1,
        advance: Callable[[int], object] = lambda windows: None,
    ) -> RankScores:
        """`score` as columns on the host; `advance` is told how many windows each pass finished."""
        windows = self._windows(len(tokens) - 1)
        own = self._share(len(windows), rank, world_size)
        num_targets = sum(int(windows.scored[run.start : run.stop].sum()) for run in own)
        batches = self.score(tokens, rank, world_size)
        return rank_scores(batches, self.settings.labels, num_targets, advance)

    def score_documents(
        self, documents: Sequence[str], tokenizer: SentencePieceProcessor
    ) -> "pd.DataFrame":
        """The table of every token of these texts, one after the other, as in tokens.parquet.

        Columns: position, document, token, window, lane, nll_before and nll_after (nats, without
        and with the adapters), bytes, in_own_loss, and gain_<adapter> (nats). `table_metrics` makes
        val_loss and val_bpb of it.
        """
        encoded = ([self.bos_id, *tokenizer.encode(document)] for document in documents)
        tokens = np.array([token for ids in encoded for token in ids], np.int64)
        device = next(self.model.parameters()).device
        scores = self.score_rank(torch.from_numpy(tokens).to(device))
        return token_table([scores], tokens, byte_counts(tokenizer), self.bos_id)

    def distributions(self, tokens: Tensor, world_size: int = 1) -> Distributions:
        """The distributions that score tokens int64 [n + 1], on their device, for an audit.

        world_size > 1 plays the ranks one after another.
        """
        log_probs, account = None, []
        for rank in range(world_size):
            for scored in self.score(tokens, rank, world_size):
                after = scored.logits[-1]
                if log_probs is None:
                    log_probs = after.new_full((len(tokens) - 1, after.shape[1]), torch.nan)
                log_probs[scored.positions - 1] = torch.log_softmax(after, dim=1)
                account.append((scored.positions, scored.nats[-1], scored.lanes))
        return Distributions(log_probs, *(torch.cat(part) for part in zip(*account, strict=True)))

    def window_counts(
        self, num_targets: int, rank: int = 0, world_size: int = 1
    ) -> tuple[int, int]:
        """How many windows this rank scores of a text, and how many there are."""
        windows = self._windows(num_targets)
        return sum(map(len, self._share(len(windows), rank, world_size))), len(windows)

    def _windows(self, num_targets: int) -> Windows:
        cut = self.settings
        return sliding_windows(num_targets, cut.window_tokens, cut.stride_tokens)

    def _share(self, num_windows: int, rank: int, world_size: int) -> list[range]:
        """The runs of windows that this rank scores."""
        alone = self.settings.windows_scored_together is not None
        return [
            run
            for segment in self._segments(num_windows)
            for group in lane_groups(segment, self.settings, alone)[rank::world_size]
            for _, run in group
        ]

    def num_updates(self, num_windows: int) -> int:
        """How often the model is trained on scored text."""
        return len(self._segments(num_windows)) - 1

    def _update(self, tokens: Tensor, world_size: int) -> None:
        """Train the model on tokens int64 [n + 1] that all ranks have scored, or will have."""
        loss = torch.compile(self.model.loss) if self.compiled else self.model.loss
        updates = self.settings.global_updates
        train_on(self.model, tokens, self.settings.window_tokens, updates, loss)
        if world_size > 1 and dist.is_initialized():
            take_from_first_rank(self.model)

    def _new_adapters(self, text: Text, rows: int, prepared: Sequence[object]) -> list[Adapter]:
        return [
            choice.type(
                choice.settings,
                Context(self.model, self.forward, text, rows, shared, self.seed),
            )
            for choice, shared in zip(self.settings.adapters, prepared, strict=True)
        ]

    def _score_group(
        self, text: Text, group: Sequence[tuple[int, range]], rows: int, adapters: list[Adapter]
    ) -> Iterator[ScoredBatch]:
        """Step k scores the k-th window of every lane in the group."""
        device = text.tokens.device
        table = lane_steps([run for _, run in group], rows)
        index = on_device(table, device)
        lanes = on_device(padded([lane for lane, _ in group], rows), device)
        for step in range(len(table)):
            needed = max((adapter.needed_positions(step) for adapter in adapters), default=0)
            batch = WindowBatch(text, step, table[step], index[step], needed)
            logits = self.forward(batch.inputs, batch.first_position)
            scored = batch.at_scored(logits)
            stages, iterations = [scored], [batch.positions.new_zeros(0)]
            for adapter in adapters:
                logits, scored, made = adapter.adapt(batch, logits, scored)
                stages.append(scored)
                iterations += [] if made is None else [made]
            yield batch.score(lanes, stages, torch.cat(iterations))
            for adapter in adapters:
                adapter.learn(batch)
