"""Exclusive self-attention: each head's output without its projection on its own value; its gate.

The gate of a head is σ(weights·x[:N]) of attention's input x. Shapes: M rows (tokens), C channels,
H query heads, K key/value heads, D head width, N channels that gate.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fairway.model.functional import VALUE_NORM_EPSILON
from fairway.model.fused.tiles import multiprocessors

ELEMENTS_PER_TILE = 2048

GATE_ROWS = 64
"""Rows of a tile in the gates' own backward pass."""


class HeadGate(NamedTuple):
    """What the gates of a block depend on."""

    x: torch.Tensor
    """[M, C]."""
    weights: torch.Tensor
    """float32 [H, N]."""


def exclude_self(
    output: torch.Tensor, values: torch.Tensor, gate: HeadGate | None = None
) -> torch.Tensor:
    """Exclusive self-attention of output [M, H, D] and values [M, K, D] of any row stride."""
    M, H, D = output.shape
    K = values.shape[1]
    out = torch.empty_like(output)
    pairs, wide = _pair_tile(D)
    _exclude_self[(triton.cdiv(M * K, pairs),)](
        output, values, *_pointers(gate, output), out, M * K, values.stride(0), *_gate_sizes(gate),
        VALUE_NORM_EPSILON, K, H // K, D, pairs, wide,
    )  # fmt: skip
    return out


