"""The products of `mlp.py` in bfloat16 on Hopper: weights stay in shared memory, x streams past.

A program owns TILE columns of the product for good: it loads their part of the weights once and
walks over tiles of rows. Three parts of it run side by side:

- the producer, one warp, has the tensor memory accelerator load the weights and then x, tile by
  tile along the width, into a ring of STAGES as they become free;
- two consumers, four warps each, take the tiles of rows in turns, so that one multiplies while the
  other computes and stores activations, a PIECE of columns at a time.

They meet at barriers in shared memory. A barrier flips its phase when its count is complete; a part
waits for a phase by its parity, and must therefore never lag by two of them.

- `filled` and `emptied`, for each stage: its bytes have come; its consumer has multiplied them. The
  producer waits for `emptied` before it refills a stage, so it is one round of the ring ahead at
  most. A consumer waits for `filled` in its turn only, when all earlier waits for it are over.
- `turns`, for each consumer: the other one has started the last product of its tile. Consumer 0
  has the first turn.
- `weight_filled`: all of the weights have come, once.
- `piece_filled`, for each consumer: in the backward pass, the piece of the saved activation has
  come. The gradient replaces it in its buffer, and the next piece is asked for once that is stored.

No program waits for another one, so they may run in any number and order. The part of a tile that
lies outside its tensor is loaded as zeros, which count as bytes, and not stored: no size need be a
multiple of its tile. Shapes: M rows (tokens), K the width, N columns.
"""

from functools import cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fairway.model.fused.activation import activation_of, derivative_of
from fairway.model.fused.tiles import multiprocessors

TILE = gl.constexpr(128)
TILE_K = gl.constexpr(64)
STAGES = gl.constexpr(5)
PIECE = gl.constexpr(32)
PIECES = gl.constexpr(4)  # of a tile
LARGEST_K = 512  # The weights take 128 KiB then, and everything 224 of the 227 KiB that there are.


def up(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, slope: float, signed: bool
) -> None:
    """Write `mlp_up`'s result, from x [M, K] and weight [N, K], to out [M, N]."""
    weight_tiles = _tiles(weight, TILE, TILE_K)
    _launch(x, weight_tiles, None, out, slope, signed)


def down_backward(
    gradient: torch.Tensor,
    weight: torch.Tensor,
    saved: torch.Tensor,
    out: torch.Tensor,
    slope: float,
) -> None:
    """Write `mlp_down_backward`'s result to out [M, N].

    From the gradient [M, K], weight [K, N] and the saved activation [M, N].
    """
    weight_tiles = _tiles(weight, TILE_K, TILE)
    _launch(gradient, weight_tiles, _tiles(saved, TILE, PIECE), out, slope, True)


