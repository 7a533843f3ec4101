"""The steps of lbfgs.py that know no objective, for a single problem inside a Triton program.

Sources: Nocedal & Wright, Numerical Optimization, 2nd edition, equation 3.59; Byrd, Nocedal &
Schnabel (1994).
"""

import triton
import triton.language as tl

from fairway.evaluation.adapters.fit.lbfgs import BRACKET_MARGIN, LARGEST_EXTRAPOLATION

_BRACKET_MARGIN = tl.constexpr(BRACKET_MARGIN)
_LARGEST_EXTRAPOLATION = tl.constexpr(LARGEST_EXTRAPOLATION)
# What a program reads at a time: 16 vectors of 1,024, which take 64 registers of each thread.
GROUP_NUMBERS = tl.constexpr(2**14)


@triton.jit
def choose_trial(mask, yes, no):
    """One of two trials; a trial is (step, value, slope)."""
    return (
        tl.where(mask, yes[0], no[0]),
        tl.where(mask, yes[1], no[1]),
        tl.where(mask, yes[2], no[2]),
    )


@triton.jit
def load_trial(numbers):
    """The trial in three numbers."""
    return tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)


@triton.jit
def store_trial(numbers, trial):
    """Keep a trial as three numbers."""
    tl.store(numbers, trial[0])
    tl.store(numbers + 1, trial[1])
    tl.store(numbers + 2, trial[2])


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
def _load_group(vectors, group, pairs, V: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """Vectors `group` GROUP and on, [GROUP, BLOCK_V] with zeros from the vector `pairs` on."""
    columns = tl.arange(0, BLOCK_V)
    slots = group * GROUP + tl.arange(0, GROUP)
    mask = (slots < pairs)[:, None] & (columns < V)[None, :]
    return tl.load(vectors + slots[:, None] * V + columns[None, :], mask=mask, other=0.0)


@triton.jit
def history_times(
    vectors, right, pairs, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Inner products [BLOCK_H] of the history's first `pairs` vectors with `right` [BLOCK_V]."""
    GROUP: tl.constexpr = max(1, min(BLOCK_H // 2, GROUP_NUMBERS // BLOCK_V))
    groups = tl.arange(0, BLOCK_H // GROUP)[:, None]
    products = tl.zeros([BLOCK_H // GROUP, GROUP], tl.float32)
    for group in range(0, tl.cdiv(pairs, GROUP)):
        kept = _load_group(vectors, group, pairs, V, BLOCK_V, GROUP)
        found = tl.sum(kept * right[None, :], axis=1)
        products = tl.where(groups == group, found[None, :], products)
    return tl.reshape(products, [BLOCK_H])


@triton.jit
def times_history(
    left, vectors, pairs, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr
):
    """The sum [BLOCK_V] of the history's first `pairs` vectors, weighted with `left` [BLOCK_H]."""
    GROUP: tl.constexpr = max(1, min(BLOCK_H // 2, GROUP_NUMBERS // BLOCK_V))
    groups = tl.arange(0, BLOCK_H // GROUP)[:, None]
    weights = tl.reshape(left, [BLOCK_H // GROUP, GROUP])
    total = tl.zeros([BLOCK_V], tl.float32)
    for group in range(0, tl.cdiv(pairs, GROUP)):
        kept = _load_group(vectors, group, pairs, V, BLOCK_V, GROUP)
        weight = tl.sum(tl.where(groups == group, weights, 0.0), axis=0)
        total += tl.sum(weight[:, None] * kept, axis=0)
    return total


@triton.jit
def extend_inverse(inverse, products, curvature, slot, BLOCK_H: tl.constexpr):
    """The inverse of lbfgs.History's triangle R once the pair in `slot` is a new one.

    inverse: [BLOCK_H, BLOCK_H] in the ring's order, zero where there is no pair. products:
    [BLOCK_H], s_i . y of the new change y. The oldest pair, which the new one overwrites, leaves
    the inverse of the others as it was; a new last column (r, d) of R is (-R^-1 r, 1) / d there.
    """
    is_other = tl.arange(0, BLOCK_H) != slot
    inverse = tl.where(is_other[:, None] & is_other[None, :], inverse, 0.0)
    column = tl.where(is_other, -tl.sum(inverse * products[None, :], axis=1), 1.0) / curvature
    return tl.where(is_other[None, :], inverse, column[:, None])


@triton.jit
def descent_direction(
    gradient, steps, changes, inverse, curvatures, scale, pairs,
    V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """-H g [BLOCK_V], as lbfgs.History.descent_direction has it, with the inverse of R at hand.

    steps, changes: the ring, with `pairs` entries taken. inverse: [BLOCK_H, BLOCK_H],
    as `extend_inverse` keeps it. curvatures: [BLOCK_H], s . y of each pair.
    """
    products = history_times(steps, gradient, pairs, V, BLOCK_V, BLOCK_H)
    alphas = tl.sum(inverse * products[None, :], axis=1)
    spent = times_history(alphas, changes, pairs, V, BLOCK_V, BLOCK_H)
    remainder = scale * (gradient - spent)
    right = curvatures * alphas - history_times(changes, remainder, pairs, V, BLOCK_V, BLOCK_H)
    corrections = tl.sum(inverse * right[:, None], axis=0)
    return -remainder - times_history(corrections, steps, pairs, V, BLOCK_V, BLOCK_H)
