"""The fit of logit_delta.py as one Triton kernel: a whole L-BFGS fit for each row, in one launch.

One program fits one row from its start to its end and reads nothing of another, so rows are
independent by construction, and nothing waits for the host. The algorithm is that of lbfgs.py,
written for a single problem, with the inverse of the history's triangle in place of the triangular
systems (the same direction in exact arithmetic).

An evaluation streams the row's probabilities once: a tile of places serves both for its sums
sum_u q_u exp(delta_u) and for the gradient. Many rows at once take the time of reading the
probabilities, and they are kept in half precision. In units of 2^-15 every probability above
2e-9 has 11 significant bits there. Relative errors of up to 2^-12 in the q move a fitted entry by
about as much, in nats, at most, and the loss, flat at its minimum, by the order of their square.

A single row takes the time of its program's instructions, and of its warps' waiting for one
another. So a tile lies in the registers such that up to 1,024 tokens a warp holds its places
whole: a place's sum stays inside the warp, and every warp adds up a gradient of its own places
(`expected`), which meets the other warps' once an evaluation. For that a place is folded into
chunks of COLUMNS tokens, as many as a warp reads at once in pieces of 16 bytes.

Sources: Nocedal & Wright, Numerical Optimization, 2nd edition, algorithms 3.5, 3.6 and 7.5.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairway.adaptation.lbfgs import CURVATURE, SUFFICIENT_DECREASE, Minimum
from fairway.adaptation.lbfgs_kernel import (
    choose_trial,
    descent_direction,
    extend_inverse,
    history_times,
    next_step,
)
from fairway.adaptation.logit_delta import (
    MAX_LINE_SEARCH_STEPS,
    TOLERANCE_CHANGE,
    TOLERANCE_GRADIENT,
    loss_terms,
)

NUM_WARPS = 8
NUM_STAGES = 4  # one more than there are tiles in shared memory
PLACES_PER_WARP = 1  # in a tile; more leave too few registers for their gradients
LANE_COLUMNS = 8  # half-precision numbers in 16 bytes
MAX_CHUNKS = 4  # of a place in a lane's registers

UNITS_PER_ONE = 2.0**15  # float16 ends at 65504

_UNIT = tl.constexpr(1 / UNITS_PER_ONE)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_EPSILON = tl.constexpr(torch.finfo(torch.float32).eps)
_SUFFICIENT_DECREASE = tl.constexpr(SUFFICIENT_DECREASE)
_CURVATURE = tl.constexpr(CURVATURE)
_TOLERANCE_GRADIENT = tl.constexpr(TOLERANCE_GRADIENT)
_TOLERANCE_CHANGE = tl.constexpr(TOLERANCE_CHANGE)
_MAX_LINE_SEARCH_STEPS = tl.constexpr(MAX_LINE_SEARCH_STEPS)


def compact(probabilities: Tensor) -> Tensor:
    """float32 [..., V] -> float16 [..., V] in units of 2^-15."""
    return (probabilities * UNITS_PER_ONE).half()


def compact_softmax(logits: Tensor) -> Tensor:
    """compact(softmax(logits)) of float32 [m, V] or [B, P, V], whose last dimension is dense."""
    assert logits.stride(-1) == 1 and logits.ndim in (2, 3)
    places, vocabulary = logits.shape[-2:]
    compacted = torch.empty(logits.shape, dtype=torch.float16, device=logits.device)
    if compacted.numel():
        _compact_softmax_kernel[(compacted.numel() // vocabulary,)](
            logits,
            compacted,
            places,
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
) -> Minimum:
    """As `logit_delta.fit_delta`; `probabilities` also as `compact` makes them."""
    if probabilities.dtype != torch.float16:
        probabilities = compact(probabilities)
    rows, num_places, vocabulary = probabilities.shape
    block_vocabulary = triton.next_power_of_2(vocabulary)
    block_places, columns = tile_shape(block_vocabulary)
    share, wanted, ridge = loss_terms(targets, is_context, initial, l2)
    pairs = initial.new_empty(2, rows, history, vocabulary)
    x, value = torch.empty_like(wanted), torch.empty_like(ridge)
    counts = torch.empty(2, rows, dtype=torch.int64, device=x.device)
    _fit_kernel[(rows,)](
        probabilities.contiguous(),
        share,
        block_runs(share, block_places),
        wanted,
        ridge,
        initial.contiguous(),
        *pairs,
        x,
        value,
        counts[0],
        counts[1],
        num_places,
        float(clamp),
        iterations,
        V=vocabulary,
        HISTORY=history,
        BLOCK_V=block_vocabulary,
        BLOCK_H=triton.next_power_of_2(history),
        BLOCK_P=block_places,
        COLUMNS=columns,
        STAGES=NUM_STAGES,
        num_warps=NUM_WARPS,
    )
    return Minimum(x, value, *counts)


def tile_shape(block_vocabulary: int) -> tuple[int, int]:
    """Places of a tile, and the columns of each of their chunks.

    Long vocabularies spread a place over several warps. Their vectors take more registers too.
    """
    warp_columns = 32 * LANE_COLUMNS
    columns = max(min(warp_columns, block_vocabulary), block_vocabulary // MAX_CHUNKS)
    at_once = max(1, NUM_WARPS * warp_columns // columns)
    return at_once * (PLACES_PER_WARP if columns <= warp_columns else 1), columns


def block_runs(share: Tensor, block_places: int) -> Tensor:
    """Which blocks of places each row must visit: the first, and how many from there on.

    share: float32 [B, P], 0 where a place does not count. Returns int32 [B, 2]. Blocks are taken
    in a circle, so a run that goes on from the last place at the first, as in a ring buffer, is
    one run. Blocks without a counted place inside it are visited too.
    """
    rows, places = share.shape
    blocks = max(1, -(-places // block_places))
    padded = torch.nn.functional.pad(share, (0, blocks * block_places - places))
    counts = padded.view(rows, blocks, block_places).any(dim=2)
    begins = counts & ~counts.roll(1, dims=1)
    first = begins.int().argmax(dim=1, keepdim=True)
    distance = (torch.arange(blocks, device=share.device) - first) % blocks
    length = torch.where(counts, distance + 1, 0).amax(dim=1, keepdim=True)
    return torch.cat([first, length], dim=1).int()


@triton.jit
def _compact_softmax_kernel(
    logits, compacted, num_places, row_stride, place_stride, vocabulary, BLOCK_V: tl.constexpr
):
    """One place of a row: softmax in float32, stored in units of 2^-15 as float16."""
    index = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_V)
    inside = columns < vocabulary
    source = logits + index // num_places * row_stride + index % num_places * place_stride
    values = tl.load(source + columns, mask=inside, other=-float("inf"))
    growth = tl.exp(values - tl.max(values))
    scaled = growth * (1 / (tl.sum(growth) * _UNIT))
    tl.store(compacted + index * vocabulary + columns, scaled.to(tl.float16), mask=inside)


@triton.jit
def _loss_and_gradient(
    delta, problem, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Value and gradient [BLOCK_V] at `delta` [BLOCK_V]."""
    probabilities, share, wanted, ridge, first_block, num_blocks, num_places = problem
    CHUNKS: tl.constexpr = BLOCK_V // COLUMNS
    columns = tl.arange(0, BLOCK_V)
    growth = tl.exp(delta) * _UNIT
    growths = tl.reshape(growth, [CHUNKS, COLUMNS])[:, None, :]
    losses = tl.zeros([BLOCK_P], tl.float32)
    expected = tl.zeros([CHUNKS, BLOCK_P, COLUMNS], tl.float32)
    for index in tl.range(0, num_blocks, num_stages=STAGES):
        weight, tile = _load_tile(
            probabilities, share, first_block + index, num_places, V, BLOCK_V, BLOCK_P, COLUMNS
        )
        tile = tile.to(tl.float32)
        total = tl.sum(tl.sum(tile * growths, axis=0), axis=1)
        # Not tl.maximum: what is not a number must stay so, or a wild trial would look good.
        total = tl.where(total < _TINY, _TINY, total)
        losses += weight * tl.log(total)
        expected += tile * (weight / total)[None, :, None]
    expected = tl.reshape(tl.sum(expected, axis=1), [BLOCK_V])
    # Read anew each time, for a warp has no registers to spare.
    wanted = tl.load(wanted + columns, mask=columns < V, other=0.0)
    value = tl.sum(losses) - tl.sum(wanted * delta) + ridge / 2 * tl.sum(delta * delta)
    return value, expected * growth - wanted + ridge * delta


