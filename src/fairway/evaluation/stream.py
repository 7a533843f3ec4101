"""A token stream cut in sliding windows, and the windows in lanes that step side by side.

A lane is a contiguous run of windows. Step k of a group of lanes scores the k-th window of each in
one forward pass, as its rows. Lanes share a pass only as rows: whatever is learned from a lane's
targets stays in that lane.

Shape suffixes: B rows of a forward pass, T tokens of a window, F first place whose logits are
needed, V vocabulary, m scored targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fairway.config import check_evaluation
from fairway.errors import UserError
from fairway.evaluation.windows import Windows, lane_runs, sliding_windows

ModelLogits = Callable[[Tensor, int], Tensor]
"""tokens int64 [B, T], first place F -> logits float32 [B, T − F, V] of the places from F on."""

MOST_LANES = np.iinfo(np.int16).max  # the width of the lane column in tokens.parquet


@dataclass(frozen=True)
class EvaluationSettings:
    """The config section `evaluation`."""

    adapters: Sequence[str]
    """What changes the distributions as it learns, in order; none for a plain sliding window."""
    window_tokens: int
    stride_tokens: int
    lanes: int
    forward_windows: int
    """Rows of a forward pass, at most."""

    def __post_init__(self) -> None:
        for key in ("stride_tokens", "lanes", "forward_windows"):
            if getattr(self, key) < 1:
                raise UserError(f"evaluation.{key} is {getattr(self, key)}: expected at least 1")
        if self.lanes > MOST_LANES:
            raise UserError(f"evaluation.lanes is {self.lanes}: expected at most {MOST_LANES}")
        check_evaluation(asdict(self))


@dataclass(frozen=True)
class Stream:
    """The tokens int64 [n + 1] and how they are cut."""

    tokens: Tensor
    windows: Windows
    bos_id: int
    stride_tokens: int

    @cached_property
    def documents(self) -> Tensor:
        """int64 [n + 1]: BOS tokens up to and with each place, so a document's number."""
        return (self.tokens == self.bos_id).cumsum(0)

    @cached_property
    def starts(self) -> Tensor:
        """int64 [windows + 1], each window's start, on the tokens' device; the last is padding."""
        return on_device(np.append(self.windows.starts, 0), self.tokens.device)

    @cached_property
    def scored(self) -> Tensor:
        """int64 [windows + 1], how many targets each window scores; padding, the last, none."""
        return on_device(np.append(self.windows.scored, 0), self.tokens.device)

    def in_document(self, positions: Tensor, documents: Tensor) -> Tensor:
        """Which targets are predicted from inside `documents`; a BOS is, from the one it ends."""
        return self.documents[(positions - 1).clamp(min=0)] == documents


class Rows:
    """The windows of one forward pass; windows [B] of −1 are padding, which scores nothing.

    Padding keeps the shape, and so the arithmetic of every row, the same from step to step.
    step: how many passes its lanes have had before. first_place: F, the first place whose logits
    are needed; it follows from the windows alone, never from their tokens, since it changes the
    shapes. row, place: int64 [m], the row and place of each scored target. positions: int64 [m],
    their indices in the stream. real: bool [B, 1]. real_rows: int64, the rows that are not padding.
    ends: int64 [B, 1], each window's last target. first_scored: int64 [B, 1], its first scored one,
    and slice_documents [B, 1] the document that this is predicted from.
    """

    def __init__(
        self, stream: Stream, step: int, windows: np.ndarray, index: Tensor, needed_places: int
    ):
        """windows: int64 [B] on the host. index: the same on the device, so that nothing waits.

        needed_places: the last places of a window whose logits are needed, beside scored ones.
        """
        length = stream.windows.length
        counts = stream.windows.scored[windows[windows >= 0]]
        self.stream, self.step, self.index = stream, step, index
        self.num_windows, self.num_scored = len(counts), int(counts.sum())
        self.fewest_scored = int(counts.min())
        # The stream's last window may score less than a stride; its shapes are those of the others.
        places = max(int(counts.max()), stream.stride_tokens, needed_places)
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
        self.inputs = self.last_inputs(length)

    @property
    def targets(self) -> Tensor:
        """int64 [m]: the scored tokens."""
        return self.stream.tokens[self.positions]

    @property
    def in_slice_document(self) -> Tensor:
        """bool [m]: which scored targets belong to the document that their slice begins in."""
        return self.stream.in_document(self.positions, self.slice_documents[self.row, 0])

    def last_positions(self, count: int) -> Tensor:
        """int64 [B, count]: the last targets of each window."""
        return self.ends + torch.arange(1 - count, 1, device=self.ends.device)

    def last_inputs(self, count: int) -> Tensor:
        """int64 [B, count]: the last input tokens of each window; padding reads BOS."""
        inputs = self.stream.tokens[(self.last_positions(count) - 1).clamp(min=0)]
        return torch.where(self.real, inputs, self.stream.bos_id)

    def at_scored(self, logits: Tensor) -> Tensor:
        """The scored targets' logits [m, V] out of a pass's [B, T − F, V]."""
        return logits[self.row, self.place - self.first_place]