@triton.jit
def _exclude_self(
    output_at, values_at, x_at, weights_at, out_at, PAIRS, stride, C, N: tl.constexpr,
    WIDE_N: tl.constexpr, epsilon, K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pairs, value_at, mask = _value_offsets(tl.program_id(0), PAIRS, stride, K, D, TILE, WIDE)
    own = tl.load(values_at + value_at, mask, other=0.0).to(tl.float32)
    own /= tl.maximum(tl.sqrt(tl.sum(own * own, 1)), epsilon)[:, None]
    for member in tl.static_range(GROUP):
        at = (pairs.to(tl.int64) * GROUP + member)[:, None] * D + tl.arange(0, WIDE)[None, :]
        output = tl.load(output_at + at, mask, other=0.0).to(tl.float32)
        output -= tl.sum(output * own, 1)[:, None] * own
        if N:
            output *= _gate(x_at, weights_at, pairs, PAIRS, member, C, N, WIDE_N, K, GROUP)[:, None]
        tl.store(out_at + at, output, mask)


def exclude_self_backward(
    gradient: torch.Tensor,
    output: torch.Tensor,
    values: torch.Tensor,
    gate: HeadGate | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `exclude_self` in output [M, H, D] and in values, contiguous [M, K, D].

    And those of the gates' products with x, float32 [M, H], for `head_gate_backward`.
    """
    M, H, D = output.shape
    K = values.shape[1]
    output_gradient = torch.empty_like(output)
    values_gradient = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    gate_gradient = None if gate is None else output.new_empty(M, H, dtype=torch.float32)
    pairs, wide = _pair_tile(D)
    _exclude_self_backward[(triton.cdiv(M * K, pairs),)](
        gradient, output, values, *_pointers(gate, output), output_gradient, values_gradient,
        output if gate is None else gate_gradient, M * K, values.stride(0), *_gate_sizes(gate),
        VALUE_NORM_EPSILON, K, H // K, D, pairs, wide,
    )  # fmt: skip
    return output_gradient, values_gradient, gate_gradient


@triton.jit
def _exclude_self_backward(
    gradient_at, output_at, values_at, x_at, weights_at, output_gradient_at, values_gradient_at,
    gate_gradient_at, PAIRS, stride, C, N: tl.constexpr, WIDE_N: tl.constexpr, epsilon,
    K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pairs, value_at, mask = _value_offsets(tl.program_id(0), PAIRS, stride, K, D, TILE, WIDE)
    channels = tl.arange(0, WIDE)[None, :]
    own = tl.load(values_at + value_at, mask, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(own * own, 1)), epsilon)[:, None]
    own /= norm
    own_gradient = tl.zeros((TILE, WIDE), tl.float32)
    for member in tl.static_range(GROUP):
        heads = pairs.to(tl.int64) * GROUP + member
        at = heads[:, None] * D + channels
        output = tl.load(output_at + at, mask, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_at + at, mask, other=0.0).to(tl.float32)
        output_along = tl.sum(output * own, 1)
        if N:
            gate = _gate(x_at, weights_at, pairs, PAIRS, member, C, N, WIDE_N, K, GROUP)
            of_gate = tl.sum(gradient * (output - output_along[:, None] * own), 1)
            tl.store(gate_gradient_at + heads, of_gate * gate * (1 - gate), pairs < PAIRS)
            gradient *= gate[:, None]
        along = tl.sum(gradient * own, 1)[:, None]
        own_gradient -= output_along[:, None] * gradient + along * output
        tl.store(output_gradient_at + at, gradient - along * own, mask)
    along = tl.sum(own_gradient * own, 1)[:, None]
    at = pairs.to(tl.int64)[:, None] * D + channels
    tl.store(values_gradient_at + at, (own_gradient - along * own) / norm, mask)


@triton.jit
def _gate(
    x_at, weights_at, pairs, PAIRS, member, C, N: tl.constexpr, WIDE_N: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gate of one head of each pair, float32."""
    inputs = tl.arange(0, WIDE_N)[None, :]
    rows, heads = (pairs // K).to(tl.int64), pairs % K * GROUP + member
    mask = (pairs < PAIRS)[:, None] & (inputs < N)
    x = tl.load(x_at + rows[:, None] * C + inputs, mask, other=0.0).to(tl.float32)
    weights = tl.load(weights_at + heads[:, None] * N + inputs, mask, other=0.0)
    return tl.sigmoid(tl.sum(x * weights, 1))


def head_gate_backward(
    gradient: torch.Tensor, gate: HeadGate, x_gradient: torch.Tensor
) -> torch.Tensor:
    """The gradient of the gates' weights, float32 [H, N], from that of their products [M, H].

    Adds to x's gradient, [M, C], in place.
    """
    (M, H), (_, C, N, wide_n) = gradient.shape, (*gate.x.shape, *_gate_sizes(gate)[1:])
    programs = min(triton.cdiv(M, GATE_ROWS), 8 * multiprocessors(gradient.device))
    sums = gradient.new_empty(programs, H, N)
    wide_h = max(16, triton.next_power_of_2(H))
    _head_gate_backward[(programs,)](
        gradient, *gate, x_gradient, sums, M, C, H, N, programs, GATE_ROWS, wide_h, wide_n
    )
    return sums.sum(0)


@triton.jit
def _head_gate_backward(
    gradient_at, x_at, weights_at, x_gradient_at, sums_at, M, C, H: tl.constexpr, N: tl.constexpr,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, WIDE_H: tl.constexpr, WIDE_N: tl.constexpr,
):  # fmt: skip
    heads, inputs = tl.arange(0, WIDE_H), tl.arange(0, WIDE_N)[None, :]
    weights_offsets = heads[:, None] * N + inputs
    exists = (heads < H)[:, None] & (inputs < N)
    weights = tl.load(weights_at + weights_offsets, exists, other=0.0)
    sums = tl.zeros((WIDE_H, WIDE_N), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(M, ROWS), PROGRAMS):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        at, mask = rows * C + inputs, (rows < M) & (inputs < N)
        head_mask = (rows < M) & (heads < H)[None, :]
        gradient = tl.load(gradient_at + rows * H + heads[None, :], head_mask, other=0.0)
        x = tl.load(x_at + at, mask, other=0.0).to(tl.float32)
        x_gradient = tl.load(x_gradient_at + at, mask, other=0.0).to(tl.float32)
        x_gradient = tl.dot(gradient, weights, x_gradient, input_precision="ieee")
        tl.store(x_gradient_at + at, x_gradient, mask)
        sums = tl.dot(gradient.T, x, sums, input_precision="ieee")
    tl.store(sums_at + tl.program_id(0) * H * N + weights_offsets, sums, exists)


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


def _pointers(gate: HeadGate | None, unread: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (unread, unread) if gate is None else gate


def _gate_sizes(gate: HeadGate | None) -> tuple[int, int, int]:
    """C, N and the power of two that covers N, at least 16 as a matrix product wants it."""
    if gate is None:
        return 0, 0, 1
    N = gate.weights.shape[1]
    return gate.x.shape[1], N, max(16, triton.next_power_of_2(N))