@triton.jit
def _load_tile(
    probabilities, share, block, num_places, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_P] and probabilities [BLOCK_V / COLUMNS, BLOCK_P, COLUMNS] of a block."""
    all_blocks = tl.cdiv(num_places, BLOCK_P)
    block = tl.where(block < all_blocks, block, block - all_blocks)
    places = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = places < num_places
    weight = tl.load(share + places, mask=inside, other=0.0)
    # Chunk by chunk as a matrix, whose layout is the same in every version of Triton: a line's
    # columns along a warp, the lines in turn to the warps, so that a place's chunks meet in one.
    lines = tl.arange(0, BLOCK_V // COLUMNS * BLOCK_P)
    places = block * BLOCK_P + lines % BLOCK_P
    columns = (lines // BLOCK_P * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    mask = (places < num_places)[:, None]
    if V < BLOCK_V:
        mask = mask & (columns < V)
    tile = tl.load(probabilities + places[:, None] * V + columns, mask=mask, other=0.0)
    tile = tl.reshape(tile, [BLOCK_V // COLUMNS, BLOCK_P, COLUMNS])
    return weight, tile


@triton.jit
def _line_search(
    x, value, gradient, direction, slope, step, problem, V: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """lbfgs.LineSearch: the step taken, value and gradient there, and how many were tried."""
    farthest = tl.max(tl.abs(direction))
    low = (tl.full((), 0.0, tl.float32), value, slope)
    high = (tl.full((), float("inf"), tl.float32), value, slope)
    low_gradient = gradient
    trials = tl.full((), 0, tl.int32)
    searching = trials == 0
    while searching:
        new_value, new_gradient = _loss_and_gradient(
            x + step * direction, problem, V, BLOCK_V, BLOCK_P, COLUMNS, STAGES
        )
        new = (step, new_value, tl.sum(new_gradient * direction))
        trials += 1
        low_enough = new[1] <= value + step * slope * _SUFFICIENT_DECREASE + _TOLERANCE_CHANGE
        accepted = low_enough & (tl.abs(new[2]) <= tl.abs(slope) * _CURVATURE)
        too_high = (low_enough == 0) | ((new[1] >= low[1]) & (trials > 1))
        uphill = tl.where(high[0] < low[0], -new[2], new[2]) >= 0
        before = low
        high = choose_trial(too_high, new, choose_trial(uphill, low, high))
        # An accepted trial is the one to take, whatever its rank.
        lower = accepted | (too_high == 0)
        low = choose_trial(lower, new, low)
        low_gradient = tl.where(lower, new_gradient, low_gradient)
        step = next_step(before, low, high, new)
        narrow = tl.abs(high[0] - low[0]) * farthest < _TOLERANCE_CHANGE
        searching = (accepted | narrow | (trials >= _MAX_LINE_SEARCH_STEPS)) == 0
    return low[0], low[1], low_gradient, trials


@triton.jit
def _fit_kernel(
    probabilities, share, runs, wanted, ridge, initial, steps, changes,
    x_out, value_out, iterations_out, evaluations_out, num_places, clamp, max_iterations,
    V: tl.constexpr, HISTORY: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """lbfgs.minimize for the row of this program. steps, changes: scratch [B, HISTORY, V]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_V)
    inside = columns < V
    slots = tl.arange(0, BLOCK_H)
    probabilities += row * num_places * V
    share += row * num_places
    steps += row * HISTORY * V
    changes += row * HISTORY * V
    num_blocks = tl.load(runs + 2 * row + 1)
    problem = (
        probabilities,
        share,
        wanted + row * V,
        tl.load(ridge + row),
        tl.load(runs + 2 * row),
        num_blocks,
        num_places,
    )
    x = tl.load(initial + row * V + columns, mask=inside & (num_blocks > 0), other=0.0)

    value, gradient = _loss_and_gradient(x, problem, V, BLOCK_V, BLOCK_P, COLUMNS, STAGES)
    curvatures = tl.zeros([BLOCK_H], tl.float32)
    inverse = tl.zeros([BLOCK_H, BLOCK_H], tl.float32)
    scale = tl.full((), 1.0, tl.float32)
    pushed = tl.full((), 0, tl.int32)
    iterations = tl.full((), 0, tl.int32)
    evaluations = tl.full((), 1, tl.int32)
    direction = -gradient
    slope = tl.sum(gradient * direction)
    # A gradient says nothing about distance, so the very first step is a short one.
    step = tl.minimum(1.0 / tl.sum(tl.abs(gradient)), 1.0)
    active = tl.max(tl.abs(gradient)) > _TOLERANCE_GRADIENT

    while active:
        low_step, low_value, low_gradient, trials = _line_search(
            x, value, gradient, direction, slope, step, problem,
            V, BLOCK_V, BLOCK_P, COLUMNS, STAGES,
        )  # fmt: skip
        moved = low_step * direction
        decrease = value - low_value
        gradient_change = low_gradient - gradient
        curvature = tl.sum(moved * gradient_change)
        change_square = tl.sum(gradient_change * gradient_change)
        if curvature > change_square * _EPSILON:
            slot = pushed % HISTORY
            tl.store(steps + slot * V + columns, moved, mask=inside)
            tl.store(changes + slot * V + columns, gradient_change, mask=inside)
            # The pair is read by other threads than those that wrote it.
            tl.debug_barrier()
            pushed += 1
            pairs = tl.minimum(pushed, HISTORY)
            products = history_times(steps, gradient_change, pairs, V, BLOCK_V, BLOCK_H)
            inverse = extend_inverse(inverse, products, curvature, slot, BLOCK_H)
            curvatures = tl.where(slots == slot, curvature, curvatures)
            scale = curvature / change_square
        x += moved
        value, gradient = low_value, low_gradient
        iterations += 1
        evaluations += trials
        direction = descent_direction(
            gradient, steps, changes, inverse, curvatures, scale, tl.minimum(pushed, HISTORY),
            V, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        slope = tl.sum(gradient * direction)
        step = tl.full((), 1.0, tl.float32)
        active = (
            (tl.max(tl.abs(gradient)) > _TOLERANCE_GRADIENT)
            & (tl.max(tl.abs(moved)) > _TOLERANCE_CHANGE)
            & (tl.abs(decrease) >= _TOLERANCE_CHANGE)
            & (slope < -_TOLERANCE_CHANGE)
            & (iterations < max_iterations)
        )

    clamped = tl.minimum(tl.maximum(x, -clamp), clamp)
    tl.store(x_out + row * V + columns, clamped, mask=inside)
    tl.store(value_out + row, value)
    tl.store(iterations_out + row, iterations)
    tl.store(evaluations_out + row, evaluations)
