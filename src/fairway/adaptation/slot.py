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

import numpy as np
import torch
from torch import Tensor

from fairway.adaptation.lbfgs import Minimum
from fairway.adaptation.logit_delta import ContextBuffer, fit_delta
from fairway.config import check_slot
from fairway.errors import UserError
from fairway.evaluation.windows import Windows, lane_runs, sliding_windows

ModelLogits = Callable[[Tensor], Tensor]
"""tokens int64 [B, T] -> logits float32 [B, T, V]."""

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

    @property
    def context_places(self) -> int:
        """Places [T − this, T) of a window may hold context: those within the focal tokens."""
        return min(self.settings.focal, self.windows.length)


class _Rows:
    """The windows of one forward pass; windows [B] of −1 are padding, which scores nothing.

    Padding keeps the shape, and so the arithmetic of every row, the same from step to step.
    row, place: int64 [m], where the scored targets' logits are in [B, T, V]. positions: int64 [m],
    their indices in the stream.
    """

    def __init__(self, stream: _Stream, windows: Sequence[int]):
        device, length = stream.tokens.device, stream.windows.length
        self.stream = stream
        self.windows = np.asarray(windows, dtype=np.int64)
        self.is_real = self.windows >= 0
        self.scored = np.where(self.is_real, stream.windows.scored[self.windows], 0)
        starts = np.where(self.is_real, stream.windows.starts[self.windows], 0)
        row = np.repeat(np.arange(len(starts)), self.scored)
        seen = np.arange(len(row)) - (np.cumsum(self.scored) - self.scored)[row]

        self.row = torch.from_numpy(row).to(device)
        self.place = torch.from_numpy(seen + (length - self.scored)[row]).to(device)
        self.ends = torch.from_numpy(starts + length).to(device).unsqueeze(1)
        self.real = torch.from_numpy(self.is_real).to(device).unsqueeze(1)
        self.positions = self.ends[self.row, 0] - length + self.place + 1
        self.first_scored = self.ends - torch.from_numpy(self.scored).to(device).unsqueeze(1) + 1
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
        count = max(places - int(self.scored[self.is_real].min()), 0)
        first = self.stream.windows.length - places
        probabilities = torch.softmax(logits[:, first : first + count], dim=2)
        return probabilities, self.last_positions(places)[:, :count]

    def score(
        self,
        logits: Tensor,
        lanes: Sequence[int],
        delta: Tensor | None,
        iterations: Tensor,
        fitted: Tensor | None = None,
    ) -> Scored:
        """Score the slices from logits [B, T, V], each row's lane [B] and delta [B, V].

        fitted: positions of the deltas' context targets, where scored ones can be among them.
        """
        before = logits[self.row, self.place]
        after, in_own_loss = before, torch.zeros_like(self.positions, dtype=torch.bool)
        if delta is not None:
            applies = self.is_in_document(self.positions, self.slice_documents[self.row, 0])
            after = torch.where(applies.unsqueeze(1), before + delta[self.row], before)
            if fitted is not None:
                in_own_loss = torch.isin(self.positions, fitted) & applies
        return Scored(
            positions=self.positions,
            windows=_at(self.windows, self.row),
            lanes=_at(np.asarray(lanes), self.row),
            targets=self.stream.tokens[self.positions],
            logits_before=before,
            logits_after=after,
            in_own_loss=in_own_loss,
            num_windows=int(self.is_real.sum()),
            iterations=iterations,
        )


def _at(values: np.ndarray, index: Tensor) -> Tensor:
    return torch.from_numpy(values).to(index.device)[index]


