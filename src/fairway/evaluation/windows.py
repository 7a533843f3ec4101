"""Sliding windows over a text, and the lanes that they are dealt to.

A text of n + 1 tokens has n targets; target p (1 <= p <= n) is token p, predicted from the tokens
before it. A window that starts at s reads tokens [s, s + length) and predicts targets
[s + 1, s + length].

A *lane* is a contiguous run of windows. Lanes step side by side, as the rows of one forward pass,
and nothing that one lane learns reaches another. A *segment* is a contiguous run as well, between
two updates of the model, and is cut into lanes of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from fairway.errors import UserError
from fairway.settings import Settings

MOST_LANES = int(np.iinfo(np.int16).max)
"""The column `lane` of tokens.parquet has 16 bits."""


class WindowSettings(Settings):
    """How a text is cut into windows, and the windows into lanes."""

    window_tokens: int = Field(2048, ge=2)
    """Tokens that a window reads."""
    stride_tokens: int = Field(64, ge=1)
    """Targets that a window scores, its last ones; the first window scores all of its targets."""
    lanes: int = Field(32, ge=1, le=MOST_LANES)
    """Contiguous runs of windows; what adapters learn stays in its lane."""
    forward_windows: int = Field(32, ge=1)
    """Windows per forward pass, at most."""

    @model_validator(mode="after")
    def _skips_no_target(self) -> Self:
        if self.stride_tokens > self.window_tokens:
            raise UserError(
                f"evaluation.stride_tokens {self.stride_tokens} is larger than "
                f"evaluation.window_tokens {self.window_tokens}: targets would be skipped; lower "
                "the stride"
            )
        return self


@dataclass(frozen=True)
class Windows:
    """Windows in the order of their targets. All have the same length.

    length: input tokens of each window (the text's n where that is shorter than asked for).
    starts: int64 [windows], index of each window's first input token.
    scored: int64 [windows], how many of its last targets the window scores.
    """

    length: int
    starts: np.ndarray
    scored: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def first_scored(self) -> np.ndarray:
        """int64 [windows]: the first target that each window scores, as an index of the text."""
        return self.starts + self.length - self.scored + 1


def sliding_windows(num_targets: int, window_tokens: int, stride_tokens: int) -> Windows:
    """Windows that score each of `num_targets` targets exactly once, in order.

    The first window scores all its targets, each later one its last `stride_tokens`. The last one
    scores what remains, and is moved back so that it is full and ends where the text ends.
    Raises UserError for an empty text or a stride that is not within the window.
    """
    if not 1 <= stride_tokens <= window_tokens:
        raise UserError(
            f"the stride is {stride_tokens} tokens for windows of {window_tokens}: expected 1 to "
            "the window's length; lower `stride_tokens` or raise `window_tokens`"
        )
    if num_targets < 1:
        raise UserError(
            f"the text has {num_targets} targets: expected at least 2 tokens; use a longer text"
        )
    length = min(window_tokens, num_targets)
    later_windows = -(-(num_targets - length) // stride_tokens)
    ends = length + stride_tokens * np.arange(later_windows + 1, dtype=np.int64)
    ends[-1] = num_targets
    return Windows(length, starts=ends - length, scored=np.diff(ends, prepend=0))


def lane_runs(num_windows: int, lanes: int) -> list[range]:
    """Cut windows 0 … num_windows − 1 into contiguous runs whose lengths differ by at most one.

    There are `lanes` runs, or one for each window where there are fewer windows than lanes.
    """
    lanes = min(lanes, num_windows)
    edges = [num_windows * lane // lanes for lane in range(lanes + 1)] if lanes else [0]
    return [range(first, last) for first, last in zip(edges, edges[1:], strict=False)]


def segments(num_windows: int, after: Sequence[float]) -> list[range]:
    """Windows 0 … num_windows − 1 cut behind each of these ascending shares of them.

    Where a text is too short for that, fewer segments; none is empty.
    """
    edges = [0, *(int(num_windows * share) for share in after), num_windows]
    return [range(*edge) for edge in zip(edges, edges[1:], strict=False) if edge[0] < edge[1]]


def lane_groups(
    windows: range, settings: WindowSettings, alone: bool = False
) -> list[list[tuple[int, range]]]:
    """(lane, its windows) of the lanes that share forward passes; the last group may be smaller.

    windows: a contiguous run, all of which is dealt to the lanes. alone: no two lanes share a pass.
    """
    runs = [
        (lane, windows[run.start : run.stop])
        for lane, run in enumerate(lane_runs(len(windows), settings.lanes))
    ]
    size = 1 if alone else settings.forward_windows
    return [runs[first : first + size] for first in range(0, len(runs), size)]


def lane_steps(runs: Sequence[range], rows: int) -> np.ndarray:
    """int64 [steps, rows]: the k-th window of every run, −1 where there is none."""
    table = np.full((max(len(run) for run in runs), rows), -1)
    for column, run in enumerate(runs):
        table[: len(run), column] = run
    return table


def padded(values: Sequence[int], size: int) -> list[int]:
    """`values` with −1 appended up to `size`."""
    return [*values, *[-1] * (size - len(values))]
