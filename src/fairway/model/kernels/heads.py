"""What is done to single heads before attention: RMS norm, rotary embedding, gain.

Rotation turns pairs of places of a head, one from each half of its first dimensions. A tile holds
whole heads; each place's partner in its pair is read a second time, from the cache. Shapes: M rows
(tokens), H heads (of queries or keys), D head width.
"""

import torch
import triton
import triton.language as tl

from fairway.model.gpt import NORM_EPSILON
from fairway.model.kernels.tiles import programs_over

ELEMENTS_PER_TILE = 2048


def norm_and_rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    gain: torch.Tensor | None,
    positions: int,
) -> torch.Tensor:
    """Per head: RMS norm, rotary embedding of the first dimensions, gain. Contiguous [M, H, D].

    x: [M, H, D], its rows as far apart as they like. cos, sin: float32 [positions, half]; row m
    is at position m mod `positions`. gain: float32 [H].
    """
    M, H, D = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _head_tile(H, D)
    _norm_and_rotate[(triton.cdiv(M, tile[0]),)](
        x, out, cos, sin, cos if gain is None else gain, M, x.stride(0), positions, NORM_EPSILON,
        gain is not None, H, D, cos.shape[1], *tile,
    )  # fmt: skip
    return out


@triton.jit
def _norm_and_rotate(
    x_at, out_at, cos_at, sin_at, gain_at, M, stride, positions, epsilon, HAS_GAIN: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, WIDE_H: tl.constexpr, WIDE_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = _load_heads(x_at, rows, M, stride, H, D, WIDE_H, WIDE_D)
    partner = _load_partners(x_at, rows, M, stride, H, D, HALF, WIDE_H, WIDE_D)
    cos, sin = _rotation(cos_at, sin_at, rows, M, positions, HALF, WIDE_D)
    scale = 1 / tl.sqrt(tl.sum(x * x, 2) / D + epsilon)
    if HAS_GAIN:
        scale *= _gains(gain_at, H, WIDE_H)
    _store_heads(
        out_at, scale[:, :, None] * (x * cos + partner * sin), rows, M, H * D, H, D, WIDE_H, WIDE_D
    )


def norm_and_rotate_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    gain: torch.Tensor | None,
    positions: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Writes the gradient of x into `out`, [M, H, D] of any row stride; returns gain's, [H]."""
    M, H, D = x.shape
    programs = programs_over(M)
    partial = x.new_empty(programs, H, dtype=torch.float32)
    _norm_and_rotate_backward[(programs,)](
        gradient, x, out, cos, sin, cos if gain is None else gain, partial, M, gradient.stride(0),
        x.stride(0), out.stride(0), positions, NORM_EPSILON, gain is not None, programs, H, D,
        cos.shape[1], 1, triton.next_power_of_2(H), triton.next_power_of_2(D), num_warps=1,
    )  # fmt: skip
    return partial.sum(0)


@triton.jit
def _norm_and_rotate_backward(
    gradient_at, x_at, out_at, cos_at, sin_at, gain_at, partial_at, M, gradient_stride, stride,
    out_stride, positions, epsilon, HAS_GAIN: tl.constexpr, PROGRAMS: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, WIDE_H: tl.constexpr, WIDE_D: tl.constexpr,
):  # fmt: skip
    gain_sum = tl.zeros((WIDE_H,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), PROGRAMS):
        rows = block * ROWS + tl.arange(0, ROWS)
        x = _load_heads(x_at, rows, M, stride, H, D, WIDE_H, WIDE_D)
        gradient = _load_heads(gradient_at, rows, M, gradient_stride, H, D, WIDE_H, WIDE_D)
        partner = _load_partners(gradient_at, rows, M, gradient_stride, H, D, HALF, WIDE_H, WIDE_D)
        cos, sin = _rotation(cos_at, sin_at, rows, M, positions, HALF, WIDE_D)
        # Turned back: its product with x is that of the gradient with x turned.
        gradient = gradient * cos - partner * sin
        scale = 1 / tl.sqrt(tl.sum(x * x, 2) / D + epsilon)
        x *= scale[:, :, None]
        along = tl.sum(gradient * x, 2)
        if HAS_GAIN:
            gain_sum += tl.sum(along, 0)
            scale *= _gains(gain_at, H, WIDE_H)
        _store_heads(
            out_at, scale[:, :, None] * (gradient - x * (along / D)[:, :, None]),
            rows, M, out_stride, H, D, WIDE_H, WIDE_D,
        )  # fmt: skip
    heads = tl.arange(0, WIDE_H)
    tl.store(partial_at + tl.program_id(0) * H + heads, gain_sum, heads < H)


def add_heads(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    """Writes x + y, both contiguous [M, H, D], into `out` [M, H, D] of any row stride."""
    M, H, D = x.shape
    tile = _head_tile(H, D)
    _add_heads[(triton.cdiv(M, tile[0]),)](x, y, out, M, out.stride(0), H, D, *tile)


@triton.jit
def _add_heads(
    x_at, y_at, out_at, M, out_stride, H: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, WIDE_H: tl.constexpr, WIDE_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = _load_heads(x_at, rows, M, H * D, H, D, WIDE_H, WIDE_D)
    y = _load_heads(y_at, rows, M, H * D, H, D, WIDE_H, WIDE_D)
    _store_heads(out_at, x + y, rows, M, out_stride, H, D, WIDE_H, WIDE_D)


@triton.jit
def _load_heads(
    x_at, rows, M, stride, H: tl.constexpr, D: tl.constexpr,
    WIDE_H: tl.constexpr, WIDE_D: tl.constexpr,
):  # fmt: skip
    """Whole heads, float32 [rows, heads, D]."""
    places = tl.arange(0, WIDE_D)
    at, mask = _head_places(rows, M, stride, places, places < D, H, D, WIDE_H)
    return tl.load(x_at + at, mask, other=0.0).to(tl.float32)


@triton.jit
def _load_partners(
    x_at, rows, M, stride, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    WIDE_H: tl.constexpr, WIDE_D: tl.constexpr,
):  # fmt: skip
    """For each place of a head the other one of its pair, zero where there is none."""
    places = tl.arange(0, WIDE_D)
    partners = tl.where(places < HALF, places + HALF, places - HALF)
    at, mask = _head_places(rows, M, stride, partners, places < 2 * HALF, H, D, WIDE_H)
    return tl.load(x_at + at, mask, other=0.0).to(tl.float32)


@triton.jit
def _store_heads(
    out_at, x, rows, M, stride, H: tl.constexpr, D: tl.constexpr,
    WIDE_H: tl.constexpr, WIDE_D: tl.constexpr,
):  # fmt: skip
    places = tl.arange(0, WIDE_D)
    at, mask = _head_places(rows, M, stride, places, places < D, H, D, WIDE_H)
    tl.store(out_at + at, x, mask)


@triton.jit
def _head_places(
    rows, M, stride, places, inside, H: tl.constexpr, D: tl.constexpr, WIDE_H: tl.constexpr
):
    """Offsets of `places` in every head of the rows, and which of them exist."""
    heads = tl.arange(0, WIDE_H)[None, :, None]
    at = rows.to(tl.int64)[:, None, None] * stride + heads * D + places[None, None, :]
    return at, (rows < M)[:, None, None] & (heads < H) & inside[None, None, :]


@triton.jit
def _rotation(cos_at, sin_at, rows, M, positions, HALF: tl.constexpr, WIDE_D: tl.constexpr):
    """What a place and its partner are multiplied by, float32 [rows, 1, D]: cos and ± sin."""
    places = tl.arange(0, WIDE_D)[None, :]
    turns = places < 2 * HALF
    at = (rows % positions)[:, None] * HALF + places % HALF
    mask = (rows < M)[:, None] & turns
    cos = tl.load(cos_at + at, mask, other=0.0)
    sin = tl.load(sin_at + at, mask, other=0.0)
    cos = tl.where(turns, cos, 1.0)
    return cos[:, None, :], tl.where(places < HALF, sin, -sin)[:, None, :]


def _head_tile(heads: int, width: int) -> tuple[int, int, int]:
    """Rows of a tile, and the powers of two that cover heads and their width."""
    covers = triton.next_power_of_2(heads), triton.next_power_of_2(width)
    return max(1, ELEMENTS_PER_TILE // (covers[0] * covers[1])), *covers


@triton.jit
def _gains(gain_at, H: tl.constexpr, WIDE_H: tl.constexpr):
    """float32 [1, heads]."""
    heads = tl.arange(0, WIDE_H)
    return tl.load(gain_at + heads, heads < H, other=0.0)[None, :]