@torch.no_grad()
def score_stream(
    model_logits: ModelLogits,
    tokens: Tensor,
    settings: SlotSettings,
    bos_id: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Scored]:
    """Score every target of `tokens` int64 [n + 1], or this rank's share of them, once.

    Lanes are split in groups of `forward_windows` (scope batch: one) that never meet and always
    have the same shapes; rank r takes groups r, r + world_size, …, so the scores are bitwise the
    same for any number of ranks. Within a lane targets come in order. Raises UserError where the
    stream has fewer than two tokens.
    """
    windows = sliding_windows(len(tokens) - 1, settings.window_tokens, settings.stride_tokens)
    stream = _Stream(tokens, (tokens == bos_id).cumsum(0), windows, bos_id, settings)
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
    lanes = _padded([lane for lane, _ in group], size)
    delta = buffer = None
    for step in range(max(len(run) for _, run in group)):
        windows = [run[step] if step < len(run) else -1 for _, run in group]
        rows = _Rows(stream, _padded(windows, size))
        logits = model_logits(rows.inputs)
        iterations = rows.positions.new_zeros(0)
        if settings.scope == "window":
            if step == 0:
                delta = logits.new_zeros(size, logits.shape[2])
                buffer = _lane_buffer(rows, logits)
            probabilities, positions = buffer.contents() if buffer else rows.context(logits)
            fit = _fit(stream, probabilities, positions, rows.is_context(positions), delta)
            delta, iterations = fit.x, fit.iterations[rows.real.squeeze(1)]
        scored = rows.score(logits, lanes, delta, iterations)
        yield scored
        if buffer and step > 0:
            buffer.write(rows.row, scored.positions, scored.logits_before)


def _score_batches(
    model_logits: ModelLogits, stream: _Stream, lane: int, run: range
) -> Iterator[Scored]:
    """The record's code: one delta for `batch_windows` consecutive windows of the lane.

    These windows overlap, so that one's context is another's scored slice: this leaks.
    """
    settings = stream.settings
    size = min(settings.forward_windows, settings.batch_windows)
    delta = None
    for first in range(0, len(run), settings.batch_windows):
        batch = run[first : first + settings.batch_windows]
        parts = [
            _Rows(stream, _padded(batch[start : start + size], size))
            for start in range(0, len(batch), size)
        ]
        logits = [model_logits(rows.inputs) for rows in parts]
        contexts = [rows.context(part) for rows, part in zip(parts, logits, strict=True)]
        is_context = [
            rows.is_context(positions) for rows, (_, positions) in zip(parts, contexts, strict=True)
        ]
        # One problem whose places are those of all the windows.
        probabilities = torch.cat([part.flatten(0, 1) for part, _ in contexts]).unsqueeze(0)
        positions = torch.cat([part.flatten() for _, part in contexts]).unsqueeze(0)
        counted = torch.cat([part.flatten() for part in is_context]).unsqueeze(0)
        if delta is None:
            delta = probabilities.new_zeros(1, probabilities.shape[2])
        fit = _fit(stream, probabilities, positions, counted, delta)
        delta, iterations = fit.x, fit.iterations
        fitted = positions[counted]
        for rows, part in zip(parts, logits, strict=True):
            yield rows.score(part, [lane] * size, delta.expand(size, -1), iterations, fitted)
            iterations = iterations[:0]


def _padded(values: Sequence[int], size: int) -> list[int]:
    return [*values, *[-1] * (size - len(values))]


def _lane_buffer(rows: _Rows, logits: Tensor) -> ContextBuffer | None:
    """A buffer that each lane's first window fills with its own logits; None where none is kept."""
    stream = rows.stream
    if stream.settings.context_logits != "scored":
        return None
    size, places = len(logits), stream.context_places
    buffer = ContextBuffer(size, places, logits.shape[2], logits.device)
    row = torch.arange(size, device=logits.device).repeat_interleave(places)
    buffer.write(row, rows.last_positions(places).flatten(), logits[:, -places:].flatten(0, 1))
    return buffer


def _fit(
    stream: _Stream, probabilities: Tensor, positions: Tensor, is_context: Tensor, initial: Tensor
) -> Minimum:
    settings = stream.settings
    return fit_delta(
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