def cut_stream(tokens: Tensor, settings: EvaluationSettings, bos_id: int) -> Stream:
    """Raises UserError where the stream has fewer than two tokens."""
    windows = sliding_windows(len(tokens) - 1, settings.window_tokens, settings.stride_tokens)
    return Stream(tokens, windows, bos_id, settings.stride_tokens)


def lane_groups(
    num_windows: int, settings: EvaluationSettings, alone: bool = False
) -> list[list[tuple[int, range]]]:
    """(lane, its windows) of the lanes that share forward passes; the last group may be smaller.

    alone: no two lanes share one.
    """
    runs = list(enumerate(lane_runs(num_windows, settings.lanes)))
    size = 1 if alone else settings.forward_windows
    return [runs[first : first + size] for first in range(0, len(runs), size)]


def lane_steps(runs: Sequence[range], size: int) -> np.ndarray:
    """int64 [steps, size]: the k-th window of every run, −1 where there is none."""
    table = np.full((max(len(run) for run in runs), size), -1)
    for column, run in enumerate(runs):
        table[: len(run), column] = run
    return table


def padded(values: Sequence[int], size: int) -> list[int]:
    """`values` with −1 appended up to `size`."""
    return [*values, *[-1] * (size - len(values))]


def on_device(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """int64 on `device`."""
    return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)


@dataclass(frozen=True)
class Scored:
    """What one forward pass scored, in the order of its rows. Everything is on the tokens' device.

    positions, windows, lanes: int64 [m]; the target's index in the stream, its window, its lane.
    targets: int64 [m], the tokens there.
    logits: float32 [m, V] each: the model's own, then those after each adapter in turn.
    in_own_loss: bool [m], whether the target was fitted to by the very delta that scored it.
    num_windows: windows that this pass finished.
    iterations: int64 [fits], L-BFGS iterations of the fits since the last record.
    """

    positions: Tensor
    windows: Tensor
    lanes: Tensor
    targets: Tensor
    logits: tuple[Tensor, ...]
    in_own_loss: Tensor
    num_windows: int
    iterations: Tensor

    @property
    def logits_after(self) -> Tensor:
        """Those that count, float32 [m, V]."""
        return self.logits[-1]


def score(
    rows: Rows,
    lanes: Tensor,
    logits: Sequence[Tensor],
    iterations: Tensor,
    in_own_loss: Tensor | None = None,
) -> Scored:
    """The record of `rows`, whose rows are of `lanes` int64 [B]; other arguments as in Scored."""
    if in_own_loss is None:
        in_own_loss = torch.zeros_like(rows.positions, dtype=torch.bool)
    return Scored(
        positions=rows.positions,
        windows=rows.index[rows.row],
        lanes=lanes[rows.row],
        targets=rows.targets,
        logits=tuple(logits),
        in_own_loss=in_own_loss,
        num_windows=rows.num_windows,
        iterations=iterations,
    )
