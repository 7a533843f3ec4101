"""The residual stream: RMS norm, and the mix with x0 and a skip that begins each block.

Shapes: M rows (tokens), C channels.
"""

import torch
import triton
import triton.language as tl

from fairway.model.functional import NORM_EPSILON
from fairway.model.fused.tiles import one_row, programs_over, row_grid, row_tile, rows_of


def rms_norm(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, C] → x / rms(x), and 1 / rms(x) as float32 [M]."""
    normed, inverse = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    _rms_norm[row_grid(x)](x, normed, inverse, *x.shape, NORM_EPSILON, *row_tile(x))
    return normed, inverse


@triton.jit
def _rms_norm(x_at, normed_at, inverse_at, M, C, epsilon, ROWS: tl.constexpr, WIDE: tl.constexpr):
    rows, at, mask = rows_of(tl.program_id(0), M, C, ROWS, WIDE)
    x = tl.load(x_at + at, mask, other=0.0).to(tl.float32)
    inverse = 1 / tl.sqrt(tl.sum(x * x, 1) / C + epsilon)
    tl.store(normed_at + at, x * inverse[:, None], mask)
    tl.store(inverse_at + rows, inverse, rows < M)


def rms_norm_backward(
    gradient: torch.Tensor, normed: torch.Tensor, inverse: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """`residual` plus the gradient of rms_norm's input, [M, C], from that of its output."""
    out = torch.empty_like(residual)
    _rms_norm_backward[row_grid(out)](
        gradient, normed, inverse, residual, out, *out.shape, *row_tile(out)
    )
    return out


