"""SLOT: a small logit offset fitted to each window's own past, as an adapter of the evaluation.

For each window a delta in logit space, one float per vocabulary entry, is fitted to targets that
precede the window's scored slice; the slice is scored with logits + delta; the delta then serves
only as the start of the next fit. Each lane has its own, so the distribution of each target depends
on the tokens before it and on nothing else. That holds for scope `window`. Scope `batch` is what
the code of the reference submission does, one delta for many overlapping windows, and leaks.

Shape suffixes: B rows of a forward pass, T tokens of a window, F the first offset whose logits are
needed, P context positions, V vocabulary, m scored targets. Sources: Hu et al., "SLOT" (2025); the
description of the reference submission, openai/parameter-golf PR #1350, for the geometry.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairway.errors import UserError
from fairway.evaluation.adapters.base import Adapted, Adapter, Context
from fairway.evaluation.adapters.fit.lbfgs import Minimum
from fairway.evaluation.adapters.fit.logit_delta import ContextBuffer, fit_delta
from fairway.evaluation.text import ScoredBatch, Text, WindowBatch, on_device
from fairway.evaluation.windows import WindowSettings, padded


class SlotSettings(Adapter.Settings):
    """Which targets a delta is fitted to, and how far the fit may go."""

    scope: Literal["window", "batch"] = "window"
    """Who shares a delta: nobody, or batch_windows windows (leaks)."""
    batch_windows: int = Field(32, ge=1)
    """Scope batch: consecutive windows that share one delta."""
    focal_tokens: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    """The window's last positions whose targets may be fitted."""
    l2: float = Field(14.0, ge=0)
    """Weight of |delta|² / 2 against the summed cross-entropy, in nats."""
    clamp: float = Field(5.0, gt=0)
    """Largest magnitude of a fitted entry, in nats."""
    iterations: int = Field(25, ge=1)
    """Iterations of L-BFGS, at most."""
    history: int = Field(20, ge=1)
    """Pairs of steps and gradient changes that L-BFGS keeps."""
    same_document: bool = True
    """Fit to the slice's own document only, and drop the delta where the next one begins."""
    context_logits: Literal["current", "scored"] = "current"
    """The context's logits are those of this window, or of the moment each token was scored."""

    @model_validator(mode="after")
    def _batches_have_no_buffer(self) -> Self:
        if self.scope == "batch" and self.context_logits == "scored":
            raise UserError(
                "evaluation.adapters.slot.context_logits 'scored' needs scope 'window', found "
                "'batch': use 'current'"
            )
        return self

    def check_fits(self, windows: WindowSettings) -> None:
        """Some context must precede the slice, inside the window."""
        window, stride = windows.window_tokens, windows.stride_tokens
        focal = window if self.focal_tokens == "all" else self.focal_tokens
        if focal > window:
            raise UserError(
                f"evaluation.adapters.slot.focal_tokens {focal} exceeds evaluation.window_tokens "
                f"{window}: lower it, or use 'all'"
            )
        if focal <= stride:
            raise UserError(
                f"evaluation.adapters.slot.focal_tokens {self.focal_tokens} leaves no context "
                f"before the scored {stride} (evaluation.stride_tokens): expected more than that, "
                "or 'all'"
            )


class FitKernels(NamedTuple):
    """One way to compute a fit.

    softmax: float32 logits [m, V] or [B, P, V] → probabilities in the form that `fit` takes.
    fit: `logit_delta.fit_delta` or one with its signature.
    """

    softmax: Callable[[Tensor], Tensor]
    fit: Callable[..., Minimum]


def fit_kernels(kernels: str) -> FitKernels:
    """PyTorch's operations for "plain", Triton kernels for "fused"."""
    if kernels == "fused":
        # Triton is absent from installations for the CPU, where nothing asks for it.
        from fairway.evaluation.adapters.fit import logit_delta_kernel

        return FitKernels(logit_delta_kernel.compact_softmax, logit_delta_kernel.fit_delta)
    assert kernels == "plain", kernels
    return FitKernels(partial(torch.softmax, dim=-1), fit_delta)


