"""SLOT: a small logit offset fitted to each window's own past, as an adapter of the evaluation.

For each window a delta in logit space, one float per vocabulary entry, is fitted to targets that
precede the window's scored slice; the slice is scored with logits + delta; the delta then serves
only as the start of the next fit. Each lane has its own, so the distribution of each target depends
on the tokens before it and on nothing else. That holds for scope `window`; scope `batch` is what
the record's code does, one delta for many overlapping windows, and leaks.

Shape suffixes: B rows of a forward pass, T tokens of a window, F first place whose logits are
needed, P context places, V vocabulary, m scored targets. Sources: Hu et al., "SLOT" (2025); the
record's description for the geometry.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairway.errors import UserError
from fairway.evaluation.adapters.fit.lbfgs import Minimum
from fairway.evaluation.adapters.fit.logit_delta import ContextBuffer, FitKernels, fit_kernels
from fairway.evaluation.stream import (
    ModelLogits,
    Rows,
    Scored,
    Stream,
    on_device,
    padded,
    score,
)


@dataclass(frozen=True)
class SlotSettings:
    """The config section `slot`."""

    scope: str
    """window: a delta for each window; batch: one for `batch_windows` windows."""
    batch_windows: int
    focal_tokens: int | str
    """The window's last positions that may be fitted to, or "all"."""
    l2: float
    """Weight of |delta|^2 / 2 against the summed cross-entropy, in nats."""
    clamp: float
    """Largest magnitude of a fitted entry, in nats."""
    iterations: int
    history: int
    same_document: bool
    """Fit to the slice's own document only, and drop the delta where the next one begins."""
    context_logits: str
    """current: of this window; scored: of the moment when each target was scored."""

    def __post_init__(self) -> None:
        self._check_choices()
        for key in ("batch_windows", "iterations", "history"):
            if getattr(self, key) < 1:
                raise UserError(f"slot.{key} is {getattr(self, key)}: expected at least 1")
        if self.l2 < 0 or self.clamp <= 0:
            raise UserError(
                f"slot.l2 {self.l2}, slot.clamp {self.clamp}: expected at least 0 and more than 0"
            )

    def _check_choices(self) -> None:
        choices = {"scope": ("window", "batch"), "context_logits": ("current", "scored")}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise UserError(
                    f"slot.{key} is {getattr(self, key)!r}: expected one of {', '.join(allowed)}"
                )
        if isinstance(self.focal_tokens, str) and self.focal_tokens != "all":
            raise UserError(
                f"slot.focal_tokens is {self.focal_tokens!r}: expected a count or 'all'"
            )


