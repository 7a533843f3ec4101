"""What is done to single heads before attention: RMS norm, rotary embedding, gain.

Shapes: M rows (tokens), H heads (of queries or keys), D head width.
"""

import torch
import triton
import triton.language as tl

from fairway.model.gpt import NORM_EPSILON
from fairway.model.kernels.tiles import ELEMENTS_PER_TILE, programs_over


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
    has_gain = gain is not None
    tile = _head_tile(H, D, cos.shape[1])
    _norm_and_rotate[(triton.cdiv(M, tile[0]),)](
        x, out, cos, sin, gain if has_gain else cos, M, x.stride(0), positions, NORM_EPSILON,
        has_gain, H, D, cos.shape[1], *tile,
    )  # fmt: skip
    return out


@triton.jit
def _norm_and_rotate(
    x_at, out_at, cos_at, sin_at, gain_at, M, stride, positions, epsilon, HAS_GAIN: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, WIDE_H: tl.constexpr, WIDE_HALF: tl.constexpr, WIDE_REST: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cos, sin = _rotation(cos_at, sin_at, rows, rows < M, positions, HALF, WIDE_HALF)
    first, second, rest, _ = _normed_heads(
        x_at, rows, M, stride, epsilon, H, D, HALF, WIDE_H, WIDE_HALF, WIDE_REST
    )
    if HAS_GAIN:
        heads = tl.arange(0, WIDE_H)
        gain = tl.load(gain_at + heads, heads < H, other=0.0)[None, :, None]
        first, second, rest = first * gain, second * gain, rest * gain
    _store_heads(
        out_at, first * cos + second * sin, second * cos - first * sin, rest,
        rows, M, H * D, H, D, HALF, WIDE_H, WIDE_HALF, WIDE_REST,
    )  # fmt: skip


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
    has_gain = gain is not None
    tile = _head_tile(H, D, cos.shape[1], ELEMENTS_PER_TILE // 2)
    programs = programs_over(M, tile[0])
    partial = x.new_empty(programs, H, dtype=torch.float32)
    _norm_and_rotate_backward[(programs,)](
        gradient, x, out, cos, sin, gain if has_gain else cos, partial, M, gradient.stride(0),
        x.stride(0), out.stride(0), positions, NORM_EPSILON, has_gain, programs, H, D,
        cos.shape[1], *tile,
    )  # fmt: skip
    return partial.sum(0)


@triton.jit
def _norm_and_rotate_backward(
    gradient_at, x_at, out_at, cos_at, sin_at, gain_at, partial_at, M, gradient_stride, stride,
    out_stride, positions, epsilon, HAS_GAIN: tl.constexpr, PROGRAMS: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, WIDE_H: tl.constexpr, WIDE_HALF: tl.constexpr, WIDE_REST: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, WIDE_H)
    gain_sum = tl.zeros((WIDE_H,), tl.float32)
    if HAS_GAIN:
        gain = tl.load(gain_at + heads, heads < H, other=0.0)[None, :]
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), PROGRAMS):
        rows = block * ROWS + tl.arange(0, ROWS)
        cos, sin = _rotation(cos_at, sin_at, rows, rows < M, positions, HALF, WIDE_HALF)
        x1, x2, x3, inverse = _normed_heads(
            x_at, rows, M, stride, epsilon, H, D, HALF, WIDE_H, WIDE_HALF, WIDE_REST
        )
        g1, g2, g3 = _load_heads(
            gradient_at, rows, M, gradient_stride, H, D, HALF, WIDE_H, WIDE_HALF, WIDE_REST
        )
        # The inverse rotation of the gradient: its product with x is that of both rotated.
        g1, g2 = g1 * cos - g2 * sin, g2 * cos + g1 * sin
        along = tl.sum(g1 * x1, 2) + tl.sum(g2 * x2, 2) + tl.sum(g3 * x3, 2)
        scale = inverse
        if HAS_GAIN:
            gain_sum += tl.sum(along, 0)
            scale = inverse * gain
        along = (along / D)[:, :, None]
        scale = scale[:, :, None]
        _store_heads(
            out_at, scale * (g1 - x1 * along), scale * (g2 - x2 * along), scale * (g3 - x3 * along),
            rows, M, out_stride, H, D, HALF, WIDE_H, WIDE_HALF, WIDE_REST,
        )  # fmt: skip
    tl.store(partial_at + tl.program_id(0) * H + heads, gain_sum, heads < H)


