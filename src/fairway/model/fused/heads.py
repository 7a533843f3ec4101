"""Single heads before attention: RMS norm, rotary embedding, gain.

Rotation turns pairs of a head's channels, one from each half of its first dimensions. A tile holds
the heads of one row, for one warp; each channel's partner in its pair is read a second time, from
the cache. Shapes: M rows (tokens), H query heads, K key/value heads, D head width.
"""

import torch
import triton
import triton.language as tl

from fairway.model.functional import NORM_EPSILON
from fairway.model.fused.tiles import add_to_own, programs_over

ROWS_PER_PROGRAM = 2
"""Rows that a program of the forward pass takes, unrolled so that none waits for another."""

ROW_PROGRAMS = 28
"""Of the backward pass on a multiprocessor."""


def norm_and_rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    gain: torch.Tensor | None,
    positions: int,
    copies: int = 1,
) -> torch.Tensor:
    """Per head: RMS norm, rotary embedding of the first dimensions, gain.

    x: [M, H, D], queries or keys, of any row stride. cos, sin: float32
    [positions, half]; row m is at position m mod `positions`. gain: float32 [H]. Contiguous
    [M, H·copies, D], each head's copies side by side.
    """
    M, H, D = x.shape
    out = torch.empty(M, H * copies, D, dtype=x.dtype, device=x.device)
    _norm_and_rotate[(triton.cdiv(M, ROWS_PER_PROGRAM),)](
        x, out, cos, sin, cos if gain is None else gain, M, x.stride(0), positions, NORM_EPSILON,
        gain is not None, ROWS_PER_PROGRAM, H, D, cos.shape[1], copies, triton.next_power_of_2(H),
        triton.next_power_of_2(D), num_warps=1,
    )  # fmt: skip
    return out


