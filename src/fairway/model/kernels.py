"""Triton kernels of the fused model: each reads and writes every activation once.

They hold what lies between the matrix products and the attention of `fairway.model.gpt`, whose
plain formulation is their reference. Arithmetic is float32 whatever the activations' dtype. A
kernel runs over rows (tokens) in tiles; sums over all rows, the gradients of per-channel
parameters, are left as one partial sum per program, so that they do not depend on timing.

Shapes: M rows, C channels, H heads (of queries or keys), K key/value heads, D head width.
"""

import torch
import triton
import triton.language as tl

from fairway.model.gpt import NORM_EPSILON, VALUE_NORM_EPSILON

ELEMENTS_PER_TILE = 4096
PROGRAMS = 1056
"""Of a kernel that sums over rows: 8 for each of an H200's 132 multiprocessors."""


def rms_norm(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, C] → x / rms(x), and 1 / rms(x) as float32 [M]."""
    normed, inverse = torch.empty_like(x), _per_row(x)
    _rms_norm[_grid(x)](x, normed, inverse, *x.shape, NORM_EPSILON, *_tile(x))
    return normed, inverse


@triton.jit
def _rms_norm(x_at, normed_at, inverse_at, M, C, epsilon, ROWS: tl.constexpr, WIDE: tl.constexpr):
    rows, at, mask = _rows_of(tl.program_id(0), M, C, ROWS, WIDE)
    x = tl.load(x_at + at, mask, other=0.0).to(tl.float32)
    inverse = 1 / tl.sqrt(tl.sum(x * x, 1) / C + epsilon)
    tl.store(normed_at + at, x * inverse[:, None], mask)
    tl.store(inverse_at + rows, inverse, rows < M)


def rms_norm_backward(
    gradient: torch.Tensor, normed: torch.Tensor, inverse: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """`residual` plus the gradient of rms_norm's input, [M, C], from that of its output."""
    out = torch.empty_like(residual)
    _rms_norm_backward[_grid(out)](
        gradient, normed, inverse, residual, out, *out.shape, *_tile(out)
    )
    return out