@triton.jit
def _rms_norm_backward(
    gradient_at, normed_at, inverse_at, residual_at, out_at, M, C,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows, at, mask = rows_of(tl.program_id(0), M, C, ROWS, WIDE)
    gradient = tl.load(gradient_at + at, mask, other=0.0).to(tl.float32)
    normed = tl.load(normed_at + at, mask, other=0.0).to(tl.float32)
    inner = _norm_gradient(gradient, normed, tl.load(inverse_at + rows, rows < M, other=0.0), C)
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
    mixed, normed, inverse = (
        torch.empty_like(x),
        torch.empty_like(x),
        x.new_empty(len(x), dtype=torch.float32),
    )
    has_skip = skip is not None
    _mix_and_norm[row_grid(x)](
        x, x0, skip if has_skip else x, mix, skip_weight if has_skip else mix,
        mixed, normed, inverse, *x.shape, NORM_EPSILON, has_skip, *row_tile(x),
    )  # fmt: skip
    return mixed, normed, inverse


@triton.jit
def _mix_and_norm(
    x_at, x0_at, skip_at, mix_at, skip_weight_at, mixed_at, normed_at, inverse_at, M, C, epsilon,
    HAS_SKIP: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows, at, mask = rows_of(tl.program_id(0), M, C, ROWS, WIDE)
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
    inverse: torch.Tensor,
    x: torch.Tensor,
    x0: torch.Tensor,
    mix: torch.Tensor,
    skip: torch.Tensor | None,
    skip_weight: torch.Tensor | None,
    later: torch.Tensor | None,
    later_weight: torch.Tensor | None,
    x0_gradient: torch.Tensor,
    sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `mix_and_norm`, from those of u (`residual`) and of its norm (`gradient`).

    Adds to `x0_gradient` in place. Returns the gradient of x + skip_weight·skip, and the gradient
    that the block before receives. The second is the first, but where x is the skip of a later
    block (with weight `later_weight`): then plus later_weight·later, with `later` the first result
    for that block, or None for this very block. sums: of `mix_sums` for one block, overwritten
    with the partial sums of the gradients of mix, its first two, and of skip_weight.
    """
    M, C = x.shape
    inner = torch.empty_like(x)
    has_skip, has_later = skip is not None, later_weight is not None
    outer = torch.empty_like(x) if has_later else inner
    programs, warps = sums.shape[1], 1
    if has_skip and has_later:  # so many programs of one warp would not find registers
        programs, warps = programs_over(x, 8), 2
    _mix_and_norm_backward[(programs,)](
        residual, gradient, inverse, x, x0, skip if has_skip else x,
        inner if later is None else later, mix, skip_weight if has_skip else mix,
        later_weight if has_later else mix, x0_gradient, inner, outer, sums,
        M, C, has_skip, has_later, later is None, programs, sums.shape[1], *one_row(x),
        num_warps=warps,
    )  # fmt: skip
    return inner, outer


def mix_sums(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """Memory for the partial sums of `mix_and_norm_backward`: float32 [blocks, 3, programs, C]."""
    # Zeros, for a block may need fewer programs.
    return x.new_zeros(blocks, 3, programs_over(x, 12), x.shape[1], dtype=torch.float32)


@triton.jit
def _mix_and_norm_backward(
    residual_at, gradient_at, inverse_at, x_at, x0_at, skip_at, later_at, mix_at,
    skip_weight_at, later_weight_at, x0_gradient_at, inner_at, outer_at, sums_at, M, C,
    HAS_SKIP: tl.constexpr, HAS_LATER: tl.constexpr, LATER_IS_OWN: tl.constexpr,
    PROGRAMS: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, WIDE)
    inside = channels < C
    mix0_sum = tl.zeros((WIDE,), tl.float32)
    mix1_sum = tl.zeros((WIDE,), tl.float32)
    skip_sum = tl.zeros((WIDE,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), PROGRAMS):
        rows, at, mask = rows_of(block, M, C, ROWS, WIDE)
        # Weights are read again for each row, from the cache: kept, they would take the registers
        # of other warps.
        mix0 = tl.load(mix_at + channels, inside, other=0.0)
        mix1 = tl.load(mix_at + C + channels, inside, other=0.0)
        x = tl.load(x_at + at, mask, other=0.0).to(tl.float32)
        if HAS_SKIP:
            skip_weight = tl.load(skip_weight_at + channels, inside, other=0.0)
            skip = tl.load(skip_at + at, mask, other=0.0).to(tl.float32)
            x += skip_weight[None, :] * skip
        x0 = tl.load(x0_at + at, mask, other=0.0).to(tl.float32)
        # The norm's output once more, for less than it costs to read.
        inverse = tl.load(inverse_at + rows, rows < M, other=0.0)
        normed = (mix0[None, :] * x + mix1[None, :] * x0) * inverse[:, None]
        gradient = tl.load(gradient_at + at, mask, other=0.0).to(tl.float32)
        mixed = tl.load(residual_at + at, mask, other=0.0).to(tl.float32)
        mixed += _norm_gradient(gradient, normed, inverse, C)
        inner = mix0[None, :] * mixed
        if HAS_SKIP:
            skip_sum += tl.sum(inner * skip, 0)
        mix0_sum += tl.sum(mixed * x, 0)
        mix1_sum += tl.sum(mixed * x0, 0)
        x0_gradient = tl.load(x0_gradient_at + at, mask, other=0.0).to(tl.float32)
        tl.store(x0_gradient_at + at, x0_gradient + mix1[None, :] * mixed, mask)
        tl.store(inner_at + at, inner, mask)
        if HAS_LATER:
            later_weight = tl.load(later_weight_at + channels, inside, other=0.0)
            if LATER_IS_OWN:
                later = inner
            else:
                later = tl.load(later_at + at, mask, other=0.0).to(tl.float32)
            tl.store(outer_at + at, inner + later_weight[None, :] * later, mask)
    own = sums_at + tl.program_id(0) * C + channels
    tl.store(own, mix0_sum, inside)
    # There may be room for more partial sums than there are programs.
    tl.store(own + SUMS * C, mix1_sum, inside)
    tl.store(own + 2 * SUMS * C, skip_sum, inside)


@triton.jit
def _norm_gradient(gradient, normed, inverse, C):
    """The gradient of an RMS norm's input, from that of its output."""
    along = tl.sum(gradient * normed, 1) / C
    return inverse[:, None] * (gradient - normed * along[:, None])
