"""The embedding of tokens, normed, and the gate that mixes the one before into each, in one pass.

A gate for each channel acts on normed embeddings, one that depends on the input acts before the
norm. Shapes: B sequences, T positions, M = B·T rows, C channels, V vocabulary.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fairway.model.functional import NORM_EPSILON
from fairway.model.fused.residual import norm_gradient
from fairway.model.fused.tiles import one_row, programs_over, row_grid, row_tile, rows_of

ROW_PROGRAMS = 12
"""Programs a multiprocessor that find registers in the backward passes."""


class Tokens(NamedTuple):
    """What is looked up."""

    tokens: torch.Tensor
    """int64 [B, T]."""
    buckets: torch.Tensor | None
    """int64 [B, T], rows of the bigrams' table, where there is one."""

    def gradients(self, rows: torch.Tensor, *tables: torch.Tensor | None):
        """Those of the tokens' and the bigrams' table, from the gradients of looked-up rows."""
        for table, places in zip(tables, self, strict=True):
            yield None if table is None else sums_by_token(rows, places, len(table))


def sums_by_token(rows: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """float32 [count, C]: for each token the sum of its rows of `rows` [M, C]."""
    scatter = torch.ops.aten.embedding_dense_backward
    return scatter(rows, tokens.flatten(), count, -1, False).float()


class Embed(torch.autograd.Function):
    """x0 [M, C] in `dtype`: the normed sum n of embeddings, or (1−g)·n_t + g·n_{t−1}.

    table, bigram_table: float32 [V, C], [buckets, C]; gate: float32 [C], after the sigmoid.
    """

    @staticmethod
    def forward(ctx, looked_up, table, bigram_table, gate, dtype):
        ctx.looked_up = looked_up
        ctx.save_for_backward(table, bigram_table, gate)
        tokens = looked_up.tokens
        out = torch.empty(tokens.numel(), table.shape[1], dtype=dtype, device=table.device)
        _embed[row_grid(out)](
            *_pointers(looked_up, table, bigram_table), table if gate is None else gate, out,
            *out.shape, tokens.shape[1], NORM_EPSILON, bigram_table is not None, gate is not None,
            *row_tile(out),
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, gradient):
        looked_up, (table, bigram_table, gate) = ctx.looked_up, ctx.saved_tensors
        rows, programs = torch.empty_like(gradient), programs_over(gradient, ROW_PROGRAMS)
        sums = gradient.new_empty(programs, gradient.shape[1], dtype=torch.float32)
        _embed_backward[(programs,)](
            gradient, *_pointers(looked_up, table, bigram_table), table if gate is None else gate,
            rows, sums, *gradient.shape, looked_up.tokens.shape[1], NORM_EPSILON,
            bigram_table is not None, gate is not None, programs, *one_row(gradient), num_warps=1,
        )  # fmt: skip
        tables = looked_up.gradients(rows, table, bigram_table)
        return None, *tables, None if gate is None else sums.sum(0), None


class EmbedGatedByInput(torch.autograd.Function):
    """x0 [M, C] in `dtype`: the norm of e_t + scale·σ(weights·e_t)·e_{t−1}, e the embeddings' sum.

    Tables as for `Embed`; weights float32 [n], for the first channels; scale a float32 scalar.
    Nothing is added at the token bos_id, nor at a sequence's start.
    """

    @staticmethod
    def forward(ctx, looked_up, table, bigram_table, weights, scale, bos_id, dtype):
        ctx.looked_up, ctx.bos_id = looked_up, bos_id
        ctx.save_for_backward(table, bigram_table, weights, scale)
        tokens = looked_up.tokens
        out = torch.empty(tokens.numel(), table.shape[1], dtype=dtype, device=table.device)
        _embed_gated[row_grid(out)](
            *_pointers(looked_up, table, bigram_table), weights, scale, out, *out.shape,
            tokens.shape[1], len(weights), bos_id, NORM_EPSILON, bigram_table is not None,
            *row_tile(out),
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, gradient):
        looked_up, (table, bigram_table, weights, scale) = ctx.looked_up, ctx.saved_tensors
        rows, programs = torch.empty_like(gradient), programs_over(gradient, ROW_PROGRAMS)
        weight_sums = gradient.new_empty(programs, len(weights), dtype=torch.float32)
        scale_sums = weight_sums.new_empty(programs)
        _embed_gated_backward[(programs,)](
            gradient, *_pointers(looked_up, table, bigram_table), weights, scale, rows,
            weight_sums, scale_sums, *gradient.shape, looked_up.tokens.shape[1], len(weights),
            ctx.bos_id, NORM_EPSILON, bigram_table is not None, programs, *one_row(gradient),
            num_warps=1,
        )  # fmt: skip
        tables = looked_up.gradients(rows, table, bigram_table)
        return None, *tables, weight_sums.sum(0), scale_sums.sum(), None, None


def _pointers(looked_up, table, bigram_table) -> tuple[torch.Tensor, ...]:
    if bigram_table is None:  # any others, which are not read
        return looked_up.tokens, looked_up.tokens, table, table
    return *looked_up, table, bigram_table


@triton.jit
def _embed(
    tokens_at, buckets_at, table_at, bigram_at, gate_at, out_at, M, C, T, epsilon,
    HAS_BIGRAMS: tl.constexpr, HAS_GATE: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows, at, mask = rows_of(tl.program_id(0), M, C, ROWS, WIDE)
    out, _ = _normed(_embedding(
        tokens_at, buckets_at, table_at, bigram_at, rows, rows < M, C, HAS_BIGRAMS, WIDE
    ), C, epsilon)  # fmt: skip
    if HAS_GATE:
        gate = _channels(gate_at, C, WIDE)
        has_previous = (rows < M) & (rows % T > 0)
        previous, _ = _normed(_embedding(
            tokens_at, buckets_at, table_at, bigram_at, rows - 1, has_previous, C, HAS_BIGRAMS, WIDE
        ), C, epsilon)  # fmt: skip
        out = (1 - gate) * out + gate * previous
    tl.store(out_at + at, out, mask)


@triton.jit
def _embed_backward(
    gradient_at, tokens_at, buckets_at, table_at, bigram_at, gate_at, rows_at, sums_at, M, C, T,
    epsilon, HAS_BIGRAMS: tl.constexpr, HAS_GATE: tl.constexpr, PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, WIDE)
    gate_sum = tl.zeros((WIDE,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), PROGRAMS):
        rows, at, mask = rows_of(block, M, C, ROWS, WIDE)
        own, inverse = _normed(_embedding(
            tokens_at, buckets_at, table_at, bigram_at, rows, rows < M, C, HAS_BIGRAMS, WIDE
        ), C, epsilon)  # fmt: skip
        gradient = tl.load(gradient_at + at, mask, other=0.0).to(tl.float32)
        if HAS_GATE:
            gate = _channels(gate_at, C, WIDE)
            has_previous = (rows < M) & (rows % T > 0)
            previous, _ = _normed(_embedding(
                tokens_at, buckets_at, table_at, bigram_at, rows - 1, has_previous, C, HAS_BIGRAMS,
                WIDE,
            ), C, epsilon)  # fmt: skip
            gate_sum += tl.sum(gradient * (previous - own), 0)
            has_next = mask & (rows % T < T - 1)[:, None]
            following = tl.load(gradient_at + at + C, has_next, other=0.0).to(tl.float32)
            gradient = (1 - gate) * gradient + gate * following
        tl.store(rows_at + at, norm_gradient(gradient, own, inverse, C), mask)
    if HAS_GATE:
        tl.store(sums_at + tl.program_id(0) * C + channels, gate_sum, channels < C)


@triton.jit
def _embed_gated(
    tokens_at, buckets_at, table_at, bigram_at, weights_at, scale_at, out_at, M, C, T, N, bos_id,
    epsilon, HAS_BIGRAMS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows, at, mask = rows_of(tl.program_id(0), M, C, ROWS, WIDE)
    weights, scale = _channels(weights_at, N, WIDE), tl.load(scale_at)
    own = _embedding(
        tokens_at, buckets_at, table_at, bigram_at, rows, rows < M, C, HAS_BIGRAMS, WIDE
    )
    takes = _takes_previous(tokens_at, rows, M, T, bos_id)
    previous = _embedding(
        tokens_at, buckets_at, table_at, bigram_at, rows - 1, takes, C, HAS_BIGRAMS, WIDE
    )
    gate = tl.sigmoid(tl.sum(own * weights, 1))
    out, _ = _normed(own + (scale * gate)[:, None] * previous, C, epsilon)
    tl.store(out_at + at, out, mask)


@triton.jit
def _embed_gated_backward(
    gradient_at, tokens_at, buckets_at, table_at, bigram_at, weights_at, scale_at, rows_at,
    weight_sums_at, scale_sums_at, M, C, T, N, bos_id, epsilon, HAS_BIGRAMS: tl.constexpr,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, WIDE)
    scale = tl.load(scale_at)
    weight_sum, scale_sum = tl.zeros((WIDE,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), PROGRAMS):
        rows, at, mask = rows_of(block, M, C, ROWS, WIDE)
        weights = _channels(weights_at, N, WIDE)
        own = _embedding(
            tokens_at, buckets_at, table_at, bigram_at, rows, rows < M, C, HAS_BIGRAMS, WIDE
        )
        takes = _takes_previous(tokens_at, rows, M, T, bos_id)
        previous = _embedding(
            tokens_at, buckets_at, table_at, bigram_at, rows - 1, takes, C, HAS_BIGRAMS, WIDE
        )
        gradient = tl.load(gradient_at + at, mask, other=0.0).to(tl.float32)
        gate, gradient = _before_gate(gradient, own, previous, weights, scale, C, epsilon)
        of_gate = tl.sum(gradient * previous, 1)
        scale_sum += gate * of_gate
        of_product = scale * gate * (1 - gate) * of_gate
        weight_sum += tl.sum(of_product[:, None] * own, 0)
        gradient += of_product[:, None] * weights

        given = _takes_previous(tokens_at, rows + 1, M, T, bos_id)
        following = _embedding(
            tokens_at, buckets_at, table_at, bigram_at, rows + 1, given, C, HAS_BIGRAMS, WIDE
        )
        later = tl.load(gradient_at + at + C, mask & given[:, None], other=0.0).to(tl.float32)
        gate, later = _before_gate(later, following, own, weights, scale, C, epsilon)
        gradient += tl.where(given, scale * gate, 0.0)[:, None] * later
        tl.store(rows_at + at, gradient, mask)
    tl.store(weight_sums_at + tl.program_id(0) * N + channels, weight_sum, channels < N)
    tl.store(scale_sums_at + tl.program_id(0), tl.sum(scale_sum, 0))


@triton.jit
def _before_gate(gradient, own, previous, weights, scale, C, epsilon):
    """The gate of each row, and from the gradient of its norm that before the norm."""
    gate = tl.sigmoid(tl.sum(own * weights, 1))
    normed, inverse = _normed(own + (scale * gate)[:, None] * previous, C, epsilon)
    return gate, norm_gradient(gradient, normed, inverse, C)


@triton.jit
def _takes_previous(tokens_at, rows, M, T, bos_id):
    """Whether the row before is mixed into each of `rows`."""
    inside = (rows < M) & (rows % T > 0)
    return inside & (tl.load(tokens_at + rows, inside, other=bos_id) != bos_id)


@triton.jit
def _embedding(
    tokens_at, buckets_at, table_at, bigram_at, rows, valid, C,
    HAS_BIGRAMS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sum of each row's embeddings, zero where not valid."""
    channels = tl.arange(0, WIDE)[None, :]
    mask = valid[:, None] & (channels < C)
    token = tl.load(tokens_at + rows, valid, other=0)
    x = tl.load(table_at + token[:, None] * C + channels, mask, other=0.0)
    if HAS_BIGRAMS:
        bucket = tl.load(buckets_at + rows, valid, other=0)
        x += tl.load(bigram_at + bucket[:, None] * C + channels, mask, other=0.0)
    return x


@triton.jit
def _normed(x, C, epsilon):
    """Each row over its root mean square, and 1 / that."""
    inverse = 1 / tl.sqrt(tl.sum(x * x, 1) / C + epsilon)
    return x * inverse[:, None], inverse


@triton.jit
def _channels(values_at, count, WIDE: tl.constexpr):
    """[1, WIDE]: the values there are, and zeros."""
    channels = tl.arange(0, WIDE)
    return tl.load(values_at + channels, channels < count, other=0.0)[None, :]


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
