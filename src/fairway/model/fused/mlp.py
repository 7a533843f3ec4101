"""The two matrix products next to the MLP's activation, leaky_relu(·, slope)², with it fused in.

Persistent programs, one for each multiprocessor, which a tile's accumulator fills, take one tile of
the product after another; the tensor memory accelerator moves the operands. The activation tells
its own derivative (`activation.py`), so that nothing else is written or kept. In bfloat16 on Hopper
other kernels do the same faster (`mlp_hopper.py`).
Shapes: M rows (tokens), C width, F MLP width.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fairway.model.fused import mlp_hopper
from fairway.model.fused.activation import activation_of, derivative_of
from fairway.model.fused.tiles import ELEMENTS_PER_TILE, multiprocessors

TILE_M, TILE_N = 128, 256
TILE_K_BYTES = 128
NUM_WARPS, NUM_STAGES = 8, 3


def mlp_up(
    x: torch.Tensor, weight: torch.Tensor, slope: float, signed: bool = True
) -> torch.Tensor:
    """The activation of x [M, C] · weight [F, C]ᵀ: [M, F].

    slope: below zero. signed: with signs in its last bits, which a backward pass needs.
    """
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    if _is_for_hopper(x):
        mlp_hopper.up(x, weight, out, slope, signed)
        return out
    programs = multiprocessors(x.device)
    tile_k = TILE_K_BYTES // x.element_size()
    _mlp_up[(programs,)](
        _tiles(x, TILE_M, tile_k), _tiles(weight, TILE_N, tile_k), _tiles(out, TILE_M, TILE_N // 2),
        *out.shape, x.shape[1], slope, signed, TILE_M, TILE_N, tile_k, programs,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return out


def mlp_down_backward(
    gradient: torch.Tensor, weight: torch.Tensor, activation: torch.Tensor, slope: float
) -> torch.Tensor:
    """The gradient of x · weightᵀ in `mlp_up`, [M, F].

    From that of activation · weightᵀ, [M, C], with weight [C, F] that of the next product.
    """
    out = torch.empty_like(activation)
    if _is_for_hopper(gradient):
        mlp_hopper.down_backward(gradient, weight, activation, out, slope)
        return out
    programs = multiprocessors(gradient.device)
    tile_k = TILE_K_BYTES // out.element_size()
    _mlp_down_backward[(programs,)](
        _tiles(gradient, TILE_M, tile_k), _tiles(weight, tile_k, TILE_N),
        _tiles(activation, TILE_M, TILE_N // 2), _tiles(out, TILE_M, TILE_N // 2),
        *out.shape, len(weight), slope, TILE_M, TILE_N, tile_k, programs,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return out


def activate(x: torch.Tensor, slope: float) -> torch.Tensor:
    """The activation of contiguous x, in place, for a product that something was added to."""
    _activate[(triton.cdiv(x.numel(), ELEMENTS_PER_TILE),)](x, x.numel(), slope, ELEMENTS_PER_TILE)
    return x


def activate_backward(gradient: torch.Tensor, activation: torch.Tensor, slope: float) -> None:
    """Turn the activation's gradient into that of its input, in place; both contiguous."""
    _activate_backward[(triton.cdiv(gradient.numel(), ELEMENTS_PER_TILE),)](
        gradient, activation, gradient.numel(), slope, ELEMENTS_PER_TILE
    )


@triton.jit
def _activate(x_at, size, SLOPE: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = tl.load(x_at + at, at < size).to(tl.float32)
    tl.store(x_at + at, activation_of(x, SLOPE, x_at.dtype.element_ty, True), at < size)


@triton.jit
def _activate_backward(gradient_at, activation_at, size, SLOPE: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    derivative = derivative_of(tl.load(activation_at + at, at < size), SLOPE)
    gradient = tl.load(gradient_at + at, at < size).to(tl.float32)
    tl.store(gradient_at + at, gradient * derivative, at < size)


@triton.jit
def _mlp_up(
    x_tiles, weight_tiles, out_tiles, M, N, K, SLOPE: tl.constexpr, SIGNED: tl.constexpr,
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
        out_tiles.store([row, column], activation_of(left, SLOPE, out_tiles.dtype, SIGNED))
        out_tiles.store([row, column + HALF], activation_of(right, SLOPE, out_tiles.dtype, SIGNED))


@triton.jit
def _mlp_down_backward(
    gradient_tiles, weight_tiles, activation_tiles, out_tiles, M, N, K, SLOPE: tl.constexpr,
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
        derivative = derivative_of(activation_tiles.load([row, column]), SLOPE)
        out_tiles.store([row, column], (left * derivative).to(out_tiles.dtype))
        derivative = derivative_of(activation_tiles.load([row, column + HALF]), SLOPE)
        out_tiles.store([row, column + HALF], (right * derivative).to(out_tiles.dtype))


@triton.jit
def _halves(total, M: tl.constexpr, N: tl.constexpr):
    """The left and right half of a tile: storing one at a time takes half the shared memory."""
    return total.reshape(M, 2, N // 2).permute(0, 2, 1).split()


def _tiles(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, [rows, columns])


def _is_for_hopper(x: torch.Tensor) -> bool:
    """Whether `mlp_hopper` can multiply x [M, C] by a weight: the latter must fit beside tiles."""
    return (
        x.is_cuda
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and x.dtype == torch.bfloat16
        and x.shape[1] <= mlp_hopper.LARGEST_K
    )
