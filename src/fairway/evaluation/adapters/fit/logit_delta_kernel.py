"""The fit of logit_delta.py as Triton kernels: two small ones for each evaluation of all rows.

The first spreads every row over programs of consecutive positions; each writes its part of
the loss and of the gradient. The second, one program a row, adds the parts up in their order and
moves the row's fit on by one step of lbfgs.py's state machine, up to the next point to try. Both
are launched as often as a fit may evaluate, without waiting for the host to look at anything;
rows that have finished leave at once. A row's programs depend on the number of its positions alone
and read nothing of another row, so rows are independent to the bit by construction.

The algorithm is that of lbfgs.py, written for a single problem, with the inverse of the history's
triangle in place of the triangular systems (the same direction in exact arithmetic).

An evaluation streams the row's probabilities once: a tile of positions serves both for its sums
sum_u q_u exp(delta_u) and for the gradient. Many rows at once take the time of reading the
probabilities, and they are kept in half precision. In units of 2^-15 every probability above
2e-9 has 11 significant bits there. Relative errors of up to 2^-12 in the q move a fitted entry by
about as much, in nats, at most, and the loss, flat at its minimum, by the order of their square.

A single row takes the time of its programs' instructions, and of their warps' waiting for one
another. So a tile lies in the registers such that up to 1,024 tokens a warp holds its positions
whole: a position's sum stays inside the warp, and every warp adds up a gradient (`expected`) of
its own positions, which meets the other warps' once a program. For that a position is folded into
chunks of COLUMNS tokens, as many as a warp reads at once in pieces of 16 bytes.

Sources: Nocedal & Wright, Numerical Optimization, 2nd edition, algorithms 3.5, 3.6 and 7.5.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairway.evaluation.adapters.fit.lbfgs import CURVATURE, SUFFICIENT_DECREASE, Minimum
from fairway.evaluation.adapters.fit.lbfgs_kernel import (
    GROUP_NUMBERS,
    choose_trial,
    descent_direction,
    extend_inverse,
    history_times,
    load_trial,
    next_step,
    store_trial,
)
from fairway.evaluation.adapters.fit.slot_objective import (
    MAX_LINE_SEARCH_STEPS,
    TOLERANCE_CHANGE,
    TOLERANCE_GRADIENT,
    loss_terms,
    max_evaluations,
)

ADVANCE_WARPS = 8
NUM_STAGES = 4  # one more than there are tiles in shared memory
MAX_CHUNKS = 4  # of a position in a lane's registers


class Tiling(NamedTuple):
    """How a row's evaluation is spread over programs, warps and lanes."""

    positions: int = 64
    """Of one program. A row of 2,048 takes 32 programs, and the parts of the gradient that they
    write and read again, in float32, are a sixteenth of the probabilities."""
    warps: int = 8
    """Of one program."""
    lane_columns: int = 8
    """Tokens that a lane reads at once: half-precision numbers in 16 bytes."""

    def tile(self, block_vocabulary: int) -> tuple[int, int]:
        """Positions of a tile, and the columns of each of their chunks.

        A warp has one position at a time: more leave too few registers for their gradients. Long
        vocabularies spread a position over several warps. Their vectors take more registers too.
        """
        warp_columns = 32 * self.lane_columns
        columns = max(min(warp_columns, block_vocabulary), block_vocabulary // MAX_CHUNKS)
        return max(1, self.warps * warp_columns // columns), columns


DEFAULT_TILING = Tiling()
UNITS_PER_ONE = 2.0**15  # float16 ends at 65504

_UNIT = tl.constexpr(1 / UNITS_PER_ONE)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_EPSILON = tl.constexpr(torch.finfo(torch.float32).eps)
_SUFFICIENT_DECREASE = tl.constexpr(SUFFICIENT_DECREASE)
_CURVATURE = tl.constexpr(CURVATURE)
_TOLERANCE_GRADIENT = tl.constexpr(TOLERANCE_GRADIENT)
_TOLERANCE_CHANGE = tl.constexpr(TOLERANCE_CHANGE)
_MAX_LINE_SEARCH_STEPS = tl.constexpr(MAX_LINE_SEARCH_STEPS)

# A row's vectors between two launches.
_TRIAL, _X, _DIRECTION, _GRADIENT, _LOW_GRADIENT, _VECTORS = (tl.constexpr(n) for n in range(6))
# Its numbers, those of lbfgs.minimize and lbfgs.LineSearch; PUSHED counts the pairs ever kept.
_FINISHED, _ITERATIONS, _EVALUATIONS, _PUSHED, _TRIALS = (tl.constexpr(n) for n in range(5))
_VALUE, _SLOPE, _FARTHEST, _SCALE, _STEP = (tl.constexpr(n) for n in range(5, 10))
_LOW, _HIGH, _NUMBERS = tl.constexpr(10), tl.constexpr(13), tl.constexpr(16)


def compact(probabilities: Tensor) -> Tensor:
    """float32 [..., V] -> float16 [..., V] in units of 2^-15."""
    return (probabilities * UNITS_PER_ONE).half()


def compact_softmax(logits: Tensor) -> Tensor:
    """compact(softmax(logits)) of float32 [m, V] or [B, P, V], whose last dimension is dense."""
    assert logits.stride(-1) == 1 and logits.ndim in (2, 3)
    positions, vocabulary = logits.shape[-2:]
    compacted = torch.empty(logits.shape, dtype=torch.float16, device=logits.device)
    if compacted.numel():
        _compact_softmax_kernel[(compacted.numel() // vocabulary,)](
            logits,
            compacted,
            positions,
            logits.stride(0) if logits.ndim == 3 else 0,
            logits.stride(-2),
            vocabulary,
            BLOCK_V=triton.next_power_of_2(vocabulary),
            num_warps=4,
        )
    return compacted


def fit_delta(
    probabilities: Tensor,
    targets: Tensor,
    is_context: Tensor,
    initial: Tensor,
    *,
    l2: float,
    clamp: float,
    iterations: int,
    history: int,
    most_evaluations: int | None = None,
    tiling: Tiling = DEFAULT_TILING,
) -> Minimum:
    """As `logit_delta.fit_delta`; `probabilities` also as `compact` makes them."""
    if probabilities.dtype != torch.float16:
        probabilities = compact(probabilities)
    probabilities = probabilities.contiguous()
    rows, num_positions, vocabulary = probabilities.shape
    block_vocabulary = triton.next_power_of_2(vocabulary)
    block_history = triton.next_power_of_2(history)
    tile_positions, columns = tiling.tile(block_vocabulary)
    positions = max(tiling.positions, tile_positions)
    num_parts = max(1, triton.cdiv(num_positions, positions))
    share, wanted, ridge = loss_terms(targets, is_context, initial, l2)

    vectors = initial.new_empty(rows, _VECTORS.value, vocabulary)
    has_context = is_context.any(dim=1, keepdim=True)
    vectors[:, _TRIAL.value] = torch.where(has_context, initial, 0.0)
    numbers = initial.new_zeros(rows, _NUMBERS.value)
    ring = initial.new_empty(rows, 2, history, vocabulary)
    triangles = initial.new_zeros(rows, 1 + block_history, block_history)
    # Zeros, for a program without a counted position writes no part.
    parts = initial.new_zeros(rows, num_parts, vocabulary)
    losses = initial.new_zeros(rows, num_parts)
    sizes = dict(V=vocabulary, BLOCK_V=block_vocabulary)
    terms = parts, losses, wanted, ridge, num_parts
    most = most_evaluations or max_evaluations(iterations)

    def evaluate() -> None:
        _evaluate_kernel[(rows, num_parts)](
            vectors, numbers, probabilities, share, parts, losses, num_positions,
            POSITIONS=positions, BLOCK_P=tile_positions, COLUMNS=columns, STAGES=NUM_STAGES,
            num_warps=tiling.warps, **sizes,
        )  # fmt: skip

    evaluate()
    _start_kernel[(rows,)](vectors, numbers, *terms, num_warps=ADVANCE_WARPS, **sizes)
    for _ in range(1, most):
        evaluate()
        _advance_kernel[(rows,)](
            vectors, numbers, ring, triangles, *terms, iterations, most,
            HISTORY=history, BLOCK_H=block_history, num_warps=ADVANCE_WARPS, **sizes,
        )  # fmt: skip
    return Minimum(
        vectors[:, _X.value].clamp(-clamp, clamp),
        numbers[:, _VALUE.value],
        numbers[:, _ITERATIONS.value].long(),
        numbers[:, _EVALUATIONS.value].long(),
    )


@triton.jit
def _compact_softmax_kernel(
    logits, compacted, num_positions, row_stride, position_stride, vocabulary, BLOCK_V: tl.constexpr
):
    """One position of a row: softmax in float32, stored in units of 2^-15 as float16."""
    index = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_V)
    inside = columns < vocabulary
    source = logits + index // num_positions * row_stride + index % num_positions * position_stride
    values = tl.load(source + columns, mask=inside, other=-float("inf"))
    growth = tl.exp(values - tl.max(values))
    scaled = growth * (1 / (tl.sum(growth) * _UNIT))
    tl.store(compacted + index * vocabulary + columns, scaled.to(tl.float16), mask=inside)


@triton.jit
def _evaluate_kernel(
    vectors, numbers, probabilities, share, parts, losses, num_positions,
    V: tl.constexpr, BLOCK_V: tl.constexpr, POSITIONS: tl.constexpr, BLOCK_P: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A row's loss and gradient at its trial, over some positions and without wanted and ridge."""
    row = tl.program_id(0).to(tl.int64)
    # First of all, for most launches meet some rows that have finished.
    if tl.load(numbers + row * _NUMBERS + _FINISHED) != 0:
        return
    first = tl.program_id(1) * POSITIONS
    part = row * tl.num_programs(1) + tl.program_id(1)
    share += row * num_positions
    probabilities += row * num_positions * V
    columns = tl.arange(0, BLOCK_V)
    inside = columns < V
    trial = tl.load(vectors + (row * _VECTORS + _TRIAL) * V + columns, mask=inside, other=0.0)
    positions = first + tl.arange(0, POSITIONS)
    counted = tl.load(share + positions, mask=positions < num_positions, other=0.0)
    if tl.max(counted) == 0:
        return

    CHUNKS: tl.constexpr = BLOCK_V // COLUMNS
    growth = tl.exp(trial) * _UNIT
    growths = tl.reshape(growth, [CHUNKS, COLUMNS])[:, None, :]
    lost = tl.zeros([BLOCK_P], tl.float32)
    expected = tl.zeros([CHUNKS, BLOCK_P, COLUMNS], tl.float32)
    for index in tl.range(0, POSITIONS // BLOCK_P, num_stages=STAGES):
        weight, tile = _load_tile(
            probabilities,
            share,
            first + index * BLOCK_P,
            num_positions,
            V,
            BLOCK_V,
            BLOCK_P,
            COLUMNS,
        )
        tile = tile.to(tl.float32)
        total = tl.sum(tl.sum(tile * growths, axis=0), axis=1)
        # Not tl.maximum: what is not a number must stay so, or a wild trial would look good.
        total = tl.where(total < _TINY, _TINY, total)
        lost += weight * tl.log(total)
        expected += tile * (weight / total)[None, :, None]
    gradient = tl.reshape(tl.sum(expected, axis=1), [BLOCK_V]) * growth
    tl.store(parts + part * V + columns, gradient, mask=inside)
    tl.store(losses + part, tl.sum(lost))


@triton.jit
def _load_tile(
    probabilities, share, first, num_positions, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_P] and probabilities [BLOCK_V / COLUMNS, BLOCK_P, COLUMNS] from `first` on."""
    positions = first + tl.arange(0, BLOCK_P)
    weight = tl.load(share + positions, mask=positions < num_positions, other=0.0)
    # Chunk by chunk as a matrix, whose layout is the same in every version of Triton: a line's
    # columns along a warp, the lines in turn to the warps, so that a position's chunks meet in one.
    lines = tl.arange(0, BLOCK_V // COLUMNS * BLOCK_P)
    positions = first + lines % BLOCK_P
    columns = (lines // BLOCK_P * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    mask = (positions < num_positions)[:, None]
    if V < BLOCK_V:
        mask = mask & (columns < V)
    tile = tl.load(probabilities + positions[:, None] * V + columns, mask=mask, other=0.0)
    tile = tl.reshape(tile, [BLOCK_V // COLUMNS, BLOCK_P, COLUMNS])
    return weight, tile


@triton.jit
def _value_and_gradient(
    trial, row, parts, losses, wanted, ridge, num_parts, V: tl.constexpr, BLOCK_V: tl.constexpr
):
    """What the row's programs made of `trial` [BLOCK_V], added up, with the terms they left out."""
    GROUP: tl.constexpr = max(1, GROUP_NUMBERS // BLOCK_V)
    columns = tl.arange(0, BLOCK_V)
    inside = columns < V
    wanted = tl.load(wanted + row * V + columns, mask=inside, other=0.0)
    ridge = tl.load(ridge + row)
    lost = tl.zeros([GROUP], tl.float32)
    gradient = tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, num_parts, GROUP):
        group = first + tl.arange(0, GROUP)
        part = row * num_parts + group
        lost += tl.load(losses + part, mask=group < num_parts, other=0.0)
        mask = (group < num_parts)[:, None] & inside[None, :]
        found = tl.load(parts + part[:, None] * V + columns[None, :], mask=mask, other=0.0)
        gradient += tl.sum(found, axis=0)
    value = tl.sum(lost) + tl.sum((ridge / 2 * trial - wanted) * trial)
    return value, gradient - wanted + ridge * trial


@triton.jit
def _begin_search(
    vectors, numbers, x, value, gradient, direction, slope, step,
    V: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """lbfgs.LineSearch.begin, and its first point to try."""
    columns = tl.arange(0, BLOCK_V)
    inside = columns < V
    tl.store(vectors + _X * V + columns, x, mask=inside)
    tl.store(vectors + _GRADIENT * V + columns, gradient, mask=inside)
    tl.store(vectors + _LOW_GRADIENT * V + columns, gradient, mask=inside)
    tl.store(vectors + _DIRECTION * V + columns, direction, mask=inside)
    tl.store(vectors + _TRIAL * V + columns, x + step * direction, mask=inside)
    tl.store(numbers + _VALUE, value)
    tl.store(numbers + _SLOPE, slope)
    tl.store(numbers + _FARTHEST, tl.max(tl.abs(direction)))
    tl.store(numbers + _STEP, step)
    tl.store(numbers + _TRIALS, 0.0)
    store_trial(numbers + _LOW, (0.0, value, slope))
    store_trial(numbers + _HIGH, (float("inf"), value, slope))


@triton.jit
def _start_kernel(
    vectors, numbers, parts, losses, wanted, ridge, num_parts,
    V: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What lbfgs.minimize makes of the evaluation at a row's start."""
    row = tl.program_id(0).to(tl.int64)
    vectors += row * _VECTORS * V
    numbers += row * _NUMBERS
    columns = tl.arange(0, BLOCK_V)
    x = tl.load(vectors + _TRIAL * V + columns, mask=columns < V, other=0.0)
    value, gradient = _value_and_gradient(
        x, row, parts, losses, wanted, ridge, num_parts, V, BLOCK_V
    )
    # A gradient says nothing about distance, so the very first step is a short one.
    step = tl.minimum(1.0 / tl.sum(tl.abs(gradient)), 1.0)
    slope = -tl.sum(gradient * gradient)
    _begin_search(vectors, numbers, x, value, gradient, -gradient, slope, step, V, BLOCK_V)
    active = tl.max(tl.abs(gradient)) > _TOLERANCE_GRADIENT
    tl.store(numbers + _FINISHED, tl.where(active, 0.0, 1.0))
    tl.store(numbers + _EVALUATIONS, 1.0)
    tl.store(numbers + _SCALE, 1.0)


@triton.jit
def _advance_kernel(
    vectors, numbers, ring, triangles, parts, losses, wanted, ridge, num_parts,
    max_iterations, max_evaluations,
    V: tl.constexpr, HISTORY: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One turn of lbfgs.minimize for the row of this program."""
    row = tl.program_id(0).to(tl.int64)
    vectors += row * _VECTORS * V
    numbers += row * _NUMBERS
    if tl.load(numbers + _FINISHED) != 0:
        return
    columns = tl.arange(0, BLOCK_V)
    inside = columns < V
    trial = tl.load(vectors + _TRIAL * V + columns, mask=inside, other=0.0)
    x = tl.load(vectors + _X * V + columns, mask=inside, other=0.0)
    direction = tl.load(vectors + _DIRECTION * V + columns, mask=inside, other=0.0)
    low_gradient = tl.load(vectors + _LOW_GRADIENT * V + columns, mask=inside, other=0.0)
    value = tl.load(numbers + _VALUE)
    slope = tl.load(numbers + _SLOPE)
    step = tl.load(numbers + _STEP)
    low, high = load_trial(numbers + _LOW), load_trial(numbers + _HIGH)
    trials = tl.load(numbers + _TRIALS) + 1
    evaluations = tl.load(numbers + _EVALUATIONS) + 1
    farthest = tl.load(numbers + _FARTHEST)

    new_value, new_gradient = _value_and_gradient(
        trial, row, parts, losses, wanted, ridge, num_parts, V, BLOCK_V
    )
    before, new = low, (step, new_value, tl.sum(new_gradient * direction))
    accepted, lower, low, high = _updated_bracket(value, slope, trials, low, high, new)
    low_gradient = tl.where(lower, new_gradient, low_gradient)

    tl.store(numbers + _EVALUATIONS, evaluations)
    is_narrow = tl.abs(high[0] - low[0]) * farthest < _TOLERANCE_CHANGE
    is_last = evaluations >= max_evaluations
    if (accepted | is_narrow | is_last | (trials >= _MAX_LINE_SEARCH_STEPS)) == 0:
        step = next_step(before, low, high, new)
        tl.store(vectors + _TRIAL * V + columns, x + step * direction, mask=inside)
        tl.store(vectors + _LOW_GRADIENT * V + columns, low_gradient, mask=inside)
        tl.store(numbers + _STEP, step)
        tl.store(numbers + _TRIALS, trials)
        store_trial(numbers + _LOW, low)
        store_trial(numbers + _HIGH, high)
        return

    gradient = tl.load(vectors + _GRADIENT * V + columns, mask=inside, other=0.0)
    moved = low[0] * direction
    decrease = value - low[1]
    iterations = tl.load(numbers + _ITERATIONS) + 1
    direction = _next_direction(
        numbers, ring + row * 2 * HISTORY * V, triangles + row * (1 + BLOCK_H) * BLOCK_H,
        moved, low_gradient - gradient, low_gradient, V, HISTORY, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    slope = tl.sum(low_gradient * direction)
    active = (
        (tl.max(tl.abs(low_gradient)) > _TOLERANCE_GRADIENT)
        & (tl.max(tl.abs(moved)) > _TOLERANCE_CHANGE)
        & (tl.abs(decrease) >= _TOLERANCE_CHANGE)
        & (slope < -_TOLERANCE_CHANGE)
        & (iterations < max_iterations)
        & (is_last == 0)
    )
    _begin_search(
        vectors, numbers, x + moved, low[1], low_gradient, direction, slope, 1.0, V, BLOCK_V
    )
    tl.store(numbers + _ITERATIONS, iterations)
    tl.store(numbers + _FINISHED, tl.where(active, 0.0, 1.0))


@triton.jit
def _updated_bracket(value, slope, trials, low, high, new):
    """lbfgs.LineSearch.update of a search from `value` and `slope`.

    Returns whether the trial `new` is accepted, whether it is the new low end, and both ends.
    """
    low_enough = new[1] <= value + new[0] * slope * _SUFFICIENT_DECREASE + _TOLERANCE_CHANGE
    accepted = low_enough & (tl.abs(new[2]) <= tl.abs(slope) * _CURVATURE)
    too_high = (low_enough == 0) | ((new[1] >= low[1]) & (trials > 1))
    uphill = tl.where(high[0] < low[0], -new[2], new[2]) >= 0
    high = choose_trial(too_high, new, choose_trial(uphill, low, high))
    # An accepted trial is the one to take, whatever its rank.
    lower = accepted | (too_high == 0)
    return accepted, lower, choose_trial(lower, new, low), high


@triton.jit
def _next_direction(
    numbers, ring, triangles, moved, change, gradient,
    V: tl.constexpr, HISTORY: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """lbfgs.History: push the pair (moved, change) if its curvature is safe; then the direction.

    ring: the pairs' steps and changes. triangles: their curvatures and, below, the inverse.
    """
    columns = tl.arange(0, BLOCK_V)
    inside = columns < V
    slots = tl.arange(0, BLOCK_H)
    in_triangle = BLOCK_H + slots[:, None] * BLOCK_H + slots[None, :]
    steps, changes = ring, ring + HISTORY * V
    curvatures = tl.load(triangles + slots)
    inverse = tl.load(triangles + in_triangle)
    scale = tl.load(numbers + _SCALE)
    pushed = tl.load(numbers + _PUSHED).to(tl.int32)
    curvature = tl.sum(moved * change)
    change_square = tl.sum(change * change)
    if curvature > change_square * _EPSILON:
        slot = pushed % HISTORY
        tl.store(steps + slot * V + columns, moved, mask=inside)
        tl.store(changes + slot * V + columns, change, mask=inside)
        # The pair is read by other threads than those that wrote it.
        tl.debug_barrier()
        pushed += 1
        products = history_times(steps, change, tl.minimum(pushed, HISTORY), V, BLOCK_V, BLOCK_H)
        inverse = extend_inverse(inverse, products, curvature, slot, BLOCK_H)
        curvatures = tl.where(slots == slot, curvature, curvatures)
        scale = curvature / change_square
        tl.store(triangles + slots, curvatures)
        tl.store(triangles + in_triangle, inverse)
        tl.store(numbers + _SCALE, scale)
        tl.store(numbers + _PUSHED, pushed.to(tl.float32))
    return descent_direction(
        gradient, steps, changes, inverse, curvatures, scale, tl.minimum(pushed, HISTORY),
        V, BLOCK_V, BLOCK_H,
    )  # fmt: skip
