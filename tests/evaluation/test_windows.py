"""Sliding windows score every target once, in order, and lanes share them out evenly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.errors import UserError
from fairway.evaluation.windows import WindowSettings, lane_runs, sliding_windows
from fairway.settings import validated


def scored_targets(windows) -> np.ndarray:
    parts = [
        np.arange(first, first + count)
        for first, count in zip(windows.first_scored, windows.scored, strict=True)
    ]
    return np.concatenate(parts)


geometry = st.tuples(st.integers(1, 300), st.integers(1, 64), st.integers(1, 64)).filter(
    lambda sizes: sizes[2] <= sizes[1]
)


@given(geometry)
def test_every_target_is_scored_exactly_once_and_in_order(sizes):
    num_targets, window_tokens, stride_tokens = sizes
    windows = sliding_windows(num_targets, window_tokens, stride_tokens)
    assert np.array_equal(scored_targets(windows), np.arange(1, num_targets + 1))


@given(geometry)
def test_windows_lie_in_the_text_and_only_the_first_scores_more_than_a_stride(sizes):
    num_targets, window_tokens, stride_tokens = sizes
    windows = sliding_windows(num_targets, window_tokens, stride_tokens)
    assert windows.length == min(window_tokens, num_targets)
    assert windows.starts[0] == 0
    assert windows.starts[-1] + windows.length == num_targets
    assert windows.scored[0] == windows.length
    assert np.all(windows.scored[1:-1] == stride_tokens)
    assert np.all(windows.scored[1:] >= 1) and np.all(windows.scored[1:] <= stride_tokens)


def test_the_reference_submissions_geometry():
    windows = sliding_windows(num_targets=2048 + 3 * 64 + 10, window_tokens=2048, stride_tokens=64)
    assert windows.starts.tolist() == [0, 64, 128, 192, 202]
    assert windows.scored.tolist() == [2048, 64, 64, 64, 10]


def test_a_text_shorter_than_a_window_is_one_short_window():
    windows = sliding_windows(num_targets=5, window_tokens=16, stride_tokens=4)
    assert (windows.length, windows.starts.tolist(), windows.scored.tolist()) == (5, [0], [5])


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_outside_the_window_is_refused(stride):
    with pytest.raises(UserError, match="stride_tokens"):
        sliding_windows(num_targets=100, window_tokens=8, stride_tokens=stride)


def test_an_empty_text_is_refused():
    with pytest.raises(UserError, match="0 targets"):
        sliding_windows(num_targets=0, window_tokens=8, stride_tokens=4)


@given(st.integers(0, 500), st.integers(1, 40))
def test_lane_runs_are_contiguous_balanced_and_complete(num_windows, lanes):
    runs = lane_runs(num_windows, lanes)
    assert [window for run in runs for window in run] == list(range(num_windows))
    assert len(runs) == min(lanes, num_windows)
    lengths = [len(run) for run in runs]
    assert not lengths or (min(lengths) >= 1 and max(lengths) - min(lengths) <= 1)


def test_no_lane_is_refused():
    with pytest.raises(UserError, match=r"evaluation\.lanes: found 0, expected at least 1"):
        validated(WindowSettings, {"lanes": 0}, "evaluation")
