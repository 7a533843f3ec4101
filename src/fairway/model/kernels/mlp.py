"""The two matrix products next to the MLP's activation, leaky_relu(·, 0.5)², with it fused in.

Persistent programs take one tile of the product after another; the tensor memory accelerator
moves the operands. The activation's gradient is 2·√a where what it came from is positive, else
−√a: the activation `a` tells it but for that sign, which its last mantissa bit is spent on, so that
nothing else is written or kept. Shapes: M rows (tokens), C width, F MLP width.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fairway.model.kernels.tiles import ELEMENTS_PER_TILE

TILE_M, TILE_N = 128, 256
TILE_K_BYTES = 128
NUM_WARPS, NUM_STAGES = 8, 3
PROGRAMS = 132  # an H200's multiprocessors; a tile's accumulator fills one


def mlp_up(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The activation of x [M, C] · weight [F, C]ᵀ: [M, F], with signs in its last bits."""
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    tile_k = TILE_K_BYTES // x.element_size()
    _mlp_up[(PROGRAMS,)](
        _tiles(x, TILE_M, tile_k), _tiles(weight, TILE_N, tile_k), _tiles(out, TILE_M, TILE_N // 2),
        *out.shape, x.shape[1], TILE_M, TILE_N, tile_k, PROGRAMS,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return out


def mlp_down_backward(
    gradient: torch.Tensor, weight: torch.Tensor, activation: torch.Tensor
) -> torch.Tensor:
    """The gradient of x · weightᵀ in `mlp_up`, [M, F].

    From that of activation · weightᵀ, [M, C], with weight [C, F] that of the next product.
    """
    out = torch.empty_like(activation)
    tile_k = TILE_K_BYTES // out.element_size()
    _mlp_down_backward[(PROGRAMS,)](
        _tiles(gradient, TILE_M, tile_k), _tiles(weight, tile_k, TILE_N),
        _tiles(activation, TILE_M, TILE_N // 2), _tiles(out, TILE_M, TILE_N // 2),
        *out.shape, len(weight), TILE_M, TILE_N, tile_k, PROGRAMS,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return out


def activate(x: torch.Tensor) -> torch.Tensor:
    """The activation of contiguous x, in place: where something is added to the product first."""
    _activate[(triton.cdiv(x.numel(), ELEMENTS_PER_TILE),)](x, x.numel(), ELEMENTS_PER_TILE)
    return x


def activate_backward(gradient: torch.Tensor, activation: torch.Tensor) -> None:
    """Turn the activation's gradient into that of what it came from, in place; both contiguous."""
    _activate_backward[(triton.cdiv(gradient.numel(), ELEMENTS_PER_TILE),)](
        gradient, activation, gradient.numel(), ELEMENTS_PER_TILE
    )


@triton.jit
def _activate(x_at, size, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = tl.load(x_at + at, at < size).to(tl.float32)
    tl.store(x_at + at, _activation(x, x_at.dtype.element_ty), at < size)


@triton.jit
def _activate_backward(gradient_at, activation_at, size, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    slope = _activation_slope(tl.load(activation_at + at, at < size))
    gradient = tl.load(gradient_at + at, at < size).to(tl.float32)
    tl.store(gradient_at + at, gradient * slope, at < size)


@triton.jit
def _mlp_up(
    x_tiles, weight_tiles, out_tiles, M, N, K,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = TILE_N // 2
    columns = tl.cdiv(N, TILE_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, TILE_M) * columns, PROGRAMS, flatten=True):
        row, column = tile // columns * TILE_M, tile % columns * TILE_N
        total = tl.zeros((TILE_M, TILE_N), tl.float32)
        for k in range(0, K, TILE_K):
            x = x_tiles.load([row, k])
            total = tl.dot(x, weight_tiles.load([column, k]).T, total, input_precision="ieee")
        left, right = _halves(total, TILE_M, TILE_N)
        out_tiles.store([row, column], _activation(left, out_tiles.dtype))
        out_tiles.store([row, column + HALF], _activation(right, out_tiles.dtype))


@triton.jit
def _mlp_down_backward(
    gradient_tiles, weight_tiles, activation_tiles, out_tiles, M, N, K,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = TILE_N // 2
    columns = tl.cdiv(N, TILE_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, TILE_M) * columns, PROGRAMS, flatten=True):
        row, column = tile // columns * TILE_M, tile % columns * TILE_N
        total = tl.zeros((TILE_M, TILE_N), tl.float32)
        for k in range(0, K, TILE_K):
            gradient = gradient_tiles.load([row, k])
            total = tl.dot(gradient, weight_tiles.load([k, column]), total, input_precision="ieee")
        left, right = _halves(total, TILE_M, TILE_N)
        slope = _activation_slope(activation_tiles.load([row, column]))
        out_tiles.store([row, column], (left * slope).to(out_tiles.dtype))
        slope = _activation_slope(activation_tiles.load([row, column + HALF]))
        out_tiles.store([row, column + HALF], (right * slope).to(out_tiles.dtype))


@triton.jit
def _halves(total, M: tl.constexpr, N: tl.constexpr):
    """The left and right half of a tile: storing one at a time takes half the shared memory."""
    return total.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@triton.jit
def _activation(x, dtype: tl.constexpr):
    """Of float32 x, as the `dtype` nearest to it whose last mantissa bit tells x's sign."""
    leaky = tl.where(x > 0, x, 0.5 * x)
    bits = (leaky * leaky).to(tl.int32, bitcast=True)
    negative = (x < 0).to(tl.int32)
    if dtype == tl.float32:
        return ((bits & -2) | negative).to(tl.float32, bitcast=True)
    tl.static_assert(dtype == tl.bfloat16)
    # A bfloat16 is the upper half of a float32.
    bits = (bits + ((1 - negative) << 16)) & -0x20000
    return ((bits >> 16) | negative).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _activation_slope(activation):
    """Float32, from what `_activation` has made."""
    if activation.dtype == tl.float32:
        bits = activation.to(tl.int32, bitcast=True)
    else:
        bits = activation.to(tl.int16, bitcast=True).to(tl.int32)
    root = tl.sqrt(activation.to(tl.float32))
    return tl.where((bits & 1) == 1, -root, 2 * root)


def _tiles(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, [rows, columns])
