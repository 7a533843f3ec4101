"""The steps of lbfgs.py that know no objective, for a single problem inside a Triton program.

Source: Nocedal & Wright, Numerical Optimization, 2nd edition, algorithm 7.4 and equation 3.59.
"""

import triton
import triton.language as tl

from fairway.adaptation.lbfgs import BRACKET_MARGIN, LARGEST_EXTRAPOLATION

_BRACKET_MARGIN = tl.constexpr(BRACKET_MARGIN)
_LARGEST_EXTRAPOLATION = tl.constexpr(LARGEST_EXTRAPOLATION)


@triton.jit
def choose_trial(mask, yes, no):
    """One of two trials; a trial is (step, value, slope)."""
    return (
        tl.where(mask, yes[0], no[0]),
        tl.where(mask, yes[1], no[1]),
        tl.where(mask, yes[2], no[2]),
    )


@triton.jit
def next_step(before, low, high, new):
    """Interpolate inside the bracket; extrapolate where none is known yet.

    lbfgs.LineSearch._next_step and lbfgs.cubic_minimizer. before: `low` as it was before `new`.
    """
    bracketed = high[0] < float("inf")
    bracket = tl.abs(high[0] - low[0])
    margin = bracket * _BRACKET_MARGIN
    nearest = tl.minimum(low[0], high[0])
    lowest = tl.where(bracketed, nearest + margin, new[0] + 0.01 * (new[0] - before[0]))
    highest = tl.where(bracketed, nearest + bracket - margin, new[0] * _LARGEST_EXTRAPOLATION)

    left = choose_trial(bracketed, low, before)
    right = choose_trial(bracketed, high, new)
    width = right[0] - left[0]
    d1 = left[2] + right[2] - 3 * (left[1] - right[1]) / (left[0] - right[0])
    root = tl.sqrt(d1 * d1 - left[2] * right[2])
    d2 = tl.where(width < 0, -root, root)
    step = right[0] - width * (right[2] + d2 - d1) / (right[2] - left[2] + 2 * d2)
    step = tl.where(tl.abs(step) < float("inf"), step, (lowest + highest) / 2)
    return tl.minimum(tl.maximum(step, lowest), highest)


@triton.jit
def descent_direction(
    gradient, steps, changes, curvatures, scale, pushed,
    V: tl.constexpr, HISTORY: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """-H g by the two-loop recursion over the pairs kept in memory, the newest pair first.

    curvatures: [BLOCK_H], s . y of each place of the ring. pushed: pairs that were ever kept.
    """
    columns = tl.arange(0, BLOCK_V)
    inside = columns < V
    slots = tl.arange(0, BLOCK_H)
    pairs = tl.minimum(pushed, HISTORY)
    alphas = tl.zeros([BLOCK_H], tl.float32)
    remainder = gradient
    for age in range(0, pairs):
        slot = (pushed - 1 - age) % HISTORY
        step = tl.load(steps + slot * V + columns, mask=inside, other=0.0)
        change = tl.load(changes + slot * V + columns, mask=inside, other=0.0)
        curvature = tl.sum(tl.where(slots == slot, curvatures, 0.0))
        alpha = tl.sum(step * remainder) / curvature
        alphas = tl.where(slots == slot, alpha, alphas)
        remainder -= alpha * change
    remainder *= scale
    for index in range(0, pairs):
        slot = (pushed - pairs + index) % HISTORY
        step = tl.load(steps + slot * V + columns, mask=inside, other=0.0)
        change = tl.load(changes + slot * V + columns, mask=inside, other=0.0)
        curvature = tl.sum(tl.where(slots == slot, curvatures, 0.0))
        alpha = tl.sum(tl.where(slots == slot, alphas, 0.0))
        remainder += (alpha - tl.sum(change * remainder) / curvature) * step
    return -remainder
