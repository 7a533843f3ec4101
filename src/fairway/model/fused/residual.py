"""The residual stream: RMS norm, and the mix with x0 and a skip that begins each block.

Shapes: M rows (tokens), C channels.
"""

import torch
import triton
import triton.language as tl

from fairway.model.functional import NORM_EPSILON
from fairway.model.fused.tiles import (
    add_to_own,
    one_row,
    programs_over,
    row_grid,
    row_tile,
    rows_of,
)

ROW_PROGRAMS, ROW_PROGRAMS_WITH_SKIP = 12, 8
"""Of `mix_and_norm_backward` on a multiprocessor."""


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
    inner = norm_gradient(gradient, normed, tl.load(inverse_at + rows, rows < M, other=0.0), C)
    residual = tl.load(residual_at + at, mask, other=0.0).to(tl.float32)
    tl.store(out_at + at, residual + inner, mask)


def mix_and_norm(
    x: torch.Tensor,
    x0: torch.Tensor,
    mix: torch.Tensor,
    skip: torch.Tensor | None,
    skip_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The start of a block: u = mix₀·(keep·x + weight·skip) + mix₁·x0, normed.

    x, x0, skip [M, C]; mix float32 [2, C]; skip_weights float32 [2, C], the weight and keep, or
    [1, C] where keep is 1. Returns u, u / rms(u) and 1 / rms(u) as float32 [M].
    """
    mixed, normed, inverse = (
        torch.empty_like(x),
        torch.empty_like(x),
        x.new_empty(len(x), dtype=torch.float32),
    )
    has_skip = skip is not None
    _mix_and_norm[row_grid(x)](
        x, x0, skip if has_skip else x, mix, skip_weights if has_skip else mix, mixed, normed,
        inverse, *x.shape, NORM_EPSILON, has_skip, _has_keep(skip_weights), *row_tile(x),
    )  # fmt: skip
    return mixed, normed, inverse


def _has_keep(skip_weights: torch.Tensor | None) -> bool:
    return skip_weights is not None and len(skip_weights) == 2


@triton.jit
def _mix_and_norm(
    x_at, x0_at, skip_at, mix_at, skip_weights_at, mixed_at, normed_at, inverse_at, M, C, epsilon,
    HAS_SKIP: tl.constexpr, HAS_KEEP: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows, at, mask = rows_of(tl.program_id(0), M, C, ROWS, WIDE)
    channels = tl.arange(0, WIDE)
    inside = channels < C
    x = tl.load(x_at + at, mask, other=0.0).to(tl.float32)
    if HAS_KEEP:
        x *= tl.load(skip_weights_at + C + channels, inside, other=0.0)[None, :]
    if HAS_SKIP:
        weight = tl.load(skip_weights_at + channels, inside, other=0.0)
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
    skip_weights: torch.Tensor | None,
    later: torch.Tensor | None,
    later_weights: torch.Tensor | None,
    x0_gradient: torch.Tensor,
    mix_sums: torch.Tensor,
    skip_sums: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `mix_and_norm`, from those of u (`residual`) and of its norm (`gradient`).

    Adds to `x0_gradient` in place. Returns the gradient of keep·x + weight·skip, and the gradient
    that the block before receives. The second is keep times the first; but where x is the skip of a
    later step (with `later_weights`) also its weight times `later`, the first result for that step,
    or None for this very step. Both are the same memory where they are equal, or the first is of
    no use. mix_sums, skip_sums: of `channel_sums` for one block and one skip; the partial sums of
    the gradients of mix and skip_weights are added to them.
    """
    M, C = x.shape
    has_skip, has_later = skip is not None, later_weights is not None
    has_keep = _has_keep(skip_weights)
    outer = torch.empty_like(x)
    is_apart = has_skip and (has_keep or has_later)
    inner = torch.empty_like(x) if is_apart else outer
    # As many as find registers at the same time. With a skip, a row takes too many for one warp.
    warps = (2 if has_keep else 4) if has_skip else 1
    programs = programs_over(x, ROW_PROGRAMS_WITH_SKIP if has_skip else ROW_PROGRAMS)
    _mix_and_norm_backward[(programs,)](
        residual, gradient, inverse, x, x0, skip if has_skip else x,
        inner if later is None else later, mix, skip_weights if has_skip else mix,
        later_weights if has_later else mix, x0_gradient, inner, outer, mix_sums,
        skip_sums if has_skip else mix_sums, M, C, has_skip, has_keep, has_later, later is None,
        is_apart, programs, mix_sums.shape[1], *one_row(x), num_warps=warps,
    )  # fmt: skip
    return inner, outer


def channel_sums(x: torch.Tensor, count: int) -> torch.Tensor:
    """Memory for partial sums of `mix_and_norm_backward`: float32 zeros [count, 2, programs, C].

    A block may need fewer programs, and may run several times.
    """
    return x.new_zeros(count, 2, programs_over(x, ROW_PROGRAMS), x.shape[1], dtype=torch.float32)


@triton.jit
def _mix_and_norm_backward(
    residual_at, gradient_at, inverse_at, x_at, x0_at, skip_at, later_at, mix_at,
    skip_weights_at, later_weights_at, x0_gradient_at, inner_at, outer_at, mix_sums_at,
    skip_sums_at, M, C, HAS_SKIP: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_LATER: tl.constexpr,
    LATER_IS_OWN: tl.constexpr, INNER_IS_APART: tl.constexpr, PROGRAMS: tl.constexpr,
    SUMS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, WIDE)
    inside = channels < C
    # Sums of the gradient times each part of the mix; the parts' weights are factors of all rows.
    of_x, of_x0 = tl.zeros((WIDE,), tl.float32), tl.zeros((WIDE,), tl.float32)
    of_skip = tl.zeros((WIDE,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), PROGRAMS):
        rows, at, mask = rows_of(block, M, C, ROWS, WIDE)
        # Weights are read again for each row, from the cache: kept, they would take the registers
        # of other warps.
        mix0 = tl.load(mix_at + channels, inside, other=0.0)
        mix1 = tl.load(mix_at + C + channels, inside, other=0.0)
        x = tl.load(x_at + at, mask, other=0.0).to(tl.float32)
        joined = x
        if HAS_KEEP:
            keep = tl.load(skip_weights_at + C + channels, inside, other=0.0)
            joined *= keep[None, :]
        if HAS_SKIP:
            skip_weight = tl.load(skip_weights_at + channels, inside, other=0.0)
            skip = tl.load(skip_at + at, mask, other=0.0).to(tl.float32)
            joined += skip_weight[None, :] * skip
        x0 = tl.load(x0_at + at, mask, other=0.0).to(tl.float32)
        # The norm's output once more, for less than it costs to read.
        inverse = tl.load(inverse_at + rows, rows < M, other=0.0)
        normed = (mix0[None, :] * joined + mix1[None, :] * x0) * inverse[:, None]
        gradient = tl.load(gradient_at + at, mask, other=0.0).to(tl.float32)
        mixed = tl.load(residual_at + at, mask, other=0.0).to(tl.float32)
        mixed += norm_gradient(gradient, normed, inverse, C)
        of_x += tl.sum(mixed * x, 0)
        if HAS_SKIP:
            of_skip += tl.sum(mixed * skip, 0)
        of_x0 += tl.sum(mixed * x0, 0)
        x0_gradient = tl.load(x0_gradient_at + at, mask, other=0.0).to(tl.float32)
        tl.store(x0_gradient_at + at, x0_gradient + mix1[None, :] * mixed, mask)
        inner = mix0[None, :] * mixed
        outer = inner
        if HAS_KEEP:
            outer *= keep[None, :]
        if HAS_LATER:
            later_weight = tl.load(later_weights_at + channels, inside, other=0.0)
            if LATER_IS_OWN:
                later = inner
            else:
                later = tl.load(later_at + at, mask, other=0.0).to(tl.float32)
            outer += later_weight[None, :] * later
        if INNER_IS_APART:
            tl.store(inner_at + at, inner, mask)
        tl.store(outer_at + at, outer, mask)
    # There may be room for more partial sums than there are programs.
    own = tl.program_id(0) * C + channels
    mix0 = tl.load(mix_at + channels, inside, other=0.0)
    of_joined = of_x
    if HAS_KEEP:
        of_joined *= tl.load(skip_weights_at + C + channels, inside, other=0.0)
        add_to_own(skip_sums_at + SUMS * C + own, mix0 * of_x, inside)
    if HAS_SKIP:
        of_joined += tl.load(skip_weights_at + channels, inside, other=0.0) * of_skip
        add_to_own(skip_sums_at + own, mix0 * of_skip, inside)
    add_to_own(mix_sums_at + own, of_joined, inside)
    add_to_own(mix_sums_at + SUMS * C + own, of_x0, inside)


@triton.jit
def norm_gradient(gradient, normed, inverse, C):
    """The gradient of an RMS norm's input, from that of its output."""
    along = tl.sum(gradient * normed, 1) / C
    return inverse[:, None] * (gradient - normed * along[:, None])