def _launch(x, weight_tiles, saved_tiles, out, slope: float, signed: bool) -> None:
    """One program for each multiprocessor, as far as the columns go into them."""
    (M, K), N = x.shape, out.shape[1]
    columns = triton.cdiv(N, TILE.value)
    groups = max(1, multiprocessors(x.device) // columns)
    _mlp[(groups * columns,)](
        _tiles(x, TILE, TILE_K), weight_tiles, saved_tiles, _tiles(out, TILE, PIECE),
        triton.cdiv(M, TILE.value), columns, triton.cdiv(K, TILE_K.value), groups,
        saved_tiles is not None, slope, signed, num_warps=4,
    )  # fmt: skip


def _tiles(tensor: torch.Tensor, rows: gl.constexpr, columns: gl.constexpr) -> TensorDescriptor:
    shape = [rows.value, columns.value]
    return TensorDescriptor.from_tensor(tensor, shape, _layout(*shape))


@cache
def _layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


@gluon.jit(do_not_specialize=["row_tiles", "columns"])
def _mlp(
    x_tiles, weight_tiles, saved_tiles, out_tiles, row_tiles, columns,
    STEPS: gl.constexpr, GROUPS: gl.constexpr, BACKWARD: gl.constexpr, SLOPE: gl.constexpr,
    SIGNED: gl.constexpr,
):  # fmt: skip
    """Programs of one group take the same rows; those of one column are GROUPS tiles apart."""
    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, TILE_K], x_tiles.layout)
    weight_shape: gl.constexpr = [STEPS, TILE_K, TILE] if BACKWARD else [STEPS, TILE, TILE_K]
    weight = gl.allocate_shared_memory(gl.bfloat16, weight_shape, weight_tiles.layout)
    pieces = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, PIECE], out_tiles.layout)
    filled, emptied = _barriers(STAGES), _barriers(STAGES)
    turns, weight_filled, piece_filled = _barriers(2), _barriers(1), _barriers(2)
    fence_async_shared()

    column, first = gl.program_id(0) % columns, gl.program_id(0) // columns
    count = (row_tiles - first + GROUPS - 1) // GROUPS
    gl.warp_specialize(
        [
            (_consume, (
                ring, weight, pieces, filled, emptied, turns, weight_filled, piece_filled,
                saved_tiles, out_tiles, column, first, count, 0, STEPS, GROUPS, BACKWARD, SLOPE,
                SIGNED,
            )),
            (_consume, (
                ring, weight, pieces, filled, emptied, turns, weight_filled, piece_filled,
                saved_tiles, out_tiles, column, first, count, 1, STEPS, GROUPS, BACKWARD, SLOPE,
                SIGNED,
            )),
            (_produce, (
                x_tiles, weight_tiles, ring, weight, filled, emptied, weight_filled,
                column, first, count, STEPS, GROUPS, BACKWARD,
            )),
        ],
        worker_num_warps=[4, 1],
        # Consumers hold a tile of float32 each, 128 registers a thread.
        worker_num_regs=[232, 32],
    )  # fmt: skip


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit
def _produce(
    x_tiles, weight_tiles, ring, weight, filled, emptied, weight_filled, column, first, count,
    STEPS: gl.constexpr, GROUPS: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    all_there = weight_filled.index(0)
    mbarrier.expect(all_there, STEPS * weight_tiles.block_type.nbytes)
    for part in gl.static_range(STEPS):
        corner = [part * TILE_K, column * TILE] if BACKWARD else [column * TILE, part * TILE_K]
        tma.async_copy_global_to_shared(weight_tiles, corner, all_there, weight.index(part))
    for tile in range(count):
        row = (first + tile * GROUPS) * TILE
        for step in range(STEPS):
            use = tile * STEPS + step
            stage = use % STAGES
            there = filled.index(stage)
            mbarrier.wait(emptied.index(stage), ((use // STAGES) & 1) ^ 1)
            mbarrier.expect(there, x_tiles.block_type.nbytes)
            tma.async_copy_global_to_shared(x_tiles, [row, step * TILE_K], there, ring.index(stage))


@gluon.jit
def _consume(
    ring, weight, pieces, filled, emptied, turns, weight_filled, piece_filled,
    saved_tiles, out_tiles, column, first, count,
    WHICH: gl.constexpr, STEPS: gl.constexpr, GROUPS: gl.constexpr, BACKWARD: gl.constexpr,
    SLOPE: gl.constexpr, SIGNED: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PIECE, 16]
    )
    piece, there = pieces.index(WHICH), piece_filled.index(WHICH)
    if BACKWARD:
        _load(saved_tiles, piece, there, column, first, count, WHICH, 0, GROUPS)
    mbarrier.wait(weight_filled.index(0), 0)
    for tile in range(WHICH, count, 2):
        total = _product(ring, weight, filled, emptied, turns, tile, WHICH, STEPS, BACKWARD)
        quarters = _quarters(total)
        for i in gl.static_range(PIECES):
            part = gl.convert_layout(quarters[i], layout)
            if BACKWARD:
                mbarrier.wait(there, i & 1)  # A tile's PIECES are an even number of phases.
                part = (part * derivative_of(piece.load(layout), SLOPE)).to(gl.bfloat16)
            else:
                part = activation_of(part, SLOPE, gl.bfloat16, SIGNED)
                tma.store_wait(0)
            piece.store(part)
            fence_async_shared()
            corner = [(first + tile * GROUPS) * TILE, column * TILE + i * PIECE]
            tma.async_copy_shared_to_global(out_tiles, corner, piece)
            if BACKWARD:
                tma.store_wait(0)
                _load(
                    saved_tiles, piece, there, column, first, count,
                    tile + (i + 1) // PIECES * 2, (i + 1) % PIECES, GROUPS,
                )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def _product(
    ring, weight, filled, emptied, turns, tile,
    WHICH: gl.constexpr, STEPS: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """A tile of the product, once it is this consumer's turn; then it is the other one's."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16]
    )
    mbarrier.wait(turns.index(WHICH), ((tile // 2) & 1) ^ (1 - WHICH))
    total = gl.zeros([TILE, TILE], gl.float32, layout)
    # Not unrolled, or registers spill.
    for step in range(STEPS):
        use = tile * STEPS + step
        stage = use % STAGES
        mbarrier.wait(filled.index(stage), (use // STAGES) & 1)
        factor = weight.index(step)
        if not BACKWARD:
            factor = factor.permute((1, 0))
        total = warpgroup_mma(ring.index(stage), factor, total, use_acc=step > 0, is_async=True)
        total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
        # The step before this one is over.
        mbarrier.arrive(emptied.index((use + STAGES - 1) % STAGES), count=1, pred=step > 0)
    mbarrier.arrive(turns.index(1 - WHICH), count=1)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
    mbarrier.arrive(emptied.index((tile * STEPS + STEPS - 1) % STAGES), count=1)
    return total


@gluon.jit
def _load(saved_tiles, piece, there, column, first, count, tile, i, GROUPS: gl.constexpr):
    """Ask for piece `i` of the saved activation's tile, if there is such a tile."""
    exists = tile < count
    mbarrier.expect(there, saved_tiles.block_type.nbytes, pred=exists)
    corner = [(first + tile * GROUPS) * TILE, column * TILE + i * PIECE]
    tma.async_copy_global_to_shared(saved_tiles, corner, there, piece, pred=exists)


@gluon.jit
def _quarters(total):
    """A tile's PIECES."""
    left, right = _halves(total)
    return _halves(left) + _halves(right)


@gluon.jit
def _halves(total):
    return total.reshape(total.shape[0], 2, total.shape[1] // 2).permute(0, 2, 1).split()
