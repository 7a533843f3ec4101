"""The two matrix products next to the MLP's activation, leaky_relu(·, 0.5)², with it fused in.

Persistent programs take one tile of the product after another; the tensor memory accelerator
moves the operands. Shapes: M rows (tokens), C width, F MLP width.
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


def mlp_up(
    x: torch.Tensor, weight: torch.Tensor, keeps_up: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """x [M, C] · weight [F, C]ᵀ, before and after the activation: two tensors [M, F].

    The first, which only a backward pass needs, is None without `keeps_up`.
    """
    activation = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    up = torch.empty_like(activation) if keeps_up else None
    activation_tiles = _tiles(activation, TILE_M, TILE_N // 2)
    tile_k = TILE_K_BYTES // x.element_size()
    _mlp_up[(PROGRAMS,)](
        _tiles(x, TILE_M, tile_k), _tiles(weight, TILE_N, tile_k),
        _tiles(up, TILE_M, TILE_N // 2) if keeps_up else activation_tiles, activation_tiles,
        *activation.shape, x.shape[1], keeps_up, TILE_M, TILE_N, tile_k, PROGRAMS,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return up, activation


def mlp_down_backward(
    gradient: torch.Tensor, weight: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """The gradient of `up` [M, F] from that of activation · weightᵀ, [M, C]; weight is [C, F]."""
    out = torch.empty_like(up)
    tile_k = TILE_K_BYTES // up.element_size()
    _mlp_down_backward[(PROGRAMS,)](
        _tiles(gradient, TILE_M, tile_k), _tiles(weight, tile_k, TILE_N),
        _tiles(up, TILE_M, TILE_N // 2), _tiles(out, TILE_M, TILE_N // 2),
        *up.shape, len(weight), TILE_M, TILE_N, tile_k, PROGRAMS,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return out


def activate(up: torch.Tensor) -> torch.Tensor:
    """The activation alone of contiguous `up`, where something is added to the product first."""
    activation = torch.empty_like(up)
    _activate[(triton.cdiv(up.numel(), ELEMENTS_PER_TILE),)](
        up, activation, up.numel(), ELEMENTS_PER_TILE
    )
    return activation


def activate_backward(gradient: torch.Tensor, up: torch.Tensor) -> None:
    """Turn the activation's gradient into that of `up`, in place; both contiguous."""
    _activate_backward[(triton.cdiv(up.numel(), ELEMENTS_PER_TILE),)](
        gradient, up, up.numel(), ELEMENTS_PER_TILE
    )


@triton.jit
def _activate(up_at, activation_at, size, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    up = tl.load(up_at + at, at < size).to(tl.float32)
    tl.store(activation_at + at, _activation(up), at < size)


@triton.jit
def _activate_backward(gradient_at, up_at, size, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    slope = _activation_slope(tl.load(up_at + at, at < size).to(tl.float32))
    gradient = tl.load(gradient_at + at, at < size).to(tl.float32)
    tl.store(gradient_at + at, gradient * slope, at < size)


@triton.jit
def _mlp_up(
    x_tiles, weight_tiles, up_tiles, activation_tiles, M, N, K, KEEPS_UP: tl.constexpr,
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
        if KEEPS_UP:
            up_tiles.store([row, column], left.to(up_tiles.dtype))
            up_tiles.store([row, column + HALF], right.to(up_tiles.dtype))
        activation_tiles.store([row, column], _activation(left).to(up_tiles.dtype))
        activation_tiles.store([row, column + HALF], _activation(right).to(up_tiles.dtype))


@triton.jit
def _mlp_down_backward(
    gradient_tiles, weight_tiles, up_tiles, out_tiles, M, N, K,
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
        slope = _activation_slope(up_tiles.load([row, column]).to(tl.float32))
        out_tiles.store([row, column], (left * slope).to(up_tiles.dtype))
        slope = _activation_slope(up_tiles.load([row, column + HALF]).to(tl.float32))
        out_tiles.store([row, column + HALF], (right * slope).to(up_tiles.dtype))


@triton.jit
def _halves(total, M: tl.constexpr, N: tl.constexpr):
    """The left and right half of a tile: storing one at a time takes half the shared memory."""
    return total.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@triton.jit
def _activation(up):
    leaky = tl.where(up > 0, up, 0.5 * up)
    return leaky * leaky


@triton.jit
def _activation_slope(up):
    return tl.where(up > 0, 2.0 * up, 0.5 * up)


def _tiles(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, [rows, columns])
