"""Matrices with the scales of their rows folded in.

Shapes: N matrices, R rows, C columns.
"""

import torch
import triton
import triton.language as tl


def scale_rows(bank: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """bank [N, R, C] times scales float32 [N, R], in `dtype`; computed in float32, with no copy."""
    out = torch.empty(bank.shape, dtype=dtype, device=bank.device)
    C = bank.shape[2]
    _scale_rows[(scales.numel(),)](bank, scales, out, C, triton.next_power_of_2(C))
    return out


@triton.jit
def _scale_rows(bank_at, scales_at, out_at, C, WIDE: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, WIDE)
    at, inside = row.to(tl.int64) * C + columns, columns < C
    tl.store(out_at + at, tl.load(bank_at + at, inside) * tl.load(scales_at + row), inside)


def scale_rows_backward(
    gradient: torch.Tensor, bank: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `scale_rows` in bank and scales, float32, from that of its result."""
    bank_gradient, scales_gradient = torch.empty_like(bank), torch.empty_like(scales)
    C = bank.shape[2]
    _scale_rows_backward[(scales.numel(),)](
        gradient, bank, scales, bank_gradient, scales_gradient, C, triton.next_power_of_2(C)
    )
    return bank_gradient, scales_gradient


@triton.jit
def _scale_rows_backward(
    gradient_at, bank_at, scales_at, bank_gradient_at, scales_gradient_at, C, WIDE: tl.constexpr
):
    row, columns = tl.program_id(0), tl.arange(0, WIDE)
    at, inside = row.to(tl.int64) * C + columns, columns < C
    gradient = tl.load(gradient_at + at, inside, other=0.0).to(tl.float32)
    bank = tl.load(bank_at + at, inside, other=0.0)
    tl.store(bank_gradient_at + at, gradient * tl.load(scales_at + row), inside)
    tl.store(scales_gradient_at + row, tl.sum(gradient * bank, 0))