@triton.jit
def _normed_heads(
    x_at, rows, M, stride, epsilon, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    WIDE_H: tl.constexpr, WIDE_HALF: tl.constexpr, WIDE_REST: tl.constexpr,
):  # fmt: skip
    """The parts of each normed head, and 1 / its root mean square [rows, heads]."""
    first, second, rest = _load_heads(
        x_at, rows, M, stride, H, D, HALF, WIDE_H, WIDE_HALF, WIDE_REST
    )
    squares = tl.sum(first * first, 2) + tl.sum(second * second, 2) + tl.sum(rest * rest, 2)
    inverse = 1 / tl.sqrt(squares / D + epsilon)
    scale = inverse[:, :, None]
    return first * scale, second * scale, rest * scale, inverse


@triton.jit
def _load_heads(
    x_at, rows, M, stride, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    WIDE_H: tl.constexpr, WIDE_HALF: tl.constexpr, WIDE_REST: tl.constexpr,
):  # fmt: skip
    """Each head's first and second rotated half [rows, heads, half], and the rest, float32."""
    half_at, half_mask = _head_places(rows, M, stride, H, D, HALF, WIDE_H, WIDE_HALF)
    rest_at, rest_mask = _head_places(rows, M, stride, H, D, D - 2 * HALF, WIDE_H, WIDE_REST)
    first = tl.load(x_at + half_at, half_mask, other=0.0)
    second = tl.load(x_at + half_at + HALF, half_mask, other=0.0)
    rest = tl.load(x_at + rest_at + 2 * HALF, rest_mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)


@triton.jit
def _store_heads(
    out_at, first, second, rest, rows, M, stride, H: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, WIDE_H: tl.constexpr, WIDE_HALF: tl.constexpr, WIDE_REST: tl.constexpr,
):  # fmt: skip
    half_at, half_mask = _head_places(rows, M, stride, H, D, HALF, WIDE_H, WIDE_HALF)
    rest_at, rest_mask = _head_places(rows, M, stride, H, D, D - 2 * HALF, WIDE_H, WIDE_REST)
    tl.store(out_at + half_at, first, half_mask)
    tl.store(out_at + half_at + HALF, second, half_mask)
    tl.store(out_at + rest_at + 2 * HALF, rest, rest_mask)


@triton.jit
def _head_places(
    rows, M, stride, H: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    WIDE_H: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets of the first SIZE elements of every head of the rows, and which of them exist."""
    heads = tl.arange(0, WIDE_H)[None, :, None]
    places = tl.arange(0, WIDE)[None, None, :]
    at = rows.to(tl.int64)[:, None, None] * stride + heads * D + places
    return at, (rows < M)[:, None, None] & (heads < H) & (places < SIZE)


@triton.jit
def _rotation(cos_at, sin_at, rows, valid, positions, HALF: tl.constexpr, WIDE_HALF: tl.constexpr):
    """cos and sin [rows, 1, half] at each row's position."""
    places = tl.arange(0, WIDE_HALF)[None, :]
    at = (rows % positions)[:, None] * HALF + places
    mask = valid[:, None] & (places < HALF)
    cos = tl.load(cos_at + at, mask, other=0.0)
    return cos[:, None, :], tl.load(sin_at + at, mask, other=0.0)[:, None, :]


def _head_tile(
    heads: int, width: int, half: int, elements: int = ELEMENTS_PER_TILE
) -> tuple[int, int, int, int]:
    """Rows of a tile, and the powers of two that cover heads, a rotated half and the rest."""
    covers = [triton.next_power_of_2(max(1, size)) for size in (heads, half, width - 2 * half)]
    return (max(1, elements // triton.next_power_of_2(heads * width)), *covers)