@triton.jit
def _rms_norm_backward(
    gradient_at, normed_at, inverse_at, residual_at, out_at, M, C,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows, at, mask = _rows_of(tl.program_id(0), M, C, ROWS, WIDE)
    inner = _norm_gradient(gradient_at, normed_at, inverse_at, rows, at, mask, M, C)
    residual = tl.load(residual_at + at, mask, other=0.0).to(tl.float32)
    tl.store(out_at + at, residual + inner, mask)


def mix_and_norm(
    x: torch.Tensor,
    x0: torch.Tensor,
    mix: torch.Tensor,
    skip: torch.Tensor | None,
    skip_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The start of a block: u = mix₀·(x + skip_weight·skip) + mix₁·x0, normed.

    x, x0, skip [M, C]; mix float32 [2, C]; skip_weight float32 [C]. Returns u, u / rms(u) and
    1 / rms(u) as float32 [M].
    """
    mixed, normed, inverse = torch.empty_like(x), torch.empty_like(x), _per_row(x)
    has_skip = skip is not None
    _mix_and_norm[_grid(x)](
        x, x0, skip if has_skip else x, mix, skip_weight if has_skip else mix,
        mixed, normed, inverse, *x.shape, NORM_EPSILON, has_skip, *_tile(x),
    )  # fmt: skip
    return mixed, normed, inverse


@triton.jit
def _mix_and_norm(
    x_at, x0_at, skip_at, mix_at, skip_weight_at, mixed_at, normed_at, inverse_at, M, C, epsilon,
    HAS_SKIP: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows, at, mask = _rows_of(tl.program_id(0), M, C, ROWS, WIDE)
    channels = tl.arange(0, WIDE)
    inside = channels < C
    x = tl.load(x_at + at, mask, other=0.0).to(tl.float32)
    if HAS_SKIP:
        weight = tl.load(skip_weight_at + channels, inside, other=0.0)
        x += weight[None, :] * tl.load(skip_at + at, mask, other=0.0).to(tl.float32)
    x0 = tl.load(x0_at + at, mask, other=0.0).to(tl.float32)
    mix0 = tl.load(mix_at + channels, inside, other=0.0)
    mix1 = tl.load(mix_at + C + channels, inside, other=0.0)
    mixed = mix0[None, :] * x + mix1[None, :] * x0
    inverse = 1 / tl.sqrt(tl.sum(mixed * mixed, 1) / C + epsilon)
    tl.store(mixed_at + at, mixed, mask)
    tl.store(normed_at + at, mixed * inverse[:, None], mask)
    tl.store(inverse_at + rows, inverse, rows < M)


def mix_and_norm_backward(
    residual: torch.Tensor,
    gradient: torch.Tensor,
    normed: torch.Tensor,
    inverse: torch.Tensor,
    x: torch.Tensor,
    x0: torch.Tensor,
    mix: torch.Tensor,
    skip: torch.Tensor | None,
    skip_weight: torch.Tensor | None,
    later: torch.Tensor | None,
    later_weight: torch.Tensor | None,
    x0_gradient: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `mix_and_norm`, from those of u (`residual`) and of its norm (`gradient`).

    Adds to `x0_gradient` in place. Returns the gradient of x + skip_weight·skip; the gradient that
    the block before receives; and those of mix [2, C] and skip_weight [C], float32. The second is
    the first, but where x is the skip of a later block (with weight `later_weight`): then plus
    later_weight·later, with `later` the first result for that block, or None for this very block.
    """
    M, C = x.shape
    inner = torch.empty_like(x)
    has_skip, has_later = skip is not None, later_weight is not None
    outer = torch.empty_like(x) if has_later else inner
    tile = _tile(x, ELEMENTS_PER_TILE // 2)
    programs = _programs(M, tile[0])
    partial = x.new_empty(3, programs, C, dtype=torch.float32)
    _mix_and_norm_backward[(programs,)](
        residual, gradient, normed, inverse, x, x0, skip if has_skip else x,
        inner if later is None else later, mix, skip_weight if has_skip else mix,
        later_weight if has_later else mix, x0_gradient, inner, outer, partial,
        M, C, has_skip, has_later, later is None, programs, *tile,
    )  # fmt: skip
    sums = partial.sum(1)
    return inner, outer, sums[:2], sums[2]


@triton.jit
def _mix_and_norm_backward(
    residual_at, gradient_at, normed_at, inverse_at, x_at, x0_at, skip_at, later_at, mix_at,
    skip_weight_at, later_weight_at, x0_gradient_at, inner_at, outer_at, partial_at, M, C,
    HAS_SKIP: tl.constexpr, HAS_LATER: tl.constexpr, LATER_IS_OWN: tl.constexpr,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, WIDE)
    inside = channels < C
    mix0 = tl.load(mix_at + channels, inside, other=0.0)
    mix1 = tl.load(mix_at + C + channels, inside, other=0.0)
    if HAS_SKIP:
        skip_weight = tl.load(skip_weight_at + channels, inside, other=0.0)
    if HAS_LATER:
        later_weight = tl.load(later_weight_at + channels, inside, other=0.0)
    mix0_sum = tl.zeros((WIDE,), tl.float32)
    mix1_sum = tl.zeros((WIDE,), tl.float32)
    skip_sum = tl.zeros((WIDE,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), PROGRAMS):
        rows, at, mask = _rows_of(block, M, C, ROWS, WIDE)
        mixed = tl.load(residual_at + at, mask, other=0.0).to(tl.float32)
        mixed += _norm_gradient(gradient_at, normed_at, inverse_at, rows, at, mask, M, C)
        inner = mix0[None, :] * mixed
        x = tl.load(x_at + at, mask, other=0.0).to(tl.float32)
        if HAS_SKIP:
            skip = tl.load(skip_at + at, mask, other=0.0).to(tl.float32)
            skip_sum += tl.sum(inner * skip, 0)
            x += skip_weight[None, :] * skip
        x0 = tl.load(x0_at + at, mask, other=0.0).to(tl.float32)
        mix0_sum += tl.sum(mixed * x, 0)
        mix1_sum += tl.sum(mixed * x0, 0)
        x0_gradient = tl.load(x0_gradient_at + at, mask, other=0.0).to(tl.float32)
        tl.store(x0_gradient_at + at, x0_gradient + mix1[None, :] * mixed, mask)
        tl.store(inner_at + at, inner, mask)
        if HAS_LATER:
            if LATER_IS_OWN:
                later = inner
            else:
                later = tl.load(later_at + at, mask, other=0.0).to(tl.float32)
            tl.store(outer_at + at, inner + later_weight[None, :] * later, mask)
    own = partial_at + tl.program_id(0) * C + channels
    tl.store(own, mix0_sum, inside)
    tl.store(own + PROGRAMS * C, mix1_sum, inside)
    tl.store(own + 2 * PROGRAMS * C, skip_sum, inside)


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
    _embed[_grid(out)](
        tokens, buckets, table, bigram_table, gate, out, *out.shape, T, NORM_EPSILON, *_tile(out)
    )
    return out


@triton.jit
def _embed(
    tokens_at, buckets_at, table_at, bigram_at, gate_at, out_at, M, C, T, epsilon,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows, at, mask = _rows_of(tl.program_id(0), M, C, ROWS, WIDE)
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
    tile = _tile(gradient, ELEMENTS_PER_TILE // 2)
    programs = _programs(M, tile[0])
    partial = gradient.new_empty(programs, C, dtype=torch.float32)
    _embed_backward[(programs,)](
        gradient, tokens, buckets, table, bigram_table, gate, out, partial, M, C, tokens.shape[1],
        NORM_EPSILON, programs, *tile,
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
        rows, at, mask = _rows_of(block, M, C, ROWS, WIDE)
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
    rows, wide_heads, wide = _head_tile(H, D)
    _norm_and_rotate[(triton.cdiv(M, rows),)](
        x, out, cos, sin, gain if has_gain else cos, M, x.stride(0), positions, NORM_EPSILON,
        has_gain, H, D, cos.shape[1], rows, wide_heads, wide,
    )  # fmt: skip
    return out


@triton.jit
def _norm_and_rotate(
    x_at, out_at, cos_at, sin_at, gain_at, M, stride, positions, epsilon, HAS_GAIN: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, WIDE_H: tl.constexpr, WIDE_D: tl.constexpr,
):  # fmt: skip
    rows, within, partner, mask = _head_places(
        tl.program_id(0), M, H, D, HALF, ROWS, WIDE_H, WIDE_D
    )
    cos, sin = _rotation(cos_at, sin_at, rows, rows < M, positions, HALF, WIDE_D)
    start = rows.to(tl.int64)[:, None, None] * stride
    x = tl.load(x_at + start + within, mask, other=0.0).to(tl.float32)
    other = tl.load(x_at + start + partner, mask, other=0.0).to(tl.float32)
    inverse = 1 / tl.sqrt(tl.sum(x * x, 2) / D + epsilon)
    out = (x * cos + other * sin) * inverse[:, :, None]
    if HAS_GAIN:
        heads = tl.arange(0, WIDE_H)
        out *= tl.load(gain_at + heads, heads < H, other=0.0)[None, :, None]
    tl.store(out_at + rows.to(tl.int64)[:, None, None] * H * D + within, out, mask)


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
    rows, wide_heads, wide = _head_tile(H, D)
    programs = _programs(M, rows)
    partial = x.new_empty(programs, H, dtype=torch.float32)
    _norm_and_rotate_backward[(programs,)](
        gradient, x, out, cos, sin, gain if has_gain else cos, partial, M, gradient.stride(0),
        x.stride(0), out.stride(0), positions, NORM_EPSILON, has_gain, programs, H, D,
        cos.shape[1], rows, wide_heads, wide,
    )  # fmt: skip
    return partial.sum(0)


@triton.jit
def _norm_and_rotate_backward(
    gradient_at, x_at, out_at, cos_at, sin_at, gain_at, partial_at, M, gradient_stride, stride,
    out_stride, positions, epsilon, HAS_GAIN: tl.constexpr, PROGRAMS: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, WIDE_H: tl.constexpr, WIDE_D: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, WIDE_H)
    gain_sum = tl.zeros((WIDE_H,), tl.float32)
    if HAS_GAIN:
        gain = tl.load(gain_at + heads, heads < H, other=0.0)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), PROGRAMS):
        rows, within, partner, mask = _head_places(block, M, H, D, HALF, ROWS, WIDE_H, WIDE_D)
        cos, sin = _rotation(cos_at, sin_at, rows, rows < M, positions, HALF, WIDE_D)
        long_rows = rows.to(tl.int64)[:, None, None]
        x = tl.load(x_at + long_rows * stride + within, mask, other=0.0).to(tl.float32)
        inverse = 1 / tl.sqrt(tl.sum(x * x, 2) / D + epsilon)
        x *= inverse[:, :, None]
        gradient_rows = gradient_at + long_rows * gradient_stride
        gradient = tl.load(gradient_rows + within, mask, other=0.0).to(tl.float32)
        other = tl.load(gradient_rows + partner, mask, other=0.0).to(tl.float32)
        # The inverse rotation of the gradient, whose product with x is that of both rotated.
        turned = gradient * cos - other * sin
        along = tl.sum(turned * x, 2)
        if HAS_GAIN:
            gain_sum += tl.sum(along, 0)
            turned *= gain[None, :, None]
            along *= gain[None, :]
        out = inverse[:, :, None] * (turned - x * (along / D)[:, :, None])
        tl.store(out_at + long_rows * out_stride + within, out, mask)
    tl.store(partial_at + tl.program_id(0) * H + heads, gain_sum, heads < H)


@triton.jit
def _head_places(
    block, M, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, WIDE_H: tl.constexpr, WIDE_D: tl.constexpr,
):  # fmt: skip
    """Rows of a tile; offsets in a row of each element and of the one it is rotated with."""
    rows = block * ROWS + tl.arange(0, ROWS)
    heads = tl.arange(0, WIDE_H)[None, :, None]
    place = tl.arange(0, WIDE_D)[None, None, :]
    partner = tl.where(place < HALF, place + HALF, tl.where(place < 2 * HALF, place - HALF, place))
    mask = (rows < M)[:, None, None] & (heads < H) & (place < D)
    return rows, heads * D + place, heads * D + partner, mask


@triton.jit
def _rotation(cos_at, sin_at, rows, valid, positions, HALF: tl.constexpr, WIDE_D: tl.constexpr):
    """cos and signed sin [rows, 1, D]: 1 and 0 beyond the rotated dimensions."""
    place = tl.arange(0, WIDE_D)
    at = (rows % positions)[:, None] * HALF + (place % HALF)[None, :]
    mask = valid[:, None] & (place < 2 * HALF)[None, :]
    cos = tl.load(cos_at + at, mask, other=1.0)
    sin = tl.load(sin_at + at, mask, other=0.0)
    sin = tl.where((place < HALF)[None, :], sin, -sin)
    return cos[:, None, :], sin[:, None, :]


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
    pairs, value_at, mask = _value_places(tl.program_id(0), PAIRS, stride, K, D, TILE, WIDE)
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
    pairs, value_at, mask = _value_places(tl.program_id(0), PAIRS, stride, K, D, TILE, WIDE)
    places = tl.arange(0, WIDE)[None, :]
    own = tl.load(values_at + value_at, mask, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(own * own, 1)), epsilon)[:, None]
    own /= norm
    own_gradient = tl.zeros((TILE, WIDE), tl.float32)
    for member in tl.static_range(GROUP):
        at = (pairs.to(tl.int64) * GROUP + member)[:, None] * D + places
        output = tl.load(output_at + at, mask, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_at + at, mask, other=0.0).to(tl.float32)
        along = tl.sum(gradient * own, 1)[:, None]
        own_gradient -= tl.sum(output * own, 1)[:, None] * gradient + along * output
        tl.store(output_gradient_at + at, gradient - along * own, mask)
    along = tl.sum(own_gradient * own, 1)[:, None]
    at = pairs.to(tl.int64)[:, None] * D + places
    tl.store(values_gradient_at + at, (own_gradient - along * own) / norm, mask)


@triton.jit
def _value_places(
    block, PAIRS, stride, K: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr
):
    """A tile of (row, key/value head) pairs, and where their value vectors are."""
    pairs = block * TILE + tl.arange(0, TILE)
    places = tl.arange(0, WIDE)[None, :]
    at = (pairs // K).to(tl.int64)[:, None] * stride + (pairs % K)[:, None] * D + places
    return pairs, at, (pairs < PAIRS)[:, None] & (places < D)


def leaky_relu_squared(up: torch.Tensor) -> torch.Tensor:
    """leaky_relu(up, 0.5)², elementwise."""
    out = torch.empty_like(up)
    _leaky_relu_squared[(triton.cdiv(up.numel(), 2 * ELEMENTS_PER_TILE),)](
        up, out, up.numel(), 2 * ELEMENTS_PER_TILE, num_warps=8
    )
    return out


@triton.jit
def _leaky_relu_squared(up_at, out_at, count, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    up = tl.load(up_at + at, at < count, other=0.0).to(tl.float32)
    leaky = tl.where(up > 0, up, 0.5 * up)
    tl.store(out_at + at, leaky * leaky, at < count)


def leaky_relu_squared_backward(gradient: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The gradient of `up`, written over `gradient`."""
    _leaky_relu_squared_backward[(triton.cdiv(up.numel(), 2 * ELEMENTS_PER_TILE),)](
        gradient, up, up.numel(), 2 * ELEMENTS_PER_TILE, num_warps=8
    )
    return gradient


@triton.jit
def _leaky_relu_squared_backward(gradient_at, up_at, count, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    up = tl.load(up_at + at, at < count, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_at + at, at < count, other=0.0).to(tl.float32)
    tl.store(gradient_at + at, gradient * tl.where(up > 0, 2 * up, 0.5 * up), at < count)


def cross_entropy(scores: torch.Tensor, targets: torch.Tensor, cap: float) -> torch.Tensor:
    """Losses float32 [M] of cap·tanh(scores / cap); `scores` [M, V] becomes their own gradient.

    The gradient is that of the sum of the losses, so a mean is a factor for the caller.
    """
    losses = torch.empty(len(scores), dtype=torch.float32, device=scores.device)
    wide = triton.next_power_of_2(scores.shape[1])
    _cross_entropy[(len(scores),)](scores, targets, losses, scores.shape[1], cap, wide)
    return losses


@triton.jit
def _cross_entropy(scores_at, targets_at, losses_at, V, cap, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, WIDE)
    inside = places < V
    scores = tl.load(scores_at + row * V + places, inside, other=0.0).to(tl.float32)
    # tanh(z) = 1 − 2 / (e^{2z} + 1), exact enough in float32 and safe at both ends.
    bent = 1 - 2 / (tl.exp(2 / cap * scores) + 1)
    # Capped logits are at most `cap`, so that no maximum need be taken off first.
    powers = tl.where(inside, tl.exp(cap * bent - cap), 0.0)
    total = tl.sum(powers, 0)
    target = tl.load(targets_at + row)
    is_target = places == target
    own = tl.sum(tl.where(is_target, cap * bent, 0.0), 0)
    tl.store(losses_at + row, tl.log(total) + cap - own)
    gradient = (powers / total - tl.where(is_target, 1.0, 0.0)) * (1 - bent * bent)
    tl.store(scores_at + row * V + places, gradient, inside)


@triton.jit
def _rows_of(block, M, C, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """A tile's rows, its elements' offsets and which of them exist."""
    rows = block * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WIDE)[None, :]
    return rows, rows.to(tl.int64)[:, None] * C + channels, (rows < M)[:, None] & (channels < C)


@triton.jit
def _norm_gradient(gradient_at, normed_at, inverse_at, rows, at, mask, M, C):
    """The gradient of an RMS norm's input, from that of its output."""
    gradient = tl.load(gradient_at + at, mask, other=0.0).to(tl.float32)
    normed = tl.load(normed_at + at, mask, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_at + rows, rows < M, other=0.0)
    along = tl.sum(gradient * normed, 1) / C
    return inverse[:, None] * (gradient - normed * along[:, None])


def _tile(x: torch.Tensor, elements: int = ELEMENTS_PER_TILE) -> tuple[int, int]:
    """Rows of a tile, and the power of two that covers its channels."""
    wide = triton.next_power_of_2(x.shape[1])
    return max(1, elements // wide), wide


def _programs(M: int, rows: int) -> int:
    return min(PROGRAMS, triton.cdiv(M, rows))


def _grid(x: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(x.shape[0], _tile(x)[0]),)


def _head_tile(heads: int, width: int) -> tuple[int, int, int]:
    wide_heads, wide = triton.next_power_of_2(heads), triton.next_power_of_2(width)
    return max(1, ELEMENTS_PER_TILE // (wide_heads * wide)), wide_heads, wide


def _pair_tile(width: int) -> tuple[int, int]:
    wide = triton.next_power_of_2(width)
    return max(1, ELEMENTS_PER_TILE // wide), wide


def _per_row(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
