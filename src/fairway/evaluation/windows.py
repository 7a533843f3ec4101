"""Sliding windows over a token stream: which window scores which target, and which lane runs it.

A stream of n + 1 tokens has n targets; target p (1 <= p <= n) is token p, predicted from the
tokens before it. A window that starts at s reads tokens [s, s + length) and predicts targets
[s + 1, s + length].
"""

from dataclasses import dataclass

import numpy as np

from fairway.errors import UserError


@dataclass(frozen=True)
class Windows:
    """Windows in the order of their targets. All have the same length.

    length: input tokens of each window (the stream's n where that is shorter than asked for).
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
        """int64 [windows]: the first target that each window scores, as an index of the stream."""
        return self.starts + self.length - self.scored + 1


def sliding_windows(num_targets: int, window_tokens: int, stride_tokens: int) -> Windows:
    """Windows that score each of `num_targets` targets exactly once, in order.

    The first window scores all its targets, each later one its last `stride_tokens`; the last
    scores what remains and is moved back so that it is full and ends where the stream ends.
    Raises UserError for an empty stream or a stride that is not within the window.
    """
    if not 1 <= stride_tokens <= window_tokens:
        raise UserError(
            f"the stride is {stride_tokens} tokens for windows of {window_tokens}: expected 1 to "
            "the window's length; lower `stride_tokens` or raise `window_tokens`"
        )
    if num_targets < 1:
        raise UserError(
            f"the stream has {num_targets} targets: expected at least 2 tokens; use a longer text"
        )
    length = min(window_tokens, num_targets)
    later_windows = -(-(num_targets - length) // stride_tokens)
    ends = length + stride_tokens * np.arange(later_windows + 1, dtype=np.int64)
    ends[-1] = num_targets
    return Windows(length, starts=ends - length, scored=np.diff(ends, prepend=0))


def lane_runs(num_windows: int, lanes: int) -> list[range]:
    """Cut windows 0 … num_windows − 1 into contiguous runs whose lengths differ by at most one.

    There are `lanes` runs, or one for each window where there are fewer windows than lanes.
    Raises UserError where `lanes` is below 1.
    """
    if lanes < 1:
        raise UserError(f"evaluation.lanes is {lanes}: expected at least 1")
    lanes = min(lanes, num_windows)
    edges = [num_windows * lane // lanes for lane in range(lanes + 1)] if lanes else [0]
    return [range(first, last) for first, last in zip(edges, edges[1:], strict=False)]