class SlotAdapter:
    """Scope `window`: a delta for each lane, fitted anew before each of its windows is scored."""

    def __init__(self, stream: Stream, settings: SlotSettings, kernels: str) -> None:
        """kernels: how deltas are fitted, "plain" or "fused"."""
        self.fit = _Fit(stream, settings, fit_kernels(kernels))
        self.delta: Tensor | None = None
        self.buffer: ContextBuffer | None = None

    def needed_places(self, step: int) -> int:
        """All that may be context, unless a buffer holds its logits."""
        keeps = self.fit.settings.context_logits == "scored"
        return 0 if keeps and step > 0 else self.fit.context_places

    def adapt(self, rows: Rows, logits: Tensor, scored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fit each row's delta to its past and add it to the scored targets' logits [m, V]."""
        if self.delta is None:
            self.delta = logits.new_zeros(len(logits), logits.shape[2])
            if self.fit.settings.context_logits == "scored":
                self.buffer = self._filled_buffer(rows, logits)
        if self.buffer:
            probabilities, positions = self.buffer.contents()
            context = probabilities, positions, self.fit.is_context(rows, positions)
        else:
            context = self.fit.context(rows, logits)
        fit = self.fit(*context, self.delta)
        self.delta, self.unadapted = fit.x, scored
        after = self.fit.add(rows, scored, self.delta)
        return logits, after, fit.iterations[rows.real_rows]

    def learn(self, rows: Rows) -> None:
        """Keep what the slice's targets were scored from; the first fill has those of step 0."""
        if self.buffer and rows.step > 0:
            probabilities = self.fit.kernels.softmax(self.unadapted)
            self.buffer.write(rows.row, rows.positions, probabilities)

    def _filled_buffer(self, rows: Rows, logits: Tensor) -> ContextBuffer:
        """A buffer that each lane's first window fills with its own logits."""
        size, places = len(logits), self.fit.context_places
        probabilities = self.fit.kernels.softmax(logits[:, logits.shape[1] - places :])
        buffer = ContextBuffer(size, places, like=probabilities)
        row = torch.arange(size, device=logits.device).repeat_interleave(places)
        buffer.write(row, rows.last_positions(places).flatten(), probabilities.flatten(0, 1))
        return buffer


def score_batches(
    model_logits: ModelLogits,
    stream: Stream,
    settings: SlotSettings,
    forward_windows: int,
    kernels: str,
    lane: int,
    run: range,
) -> Iterator[Scored]:
    """The record's code: one delta for `batch_windows` consecutive windows of the lane.

    These windows overlap, so that one's context is another's scored slice: this leaks. A batch may
    need several forward passes, or a pass serve several batches; deltas are fitted one by one.
    """
    fit, batch_windows = _Fit(stream, settings, fit_kernels(kernels)), settings.batch_windows
    together = batch_windows * max(1, forward_windows // batch_windows)
    size = min(forward_windows, together)
    lanes = on_device([lane] * size, stream.tokens.device)
    delta = None
    for step, first in enumerate(range(0, len(run), together)):
        windows = run[first : first + together]
        passes = _passes(stream, step, windows, size, fit.context_places)
        logits = [model_logits(rows.inputs, rows.first_place) for rows in passes]
        contexts = [fit.context(rows, part) for rows, part in zip(passes, logits, strict=True)]
        problems = [
            _joined(contexts, batch, batch + batch_windows)
            for batch in range(0, len(windows), batch_windows)
        ]
        if delta is None:
            delta = logits[0].new_zeros(1, logits[0].shape[2])
        deltas, iterations = fit.in_turn(problems, delta)
        delta = deltas[-1:]
        batches = torch.arange(len(passes) * size, device=delta.device) // batch_windows
        batches.clamp_(max=len(problems) - 1)  # padding's
        for batch_of_row, rows, part in zip(batches.split(size), passes, logits, strict=True):
            before = rows.at_scored(part)
            after = fit.add(rows, before, deltas[batch_of_row])
            in_own_loss = fit.applies(rows) & _fitted_to(
                rows.positions, batch_of_row[rows.row], problems
            )
            yield score(rows, lanes, (before, after), iterations, in_own_loss)
            iterations = iterations[:0]


def _passes(stream: Stream, step: int, windows: range, size: int, needed_places: int) -> list[Rows]:
    """The forward passes of `size` rows that `windows` need, the last with padding."""
    starts = range(0, len(windows), size)
    table = np.array([padded(windows[start : start + size], size) for start in starts])
    indices = on_device(table, stream.tokens.device)
    return [
        Rows(stream, step, numbers, index, needed_places)
        for numbers, index in zip(table, indices, strict=True)
    ]


Context = tuple[Tensor, Tensor, Tensor]
"""What may be fitted to: probabilities [B, P, V], targets' positions [B, P], which count [B, P]."""


def _joined(contexts: Sequence[Context], first: int, last: int) -> Context:
    """One problem, B = 1, of the rows from `first` to `last` of passes that follow one another."""
    parts = []
    for context in contexts:
        rows = len(context[0])
        inside = slice(min(max(first, 0), rows), min(max(last, 0), rows))
        parts.append([part[inside].flatten(0, 1) for part in context])
        first, last = first - rows, last - rows
    return tuple(torch.cat(part).unsqueeze(0) for part in zip(*parts, strict=True))


def _fitted_to(positions: Tensor, batches: Tensor, problems: Sequence[Context]) -> Tensor:
    """bool [m]: which targets at `positions` were fitted to by the delta of their own batch."""
    found = torch.zeros_like(positions, dtype=torch.bool)
    for batch, (_, fitted, counted) in enumerate(problems):
        fitted = torch.where(counted, fitted, 0)  # no target is at 0
        found |= (batches == batch) & torch.isin(positions, fitted)
    return found


@dataclass(frozen=True)
class _Fit:
    """Which targets a delta is fitted to, and where it applies."""

    stream: Stream
    settings: SlotSettings
    kernels: FitKernels

    @property
    def context_places(self) -> int:
        """Places [T − this, T) of a window may hold context: those within the focal tokens."""
        length, focal = self.stream.windows.length, self.settings.focal_tokens
        return length if focal == "all" else min(int(focal), length)

    def is_context(self, rows: Rows, positions: Tensor) -> Tensor:
        """bool [B, P]: which targets int64 [B, P] precede the slice and may be fitted to."""
        oldest = rows.ends - self.context_places + 1
        is_inside = (positions >= oldest) & (positions < rows.first_scored) & rows.real
        if not self.settings.same_document:
            return is_inside
        return is_inside & self.stream.in_document(positions, rows.slice_documents)

    def context(self, rows: Rows, logits: Tensor) -> Context:
        """This pass's, for every place that may be context.

        Places that every real row scores are left out: that is geometry, not content.
        """
        places = self.context_places
        count = max(places - rows.fewest_scored, 0)
        first = logits.shape[1] - places
        probabilities = self.kernels.softmax(logits[:, first : first + count])
        positions = rows.last_positions(places)[:, :count]
        return probabilities, positions, self.is_context(rows, positions)

    def __call__(
        self, probabilities: Tensor, positions: Tensor, is_context: Tensor, initial: Tensor
    ) -> Minimum:
        return self.kernels.fit(
            probabilities,
            self.stream.tokens[positions],
            is_context,
            initial,
            l2=self.settings.l2,
            clamp=self.settings.clamp,
            iterations=self.settings.iterations,
            history=self.settings.history,
        )

    def in_turn(self, problems: Sequence[Context], delta: Tensor) -> tuple[Tensor, Tensor]:
        """Each problem's delta [problems, V], where the next one's fit starts, and iterations."""
        found = []
        for problem in problems:
            found.append(self(*problem, delta))
            delta = found[-1].x
        return torch.cat([one.x for one in found]), torch.cat([one.iterations for one in found])

    def applies(self, rows: Rows) -> Tensor:
        """bool [m]: which scored targets take a delta."""
        if not self.settings.same_document:
            return torch.ones_like(rows.positions, dtype=torch.bool)
        return rows.in_slice_document

    def add(self, rows: Rows, scored: Tensor, delta: Tensor) -> Tensor:
        """The scored targets' logits [m, V] plus their row's delta [B, V], where it applies."""
        return torch.where(self.applies(rows).unsqueeze(1), scored + delta[rows.row], scored)
