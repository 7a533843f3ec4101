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


def heads_backward(
    query_gradient: torch.Tensor,
    key_gradient: torch.Tensor,
    value_gradient: torch.Tensor,
    exclusion_gradient: torch.Tensor,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    gain: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of qkv [M, (H + 2·K)·D], and that of gain, float32 [H].

    From those of queries [M, H, D] and keys [M, K, D] after norm and rotation, and of values
    [M, K, D] in attention and in exclusion; all contiguous.
    """
    (M, H, D), K = query_gradient.shape, key_gradient.shape[1]
    out, programs = torch.empty_like(qkv), programs_over(M)
    partial = qkv.new_empty(programs, H, dtype=torch.float32)
    _heads_backward[(programs,)](
        query_gradient, key_gradient, value_gradient, exclusion_gradient, qkv, out, cos, sin, gain,
        partial, M, len(cos), NORM_EPSILON, programs, H, K, D, cos.shape[1],
        triton.next_power_of_2(H + 2 * K), triton.next_power_of_2(D), num_warps=1,
    )  # fmt: skip
    return out, partial.sum(0)


@triton.jit
def _heads_backward(
    query_gradient_at, key_gradient_at, value_gradient_at, exclusion_gradient_at, qkv_at, out_at,
    cos_at, sin_at, gain_at, partial_at, M, positions, epsilon, PROGRAMS: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    WIDE_H: tl.constexpr, WIDE_D: tl.constexpr,
):  # fmt: skip
    heads, places = tl.arange(0, WIDE_H)[:, None], tl.arange(0, WIDE_D)[None, :]
    at, inside = heads * D + places, places < D
    partners = tl.where(places < HALF, HALF, -HALF)
    turns = places < 2 * HALF
    gains = tl.load(gain_at + heads, heads < H, other=1.0)
    gain_sum = tl.zeros((WIDE_H, 1), tl.float32)
    for row in range(tl.program_id(0), M, PROGRAMS):
        row = tl.full((1, 1), row, tl.int64)
        queries_at = query_gradient_at + row * H * D + at
        keys_at = key_gradient_at + row * K * D + at - H * D
        # Each head is in one of the three: what is not there is zero.
        is_query, is_key, is_value = _kinds(heads, H, K)
        of_value = row * K * D + at - (H + K) * D
        gradient = _read(queries_at, is_query & inside) + _read(keys_at, is_key & inside)
        partner = _read(queries_at + partners, is_query & turns)
        partner += _read(keys_at + partners, is_key & turns)
        from_value = _read(value_gradient_at + of_value, is_value & inside)
        from_value += _read(exclusion_gradient_at + of_value, is_value & inside)
        angle = row % positions * HALF + places % HALF
        cos = tl.load(cos_at + angle, turns, other=1.0)
        sin = tl.load(sin_at + angle, turns, other=0.0)
        # Turned back: its product with x is that of the gradient with x turned.
        gradient = gradient * cos - partner * tl.where(places < HALF, sin, -sin)
        x = _read(qkv_at + row * (H + 2 * K) * D + at, (is_query | is_key) & inside)
        scale = 1 / tl.sqrt(tl.sum(x * x, 1) / D + epsilon)[:, None]
        x *= scale
        along = tl.sum(gradient * x, 1)[:, None]
        gain_sum += along
        gradient = gains * scale * (gradient - x * (along / D)) + from_value
        tl.store(out_at + row * (H + 2 * K) * D + at, gradient, (heads < H + 2 * K) & inside)
    tl.store(partial_at + tl.program_id(0) * H + heads, gain_sum, heads < H)


@triton.jit
def _kinds(heads, H: tl.constexpr, K: tl.constexpr):
    """Which of the heads that lie side by side are queries', keys' and values'."""
    return heads < H, (heads >= H) & (heads < H + K), (heads >= H + K) & (heads < H + 2 * K)


@triton.jit
def _read(at, mask):
    return tl.load(at, mask, other=0.0).to(tl.float32)


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