def copy_heads(x: torch.Tensor, copies: int) -> torch.Tensor:
    """x [M, K, D] of any row stride as contiguous [M, K·copies, D]."""
    M, K, D = x.shape
    out = torch.empty(M, K * copies, D, dtype=x.dtype, device=x.device)
    _copy_heads[(triton.cdiv(M, ROWS_PER_PROGRAM),)](
        x, out, M, x.stride(0), ROWS_PER_PROGRAM, K, D, copies, triton.next_power_of_2(K),
        triton.next_power_of_2(D), num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _norm_and_rotate(
    x_at, out_at, cos_at, sin_at, gain_at, M, stride, positions, epsilon, HAS_GAIN: tl.constexpr,
    ROWS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    COPIES: tl.constexpr, WIDE_H: tl.constexpr, WIDE_D: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, WIDE_H)[:, None]
    at, mask = _offsets(H, D, WIDE_H, WIDE_D)
    gain = 1.0
    if HAS_GAIN:
        gain = tl.load(gain_at + heads, heads < H, other=0.0)
    for number in tl.static_range(ROWS):
        row = tl.full((1, 1), tl.program_id(0) * ROWS + number, tl.int64)
        exists = mask & (row < M)
        cos, sin = _angles(cos_at, sin_at, row % positions, HALF, WIDE_D)
        x, turned = _turned(x_at + row * stride, exists, cos, sin, at, HALF, WIDE_D)
        scale = 1 / tl.sqrt(tl.sum(x * x, 1) / D + epsilon)[:, None]
        for copy in tl.static_range(COPIES):
            out = row * (H * COPIES * D) + _copy_offsets(copy, COPIES, D, WIDE_H, WIDE_D)
            tl.store(out_at + out, gain * scale * turned, exists)


@triton.jit
def _copy_heads(
    x_at, out_at, M, stride, ROWS: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    COPIES: tl.constexpr, WIDE_K: tl.constexpr, WIDE_D: tl.constexpr,
):  # fmt: skip
    at, mask = _offsets(K, D, WIDE_K, WIDE_D)
    for number in tl.static_range(ROWS):
        row = tl.full((1, 1), tl.program_id(0) * ROWS + number, tl.int64)
        exists = mask & (row < M)
        x = tl.load(x_at + row * stride + at, exists)
        for copy in tl.static_range(COPIES):
            out = row * (K * COPIES * D) + _copy_offsets(copy, COPIES, D, WIDE_K, WIDE_D)
            tl.store(out_at + out, x, exists)


def heads_backward(
    query_gradient: torch.Tensor,
    key_gradient: torch.Tensor,
    value_gradient: torch.Tensor,
    exclusion_gradient: torch.Tensor,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    gain: torch.Tensor,
    sums: torch.Tensor,
) -> torch.Tensor:
    """The gradient of qkv [M, (H + 2·K)·D].

    From those of queries [M, H, D] and keys after norm and rotation, of values in attention, both
    [M, K·copies, D], and of values in exclusion [M, K, D]; all contiguous. sums: of `gain_sums` for
    one block; the partial sums of the gradient of gain are added to them.
    """
    (M, H, D), K = query_gradient.shape, exclusion_gradient.shape[1]
    out, programs = torch.empty_like(qkv), len(sums)
    _heads_backward[(programs,)](
        query_gradient, key_gradient, value_gradient, exclusion_gradient, qkv, out, cos, sin, gain,
        sums, M, len(cos), NORM_EPSILON, programs, H, K, D, cos.shape[1],
        key_gradient.shape[1] // K, *map(triton.next_power_of_2, (H, K, D)), num_warps=1,
    )  # fmt: skip
    return out


def gain_sums(x: torch.Tensor, heads: int, blocks: int) -> torch.Tensor:
    """Memory for partial sums of `heads_backward` over x: float32 zeros [blocks, programs, heads].

    A block may run several times.
    """
    return x.new_zeros(blocks, programs_over(x, ROW_PROGRAMS), heads, dtype=torch.float32)


@triton.jit
def _heads_backward(
    query_gradient_at, key_gradient_at, value_gradient_at, exclusion_gradient_at, qkv_at, out_at,
    cos_at, sin_at, gain_at, sums_at, M, positions, epsilon, PROGRAMS: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, COPIES: tl.constexpr,
    WIDE_H: tl.constexpr, WIDE_K: tl.constexpr, WIDE_D: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = (H + 2 * K) * D
    heads = tl.arange(0, WIDE_H)[:, None]
    gain = tl.load(gain_at + heads, heads < H, other=0.0)
    gain_sum = tl.zeros((WIDE_H, 1), tl.float32)
    for row in range(tl.program_id(0), M, PROGRAMS):
        row = tl.full((1, 1), row, tl.int64)
        cos, sin = _angles(cos_at, sin_at, row % positions, HALF, WIDE_D)
        of_queries, of_keys = row * WIDTH, row * WIDTH + H * D
        gain_sum += _turn_back(
            query_gradient_at + row * (H * D), qkv_at + of_queries, out_at + of_queries,
            cos, sin, gain, epsilon, H, D, HALF, 1, WIDE_H, WIDE_D,
        )  # fmt: skip
        of_copies = row * (K * COPIES * D)
        _turn_back(
            key_gradient_at + of_copies, qkv_at + of_keys, out_at + of_keys,
            cos, sin, 1.0, epsilon, K, D, HALF, COPIES, WIDE_K, WIDE_D,
        )  # fmt: skip
        at, mask = _offsets(K, D, WIDE_K, WIDE_D)
        exclusion = tl.load(exclusion_gradient_at + row * (K * D) + at, mask, other=0.0)
        value = exclusion.to(tl.float32)
        for copy in tl.static_range(COPIES):
            copy_at = of_copies + _copy_offsets(copy, COPIES, D, WIDE_K, WIDE_D)
            value += tl.load(value_gradient_at + copy_at, mask, other=0.0)
        tl.store(out_at + of_keys + K * D + at, value, mask)
    add_to_own(sums_at + tl.program_id(0) * H + heads, gain_sum, heads < H)


@triton.jit
def _turn_back(
    gradient_at, x_at, out_at, cos, sin, gain, epsilon, H: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, COPIES: tl.constexpr, WIDE_H: tl.constexpr, WIDE_D: tl.constexpr,
):  # fmt: skip
    """Write a row's gradient before norm, rotation and gain; return the gain's, [H, 1]."""
    at, mask = _offsets(H, D, WIDE_H, WIDE_D)
    # Its product with x is that of the gradient with x turned.
    gradient = tl.zeros((WIDE_H, WIDE_D), tl.float32)
    for copy in tl.static_range(COPIES):
        copy_at = _copy_offsets(copy, COPIES, D, WIDE_H, WIDE_D)
        _, turned = _turned(gradient_at, mask, cos, -sin, copy_at, HALF, WIDE_D)
        gradient += turned
    x = tl.load(x_at + at, mask, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, 1) / D + epsilon)[:, None]
    x *= scale
    along = tl.sum(gradient * x, 1)[:, None]
    tl.store(out_at + at, gain * scale * (gradient - x * (along / D)), mask)
    return along


@triton.jit
def _turned(x_at, mask, cos, sin, at, HALF: tl.constexpr, WIDE_D: tl.constexpr):
    """A row's heads as they are and rotated, float32 [heads, D]."""
    channels = tl.arange(0, WIDE_D)[None, :]
    partners = at + tl.where(channels < HALF, HALF, -HALF)
    x = tl.load(x_at + at, mask, other=0.0).to(tl.float32)
    partner = tl.load(x_at + partners, mask & (channels < 2 * HALF), other=0.0).to(tl.float32)
    return x, x * cos + partner * sin


@triton.jit
def _angles(cos_at, sin_at, position, HALF: tl.constexpr, WIDE_D: tl.constexpr):
    """The factors of a channel and of its partner, float32 [1, D]: cos and ± sin."""
    channels = tl.arange(0, WIDE_D)[None, :]
    at, turns = position * HALF + channels % HALF, channels < 2 * HALF
    sin = tl.load(sin_at + at, turns, other=0.0)
    return tl.load(cos_at + at, turns, other=1.0), tl.where(channels < HALF, sin, -sin)


@triton.jit
def _offsets(H: tl.constexpr, D: tl.constexpr, WIDE_H: tl.constexpr, WIDE_D: tl.constexpr):
    """Offsets in a row of heads, and which of them exist."""
    heads, channels = tl.arange(0, WIDE_H)[:, None], tl.arange(0, WIDE_D)[None, :]
    return heads * D + channels, (heads < H) & (channels < D)


@triton.jit
def _copy_offsets(
    copy, COPIES: tl.constexpr, D: tl.constexpr, WIDE_H: tl.constexpr, WIDE_D: tl.constexpr
):
    """Offsets of every head's `copy` in a row of heads with COPIES of each."""
    heads, channels = tl.arange(0, WIDE_H)[:, None], tl.arange(0, WIDE_D)[None, :]
    return (heads * COPIES + copy) * D + channels
