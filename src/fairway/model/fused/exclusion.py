"""Exclusive self-attention: each head's output without its projection on its own value.

Shapes: M rows (tokens), H query heads, K key/value heads, D head width.
"""

import torch
import triton
import triton.language as tl

from fairway.model.functional import VALUE_NORM_EPSILON

ELEMENTS_PER_TILE = 2048


def exclude_self(output: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Exclusive self-attention of output [M, H, D] and values [M, K, D] of any row stride."""
    M, H, D = output.shape
    K = values.shape[1]
    out = torch.empty_like(output)
    pairs, wide = _pair_tile(D)
    _exclude_self[(triton.cdiv(M * K, pairs),)](
        output, values, out, M * K, values.stride(0), VALUE_NORM_EPSILON, K, H // K, D, pairs, wide
    )
    return out


@triton.jit
def _exclude_self(
    output_at, values_at, out_at, PAIRS, stride, epsilon, K: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pairs, value_at, mask = _value_offsets(tl.program_id(0), PAIRS, stride, K, D, TILE, WIDE)
    own = tl.load(values_at + value_at, mask, other=0.0).to(tl.float32)
    own /= tl.maximum(tl.sqrt(tl.sum(own * own, 1)), epsilon)[:, None]
    for member in tl.static_range(GROUP):
        at = (pairs.to(tl.int64) * GROUP + member)[:, None] * D + tl.arange(0, WIDE)[None, :]
        output = tl.load(output_at + at, mask, other=0.0).to(tl.float32)
        tl.store(out_at + at, output - tl.sum(output * own, 1)[:, None] * own, mask)


def exclude_self_backward(
    gradient: torch.Tensor, output: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `exclude_self` in output [M, H, D] and in values, contiguous [M, K, D]."""
    M, H, D = output.shape
    K = values.shape[1]
    output_gradient = torch.empty_like(output)
    values_gradient = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    pairs, wide = _pair_tile(D)
    _exclude_self_backward[(triton.cdiv(M * K, pairs),)](
        gradient, output, values, output_gradient, values_gradient, M * K, values.stride(0),
        VALUE_NORM_EPSILON, K, H // K, D, pairs, wide,
    )  # fmt: skip
    return output_gradient, values_gradient


@triton.jit
def _exclude_self_backward(
    gradient_at, output_at, values_at, output_gradient_at, values_gradient_at, PAIRS, stride,
    epsilon, K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pairs, value_at, mask = _value_offsets(tl.program_id(0), PAIRS, stride, K, D, TILE, WIDE)
    channels = tl.arange(0, WIDE)[None, :]
    own = tl.load(values_at + value_at, mask, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(own * own, 1)), epsilon)[:, None]
    own /= norm
    own_gradient = tl.zeros((TILE, WIDE), tl.float32)
    for member in tl.static_range(GROUP):
        at = (pairs.to(tl.int64) * GROUP + member)[:, None] * D + channels
        output = tl.load(output_at + at, mask, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_at + at, mask, other=0.0).to(tl.float32)
        along = tl.sum(gradient * own, 1)[:, None]
        own_gradient -= tl.sum(output * own, 1)[:, None] * gradient + along * output
        tl.store(output_gradient_at + at, gradient - along * own, mask)
    along = tl.sum(own_gradient * own, 1)[:, None]
    at = pairs.to(tl.int64)[:, None] * D + channels
    tl.store(values_gradient_at + at, (own_gradient - along * own) / norm, mask)


@triton.jit
def _value_offsets(
    block, PAIRS, stride, K: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr
):
    """A tile of (row, key/value head) pairs, the offsets of their values, and which exist."""
    pairs = block * TILE + tl.arange(0, TILE)
    channels = tl.arange(0, WIDE)[None, :]
    at = (pairs // K).to(tl.int64)[:, None] * stride + (pairs % K)[:, None] * D + channels
    return pairs, at, (pairs < PAIRS)[:, None] & (channels < D)


def _pair_tile(width: int) -> tuple[int, int]:
    wide = triton.next_power_of_2(width)
    return max(1, ELEMENTS_PER_TILE // wide), wide