class Slot(Adapter):
    """Scope `window`: a delta for each lane, fitted anew before each of its windows is scored."""

    title = "SLOT"
    Settings = SlotSettings

    def __init__(self, settings: SlotSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.fit = DeltaFit(context.text, settings, fit_kernels(context.model.kernels))
        self.delta: Tensor | None = None
        self.buffer: ContextBuffer | None = None

    @classmethod
    def kernels(cls, settings: SlotSettings, model_kernels: str) -> str:
        """Fits are computed as the model is."""
        return model_kernels

    @classmethod
    def windows_scored_together(cls, settings: SlotSettings) -> int | None:
        """With scope `batch`, those that share a delta."""
        return settings.batch_windows if settings.scope == "batch" else None

    def needed_positions(self, step: int) -> int:
        """All that may be context, unless a buffer holds its probabilities."""
        keeps = self.settings.context_logits == "scored"
        return 0 if keeps and step > 0 else self.fit.context_positions

    def adapt(self, batch: WindowBatch, logits: Tensor, scored: Tensor) -> Adapted:
        """Fit each row's delta to its past and add it to the scored targets' logits [m, V]."""
        if self.delta is None:
            self.delta = logits.new_zeros(len(logits), logits.shape[2])
            if self.settings.context_logits == "scored":
                self.buffer = self._filled_buffer(batch, logits)
        if self.buffer:
            positions = self.buffer.positions
            context = self.buffer.probabilities, positions, self.fit.is_context(batch, positions)
        else:
            context = self.fit.context(batch, logits)
        found = self.fit(*context, self.delta)
        self.delta, self.unadapted = found.x, scored
        after = self.fit.add(batch, scored, self.delta)
        return Adapted(logits, after, found.iterations[batch.real_rows])

    def learn(self, batch: WindowBatch) -> None:
        """Keep what the slice's targets were scored from; the first fill has those of step 0."""
        if self.buffer and batch.step > 0:
            probabilities = self.fit.kernels.softmax(self.unadapted)
            self.buffer.write(batch.row, batch.positions, probabilities)

    def _filled_buffer(self, batch: WindowBatch, logits: Tensor) -> ContextBuffer:
        """A buffer that each lane's first window fills with its own probabilities."""
        rows, size = len(logits), self.fit.context_positions
        probabilities = self.fit.kernels.softmax(logits[:, logits.shape[1] - size :])
        buffer = ContextBuffer(rows, size, like=probabilities)
        row = torch.arange(rows, device=logits.device).repeat_interleave(size)
        buffer.write(row, batch.last_positions(size).flatten(), probabilities.flatten(0, 1))
        return buffer

    def score_lane(self, lane: int, windows: range) -> Iterator[ScoredBatch]:
        """Scope `batch`: one delta for `batch_windows` consecutive windows of the lane.

        These windows overlap, so that one's context is another's scored slice: this leaks. A batch
        may need several forward passes, or a pass serve several batches; deltas are fitted one by
        one.
        """
        context, fit, batch_windows = self.context, self.fit, self.settings.batch_windows
        together = batch_windows * max(1, context.rows // batch_windows)
        size = min(context.rows, together)
        lanes = on_device([lane] * size, context.text.tokens.device)
        delta = None
        for step, first in enumerate(range(0, len(windows), together)):
            numbers = windows[first : first + together]
            passes = _passes(context.text, step, numbers, size, fit.context_positions)
            logits = [context.forward(batch.inputs, batch.first_position) for batch in passes]
            contexts = [
                fit.context(batch, part) for batch, part in zip(passes, logits, strict=True)
            ]
            problems = [
                _joined(contexts, begin, begin + batch_windows)
                for begin in range(0, len(numbers), batch_windows)
            ]
            if delta is None:
                delta = logits[0].new_zeros(1, logits[0].shape[2])
            deltas, iterations = fit.in_turn(problems, delta)
            delta = deltas[-1:]
            problem_of_row = torch.arange(len(passes) * size, device=delta.device) // batch_windows
            problem_of_row.clamp_(max=len(problems) - 1)  # padding's
            for rows, batch, part in zip(problem_of_row.split(size), passes, logits, strict=True):
                before = batch.at_scored(part)
                after = fit.add(batch, before, deltas[rows])
                in_own_loss = fit.applies(batch) & _fitted_to(
                    batch.positions, rows[batch.row], problems
                )
                yield batch.score(lanes, (before, after), iterations, in_own_loss)
                iterations = iterations[:0]


def _passes(
    text: Text, step: int, windows: range, size: int, needed_positions: int
) -> list[WindowBatch]:
    """The forward passes of `size` rows that `windows` need, the last with padding."""
    starts = range(0, len(windows), size)
    table = np.array([padded(windows[start : start + size], size) for start in starts])
    indices = on_device(table, text.tokens.device)
    return [
        WindowBatch(text, step, numbers, index, needed_positions)
        for numbers, index in zip(table, indices, strict=True)
    ]


Problem = tuple[Tensor, Tensor, Tensor]
"""Targets to fit to: probabilities [B, P, V], positions [B, P], and which of them count [B, P]."""


def _joined(contexts: Sequence[Problem], first: int, last: int) -> Problem:
    """One problem, B = 1, of the rows from `first` to `last` of passes that follow one another."""
    parts = []
    for context in contexts:
        rows = len(context[0])
        inside = slice(min(max(first, 0), rows), min(max(last, 0), rows))
        parts.append([part[inside].flatten(0, 1) for part in context])
        first, last = first - rows, last - rows
    return tuple(torch.cat(part).unsqueeze(0) for part in zip(*parts, strict=True))


def _fitted_to(positions: Tensor, problem: Tensor, problems: Sequence[Problem]) -> Tensor:
    """bool [m]: which targets at `positions` were fitted to in their own problem int64 [m]."""
    found = torch.zeros_like(positions, dtype=torch.bool)
    for number, (_, fitted, counted) in enumerate(problems):
        fitted = torch.where(counted, fitted, 0)  # no target is at 0
        found |= (problem == number) & torch.isin(positions, fitted)
    return found


@dataclass(frozen=True)
class DeltaFit:
    """Which targets a delta is fitted to, and where it applies."""

    text: Text
    settings: SlotSettings
    kernels: FitKernels

    @property
    def context_positions(self) -> int:
        """How many of a window's last positions may hold context: the focal tokens."""
        length, focal = self.text.windows.length, self.settings.focal_tokens
        return length if focal == "all" else min(int(focal), length)

    def is_context(self, batch: WindowBatch, positions: Tensor) -> Tensor:
        """bool [B, P]: which targets int64 [B, P] precede the slice and may be fitted to."""
        oldest = batch.ends - self.context_positions + 1
        is_inside = (positions >= oldest) & (positions < batch.first_scored) & batch.real
        if not self.settings.same_document:
            return is_inside
        return is_inside & self.text.in_document(positions, batch.slice_documents)

    def context(self, batch: WindowBatch, logits: Tensor) -> Problem:
        """This batch's problem, with every position that may be context.

        Positions that every real row scores are left out: that is geometry, not content.
        """
        size = self.context_positions
        count = max(size - batch.fewest_scored, 0)
        first = logits.shape[1] - size
        probabilities = self.kernels.softmax(logits[:, first : first + count])
        positions = batch.last_positions(size)[:, :count]
        return probabilities, positions, self.is_context(batch, positions)

    def __call__(
        self, probabilities: Tensor, positions: Tensor, is_context: Tensor, initial: Tensor
    ) -> Minimum:
        """Fit each row's delta [B, V] from `initial` on."""
        return self.kernels.fit(
            probabilities,
            self.text.tokens[positions],
            is_context,
            initial,
            l2=self.settings.l2,
            clamp=self.settings.clamp,
            iterations=self.settings.iterations,
            history=self.settings.history,
        )

    def in_turn(self, problems: Sequence[Problem], delta: Tensor) -> tuple[Tensor, Tensor]:
        """Each problem's delta [problems, V], where the next one's fit starts, and iterations."""
        found = []
        for problem in problems:
            found.append(self(*problem, delta))
            delta = found[-1].x
        return torch.cat([one.x for one in found]), torch.cat([one.iterations for one in found])

    def applies(self, batch: WindowBatch) -> Tensor:
        """bool [m]: which scored targets take a delta."""
        if not self.settings.same_document:
            return torch.ones_like(batch.positions, dtype=torch.bool)
        return batch.in_slice_document

    def add(self, batch: WindowBatch, scored: Tensor, delta: Tensor) -> Tensor:
        """The scored targets' logits [m, V] plus their row's delta [B, V], where it applies."""
        return torch.where(self.applies(batch).unsqueeze(1), scored + delta[batch.row], scored)
