"""SLOT: sliding-window scores with a small logit offset fitted to each window's own past.

For each window a delta in logit space, one float per vocabulary entry, is fitted to targets that
precede the window's scored slice; the slice is scored with logits + delta; the delta then serves
only as the start of the next fit. Windows are cut in *lanes*, contiguous runs that step side by
side, each with its own delta. A lane learns nothing from another one, so the distribution of each
target depends on the tokens before it and on nothing else. That holds for scope `window`; scope
`batch` is what the record's code does, one delta for many overlapping windows, and leaks.

Shape suffixes: B rows of a forward pass, T tokens of a window, P context places, V vocabulary,
m scored targets. Sources: Hu et al., "SLOT" (2025); the record's description for the geometry.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fairway.adaptation.lbfgs import Minimum
from fairway.adaptation.logit_delta import ContextBuffer, FitKernels, fit_kernels
from fairway.config import check_slot
from fairway.errors import UserError
from fairway.evaluation.windows import Windows, lane_runs, sliding_windows

ModelLogits = Callable[[Tensor, int], Tensor]
"""tokens int64 [B, T], first place F -> logits float32 [B, T − F, V] of the places from F on."""

MOST_LANES = np.iinfo(np.int16).max  # the width of the lane column in tokens.parquet


@dataclass(frozen=True)
class SlotSettings:
    """The config section `slot`."""

    scope: str
    """window: a delta for each window; batch: one for `batch_windows` windows; none: no delta."""
    window_tokens: int
    stride_tokens: int
    lanes: int
    batch_windows: int
    forward_windows: int
    """Rows of a forward pass, at most; lanes share one only as rows."""
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
        for key in ("stride_tokens", "lanes", "batch_windows", "forward_windows", "iterations"):
            if getattr(self, key) < 1:
                raise UserError(f"slot.{key} is {getattr(self, key)}: expected at least 1")
        if self.history < 1 or self.l2 < 0 or self.clamp <= 0:
            raise UserError(
                f"slot.history {self.history}, slot.l2 {self.l2}, slot.clamp {self.clamp}: "
                "expected at least 1, at least 0 and more than 0"
            )
        if self.lanes > MOST_LANES:
            raise UserError(f"slot.lanes is {self.lanes}: expected at most {MOST_LANES}")
        check_slot(asdict(self))

    def _check_choices(self) -> None:
        choices = {
            "scope": ("window", "batch", "none"),
            "context_logits": ("current", "scored"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise UserError(
                    f"slot.{key} is {getattr(self, key)!r}: expected one of {', '.join(allowed)}"
                )
        if isinstance(self.focal_tokens, str) and self.focal_tokens != "all":
            raise UserError(
                f"slot.focal_tokens is {self.focal_tokens!r}: expected a count or 'all'"
            )

    @property
    def focal(self) -> int:
        """focal_tokens as a count."""
        return self.window_tokens if self.focal_tokens == "all" else int(self.focal_tokens)


@dataclass(frozen=True)
class Scored:
    """What one forward pass scored, in the order of its rows. Everything is on the tokens' device.

    positions, windows, lanes: int64 [m]; the target's index in the stream, its window, its lane.
    targets: int64 [m], the tokens there.
    logits_before, logits_after: float32 [m, V], without and with the delta.
    in_own_loss: bool [m], whether the target was fitted to by the very delta that scored it.
    num_windows: windows that this pass finished.
    iterations: int64 [fits], L-BFGS iterations of the fits since the last record.
    """

    positions: Tensor
    windows: Tensor
    lanes: Tensor
    targets: Tensor
    logits_before: Tensor
    logits_after: Tensor
    in_own_loss: Tensor
    num_windows: int
    iterations: Tensor


@dataclass(frozen=True)
class _Stream:
    """The tokens and how they are cut. documents: int64 [n + 1], BOS tokens up to each place."""

    tokens: Tensor
    documents: Tensor
    windows: Windows
    bos_id: int
    settings: SlotSettings
    kernels: FitKernels

    @cached_property
    def starts(self) -> Tensor:
        """int64 [windows + 1], each window's start, on the tokens' device; the last is padding."""
        return _on_device(np.append(self.windows.starts, 0), self.tokens.device)

    @cached_property
    def scored(self) -> Tensor:
        """int64 [windows + 1], how many targets each window scores; padding, the last, none."""
        return _on_device(np.append(self.windows.scored, 0), self.tokens.device)

    @property
    def context_places(self) -> int:
        """Places [T − this, T) of a window may hold context: those within the focal tokens."""
        return min(self.settings.focal, self.windows.length)


class _Rows:
    """The windows of one forward pass; windows [B] of −1 are padding, which scores nothing.

    Padding keeps the shape, and so the arithmetic of every row, the same from step to step.
    first_place: the first place of [0, T) whose logits are needed; it follows from the windows
    alone, never from their tokens, since it changes the shapes.
    row, place: int64 [m], the row and place of each scored target. positions: int64 [m], their
    indices in the stream. real: bool [B, 1]. real_rows: int64, the rows that are not padding.
    """

    def __init__(self, stream: _Stream, windows: np.ndarray, index: Tensor, needs_context: bool):
        """windows: int64 [B] on the host. index: the same on the device, so that nothing waits."""
        length = stream.windows.length
        is_real = windows >= 0
        counts = stream.windows.scored[windows[is_real]]
        self.stream, self.index = stream, index
        self.num_windows, self.num_scored = len(counts), int(counts.sum())
        self.fewest_scored = int(counts.min())
        # The stream's last window may score less than a stride; its shapes are those of the others.
        places = max(int(counts.max()), stream.settings.stride_tokens)
        if needs_context:
            places = max(places, stream.context_places)
        self.first_place = max(length - places, 0)

        self.real = (index >= 0).unsqueeze(1)
        self.real_rows = torch.repeat_interleave(self.real[:, 0].long(), output_size=len(counts))
        scored = stream.scored[index]
        self.row = torch.repeat_interleave(scored, output_size=self.num_scored)
        seen = torch.arange(self.num_scored, device=index.device)
        seen = seen - (scored.cumsum(0) - scored)[self.row]
        self.place = seen + (length - scored)[self.row]
        self.ends = (stream.starts[index] + length).unsqueeze(1)
        self.positions = self.ends[self.row, 0] - length + self.place + 1
        self.first_scored = self.ends - scored.unsqueeze(1) + 1
        self.slice_documents = stream.documents[self.first_scored - 1]
        inputs = stream.tokens[self.last_positions(length) - 1]
        self.inputs = torch.where(self.real, inputs, stream.bos_id)

    def last_positions(self, count: int) -> Tensor:
        """int64 [B, count]: the last targets of each window."""
        return self.ends + torch.arange(1 - count, 1, device=self.ends.device)

    def is_context(self, positions: Tensor) -> Tensor:
        """bool [B, P]: which targets int64 [B, P] precede the slice and may be fitted to."""
        oldest = self.ends - self.stream.context_places + 1
        is_inside = (positions >= oldest) & (positions < self.first_scored) & self.real
        return is_inside & self.is_in_document(positions, self.slice_documents)

    def is_in_document(self, positions: Tensor, documents: Tensor) -> Tensor:
        """Which targets are predicted from inside `documents`; all, where that does not matter.

        A BOS is predicted from inside the document that it ends.
        """
        if not self.stream.settings.same_document:
            return torch.ones_like(positions, dtype=torch.bool)
        return self.stream.documents[(positions - 1).clamp(min=0)] == documents

    def context(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """This pass's probabilities [B, P, V] for every place that may be context; targets [B, P].

        Places that every real row scores are left out: that is geometry, not content.
        """
        places = self.stream.context_places
        count = max(places - self.fewest_scored, 0)
        first = logits.shape[1] - places
        probabilities = self.stream.kernels.softmax(logits[:, first : first + count])
        return probabilities, self.last_positions(places)[:, :count]

    def score(
        self,
        logits: Tensor,
        lanes: Tensor,
        delta: Tensor | None,
        iterations: Tensor,
        fitted: Tensor | None = None,
    ) -> Scored:
        """Score the slices from logits [B, T − F, V], each row's lane int64 [B] and delta [B, V].

        fitted: positions of the deltas' context targets, where scored ones can be among them.
        """
        before = logits[self.row, self.place - self.first_place]
        after, in_own_loss = before, torch.zeros_like(self.positions, dtype=torch.bool)
        if delta is not None:
            applies = self.is_in_document(self.positions, self.slice_documents[self.row, 0])
            after = torch.where(applies.unsqueeze(1), before + delta[self.row], before)
            if fitted is not None:
                in_own_loss = torch.isin(self.positions, fitted) & applies
        return Scored(
            positions=self.positions,
            windows=self.index[self.row],
            lanes=lanes[self.row],
            targets=self.stream.tokens[self.positions],
            logits_before=before,
            logits_after=after,
            in_own_loss=in_own_loss,
            num_windows=self.num_windows,
            iterations=iterations,
        )


def _on_device(values: Sequence, device: torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)


@torch.no_grad()
def score_stream(
    model_logits: ModelLogits,
    tokens: Tensor,
    settings: SlotSettings,
    bos_id: int,
    rank: int = 0,
    world_size: int = 1,
    kernels: str = "plain",
) -> Iterator[Scored]:
    """Score every target of `tokens` int64 [n + 1], or this rank's share of them, once.

    Lanes are split in groups of `forward_windows` (scope batch: one) that never meet and always
    have the same shapes; rank r takes groups r, r + world_size, …, so the scores are bitwise the
    same for any number of ranks. Within a lane targets come in order. kernels: how deltas are
    fitted, "plain" or "fused". Raises UserError where the stream has fewer than two tokens.
    """
    windows = sliding_windows(len(tokens) - 1, settings.window_tokens, settings.stride_tokens)
    documents = (tokens == bos_id).cumsum(0)
    stream = _Stream(tokens, documents, windows, bos_id, settings, fit_kernels(kernels))
    groups = lane_groups(len(windows), settings)
    for group in groups[rank::world_size]:
        if settings.scope == "batch":
            yield from _score_batches(model_logits, stream, *group[0])
        else:
            yield from _score_lanes(model_logits, stream, group, size=len(groups[0]))


def lane_groups(num_windows: int, settings: SlotSettings) -> list[list[tuple[int, range]]]:
    """(lane, its windows) of the lanes that share forward passes; the last group may be smaller."""
    runs = list(enumerate(lane_runs(num_windows, settings.lanes)))
    size = 1 if settings.scope == "batch" else settings.forward_windows
    return [runs[first : first + size] for first in range(0, len(runs), size)]


def _score_lanes(
    model_logits: ModelLogits, stream: _Stream, group: list[tuple[int, range]], size: int
) -> Iterator[Scored]:
    """Step k scores the k-th window of every lane in the group, each with its own delta or none."""
    settings = stream.settings
    device = stream.tokens.device
    table = _steps([run for _, run in group], size)
    index = _on_device(table, device)
    lanes = _on_device(_padded([lane for lane, _ in group], size), device)
    delta = buffer = None
    for step in range(len(table)):
        fits = settings.scope == "window"
        needs_context = fits and (step == 0 or settings.context_logits == "current")
        rows = _Rows(stream, table[step], index[step], needs_context)
        logits = model_logits(rows.inputs, rows.first_place)
        iterations = rows.positions.new_zeros(0)
        if fits:
            if step == 0:
                delta = logits.new_zeros(size, logits.shape[2])
                buffer = _lane_buffer(rows, logits)
            probabilities, positions = buffer.contents() if buffer else rows.context(logits)
            fit = _fit(stream, probabilities, positions, rows.is_context(positions), delta)
            delta, iterations = fit.x, fit.iterations[rows.real_rows]
        scored = rows.score(logits, lanes, delta, iterations)
        yield scored
        if buffer and step > 0:
            probabilities = stream.kernels.softmax(scored.logits_before)
            buffer.write(rows.row, scored.positions, probabilities)


def _score_batches(
    model_logits: ModelLogits, stream: _Stream, lane: int, run: range
) -> Iterator[Scored]:
    """The record's code: one delta for `batch_windows` consecutive windows of the lane.

    These windows overlap, so that one's context is another's scored slice: this leaks.
    """
    settings = stream.settings
    device = stream.tokens.device
    size = min(settings.forward_windows, settings.batch_windows)
    lanes = _on_device([lane] * size, device)
    delta = None
    for first in range(0, len(run), settings.batch_windows):
        batch = run[first : first + settings.batch_windows]
        passes = [batch[start : start + size] for start in range(0, len(batch), size)]
        table = np.array([_padded(part, size) for part in passes])
        parts = [
            _Rows(stream, windows, index, needs_context=True)
            for windows, index in zip(table, _on_device(table, device), strict=True)
        ]
        logits = [model_logits(rows.inputs, rows.first_place) for rows in parts]
        contexts = [rows.context(part) for rows, part in zip(parts, logits, strict=True)]
        is_context = [
            rows.is_context(positions) for rows, (_, positions) in zip(parts, contexts, strict=True)
        ]
        # One problem whose places are those of all the windows.
        probabilities = torch.cat([part.flatten(0, 1) for part, _ in contexts]).unsqueeze(0)
        positions = torch.cat([part.flatten() for _, part in contexts]).unsqueeze(0)
        counted = torch.cat([part.flatten() for part in is_context]).unsqueeze(0)
        if delta is None:
            delta = logits[0].new_zeros(1, probabilities.shape[2])
        fit = _fit(stream, probabilities, positions, counted, delta)
        delta, iterations = fit.x, fit.iterations
        fitted = torch.where(counted, positions, 0)  # no target is at 0
        for rows, part in zip(parts, logits, strict=True):
            yield rows.score(part, lanes, delta.expand(size, -1), iterations, fitted)
            iterations = iterations[:0]


def _steps(runs: Sequence[range], size: int) -> np.ndarray:
    """int64 [steps, size]: the k-th window of every run, −1 where there is none."""
    table = np.full((max(len(run) for run in runs), size), -1)
    for column, run in enumerate(runs):
        table[: len(run), column] = run
    return table


def _padded(values: Sequence[int], size: int) -> list[int]:
    return [*values, *[-1] * (size - len(values))]


def _lane_buffer(rows: _Rows, logits: Tensor) -> ContextBuffer | None:
    """A buffer that each lane's first window fills with its own logits; None where none is kept."""
    stream = rows.stream
    if stream.settings.context_logits != "scored":
        return None
    size, places = len(logits), stream.context_places
    probabilities = stream.kernels.softmax(logits[:, logits.shape[1] - places :])
    buffer = ContextBuffer(size, places, like=probabilities)
    row = torch.arange(size, device=logits.device).repeat_interleave(places)
    buffer.write(row, rows.last_positions(places).flatten(), probabilities.flatten(0, 1))
    return buffer


def _fit(
    stream: _Stream, probabilities: Tensor, positions: Tensor, is_context: Tensor, initial: Tensor
) -> Minimum:
    settings = stream.settings
    return stream.kernels.fit(
        probabilities,
        stream.tokens[positions],
        is_context,
        initial,
        l2=settings.l2,
        clamp=settings.clamp,
        iterations=settings.iterations,
        history=settings.history,
    )


def target_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target: log-softmax in float32 of logits [m, V], returned as float64 [m]."""
    log_probs = torch.log_softmax(logits.float(), dim=1)
    return -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1).double()
