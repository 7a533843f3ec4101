"""Token and bigram embeddings, normed, and SmearGate, in one pass."""

import torch
import triton
import triton.language as tl

from fairway.model.functional import NORM_EPSILON
from fairway.model.fused.tiles import one_row, programs_over, row_grid, row_tile, rows_of


def embed(
    tokens: torch.Tensor,
    buckets: torch.Tensor,
    table: torch.Tensor,
    bigram_table: torch.Tensor,
    gate: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Normed sum of token and bigram embeddings, then SmearGate: [B·T, C] in `dtype`.

    tokens, buckets: int64 [B, T]; table, bigram_table: float32 [V, C], [buckets, C]; gate: float32
    [C], after the sigmoid.
    """
    B, T = tokens.shape
    out = torch.empty(B * T, table.shape[1], dtype=dtype, device=table.device)
    _embed[row_grid(out)](
        tokens, buckets, table, bigram_table, gate, out, *out.shape, T, NORM_EPSILON, *row_tile(out)
    )
    return out


@triton.jit
def _embed(
    tokens_at, buckets_at, table_at, bigram_at, gate_at, out_at, M, C, T, epsilon,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows, at, mask = rows_of(tl.program_id(0), M, C, ROWS, WIDE)
    channels = tl.arange(0, WIDE)
    gate = tl.load(gate_at + channels, channels < C, other=0.0)[None, :]
    own, _ = _embedding(
        tokens_at, buckets_at, table_at, bigram_at, rows, rows < M, C, epsilon, WIDE
    )
    has_previous = (rows < M) & (rows % T > 0)
    previous, _ = _embedding(
        tokens_at, buckets_at, table_at, bigram_at, rows - 1, has_previous, C, epsilon, WIDE
    )
    tl.store(out_at + at, (1 - gate) * own + gate * previous, mask)


def add_embedding(
    x: torch.Tensor, tokens: torch.Tensor, table: torch.Tensor, scale: torch.Tensor
) -> None:
    """Add scale times each token's row of `table` [V, C] to x [M, C] of any row stride, in place.

    tokens: int64, M in all; scale: a float32 scalar.
    """
    _add_embedding[row_grid(x)](x, tokens, table, scale, *x.shape, x.stride(0), *row_tile(x))


@triton.jit
def _add_embedding(
    x_at, tokens_at, table_at, scale_at, M, C, stride, ROWS: tl.constexpr, WIDE: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WIDE)[None, :]
    mask = (rows < M)[:, None] & (channels < C)
    token = tl.load(tokens_at + rows, rows < M, other=0)
    added = tl.load(table_at + token[:, None] * C + channels, mask, other=0.0).to(tl.float32)
    at = rows.to(tl.int64)[:, None] * stride + channels
    x = tl.load(x_at + at, mask, other=0.0).to(tl.float32)
    tl.store(x_at + at, x + tl.load(scale_at) * added, mask)


def embed_backward(
    gradient: torch.Tensor,
    tokens: torch.Tensor,
    buckets: torch.Tensor,
    table: torch.Tensor,
    bigram_table: torch.Tensor,
    gate: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the gradient of `embed` [M, C]: that of both tables' rows, [M, C], and of gate [C]."""
    M, C = gradient.shape
    out = torch.empty_like(gradient)
    programs = programs_over(gradient, 12)
    partial = gradient.new_empty(programs, C, dtype=torch.float32)
    _embed_backward[(programs,)](
        gradient, tokens, buckets, table, bigram_table, gate, out, partial, M, C, tokens.shape[1],
        NORM_EPSILON, programs, *one_row(gradient), num_warps=1,
    )  # fmt: skip
    return out, partial.sum(0)


@triton.jit
def _embed_backward(
    gradient_at, tokens_at, buckets_at, table_at, bigram_at, gate_at, out_at, partial_at, M, C, T,
    epsilon, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, WIDE)
    gate = tl.load(gate_at + channels, channels < C, other=0.0)[None, :]
    gate_sum = tl.zeros((WIDE,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), PROGRAMS):
        rows, at, mask = rows_of(block, M, C, ROWS, WIDE)
        own, inverse = _embedding(
            tokens_at, buckets_at, table_at, bigram_at, rows, rows < M, C, epsilon, WIDE
        )
        has_previous = (rows < M) & (rows % T > 0)
        previous, _ = _embedding(
            tokens_at, buckets_at, table_at, bigram_at, rows - 1, has_previous, C, epsilon, WIDE
        )
        gradient = tl.load(gradient_at + at, mask, other=0.0).to(tl.float32)
        gate_sum += tl.sum(gradient * (previous - own), 0)
        has_next = mask & (rows % T < T - 1)[:, None]
        following = tl.load(gradient_at + at + C, has_next, other=0.0).to(tl.float32)
        own_gradient = (1 - gate) * gradient + gate * following
        along = tl.sum(own_gradient * own, 1) / C
        tl.store(out_at + at, inverse[:, None] * (own_gradient - own * along[:, None]), mask)
    tl.store(partial_at + tl.program_id(0) * C + channels, gate_sum, channels < C)


@triton.jit
def _embedding(
    tokens_at, buckets_at, table_at, bigram_at, rows, valid, C, epsilon, WIDE: tl.constexpr
):
    """The normed embedding of each row, zero where not valid, and 1 / its root mean square."""
    channels = tl.arange(0, WIDE)[None, :]
    mask = valid[:, None] & (channels < C)
    token = tl.load(tokens_at + rows, valid, other=0)
    bucket = tl.load(buckets_at + rows, valid, other=0)
    x = tl.load(table_at + token[:, None] * C + channels, mask, other=0.0)
    x += tl.load(bigram_at + bucket[:, None] * C + channels, mask, other=0.0)
    inverse = 1 / tl.sqrt(tl.sum(x * x, 1) / C + epsilon)
    return x * inverse[:, None], inverse
