"""Full-Hessian GPTQ of banks of matrices to int6 (Frantar et al., "GPTQ", 2022).

A bank is a stack of matrices of one shape: it is quantized as one batched problem, every clip
candidate at once. Shapes: N matrices, K clip candidates, R rows (outputs), C columns (inputs).
Algebra: W weights, H = mean of x·xᵀ over calibration inputs x, U upper triangular with UᵀU = H⁻¹.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from fairway.errors import UserError
from fairway.progress import progress
from fairway.quantization.integers import (
    QuantizedTensor,
    fake_quantize,
    nearest_codes,
    require_finite,
    scale_from_magnitude,
)
from fairway.quantization.quantizers.base import Hessians, Quantizer
from fairway.quantization.settings import GptqSettings

BITS = 6
DAMPENING_ATTEMPTS = 5
"""A factorization is tried with ten times the dampening of the attempt before."""
LARGEST_SAVING_BITS = 2
"""Wider scales save at most so much a code; to save more, another number of bits is needed."""


class Gptq(Quantizer):
    """GPTQ to int6 with one scale a row; its settings are keys of the section `gptq` itself."""

    Settings = GptqSettings
    title = "GPTQ, int6"
    needs_hessians = True

    def quantize(
        self, matrices: Mapping[str, Tensor], hessians: Hessians | None
    ) -> tuple[dict[str, QuantizedTensor], pd.DataFrame]:
        """Every parameter in turn; the table is that of `quantize_bank`."""
        assert hessians is not None
        quantized, tables = {}, []
        with progress(len(matrices), "gptq", "bank") as bar:
            for name, weights in matrices.items():
                stack = torch.stack([hessians[name, index] for index in range(len(weights))])
                quantized[name], table = quantize_bank(name, weights.detach(), stack, self.settings)
                tables.append(table)
                bar.update(1)
        return quantized, pd.concat(tables, ignore_index=True)

    def fake(self, weight: Tensor) -> Tensor:
        """Rounded to the nearest int6: without Hessians there is nothing better."""
        return fake_quantize(weight, BITS)

    def remedy(self, excess_bits: float) -> str | None:
        """Scales f times as wide save log₂ f bits a code."""
        if excess_bits > LARGEST_SAVING_BITS:
            return None
        return f"multiply gptq.scale_factor by {1.01 * 2**excess_bits:.2f}"


def quantize_bank(
    name: str,
    weights: Tensor,
    hessians: Tensor,
    settings: GptqSettings,
    dtype: torch.dtype = torch.float32,
) -> tuple[QuantizedTensor, pd.DataFrame]:
    """GPTQ of weights [N, R, C] with hessians [N, C, C], on the device of `weights`.

    The table has one row per matrix: bank, matrix, error = tr((W−Q)·H·(W−Q)ᵀ), that of rounding to
    nearest with the same choice of clip candidates, output_power = tr(W·H·Wᵀ) to compare them with,
    the dampening fraction used, the rows' mean clip percentile, and dead columns.
    Factorizations run in float64, the rest in `dtype`.
    Raises UserError where a number is not finite or a Hessian cannot be factorized.
    """
    require_finite(weights)
    if not torch.isfinite(hessians).all():
        raise UserError(f"{name}: calibration gave activations that are not finite")
    H = hessians.to(weights.device, torch.float64)
    dead = H.diagonal(dim1=1, dim2=2) == 0
    alive = ~dead
    H = H * (alive.unsqueeze(1) & alive.unsqueeze(2))
    W = weights.to(dtype) * alive.unsqueeze(1)

    # Stable, so that columns of equal weight keep their order on every device.
    order = H.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    H = _reorder(_reorder(H, order, dim=1), order, dim=2)
    W = _reorder(W, order, dim=2)
    U, dampening = inverse_factor(name, H, settings.dampening_fraction)
    H, U = H.to(dtype), U.to(dtype)

    candidates = clip_scales(W, settings.clip_percentiles, settings.scale_factor)
    codes = gptq_codes(W, U, candidates, settings.block_columns)
    codes, scales, errors, choice = _best_candidates(W, H, codes, candidates)
    *_, nearest_errors, _ = _best_candidates(W, H, _nearest(W, candidates), candidates)

    percentiles = torch.tensor(settings.clip_percentiles, dtype=torch.float64)
    table = {
        "bank": name,
        "matrix": range(len(W)),
        "error": errors.sum(1).tolist(),
        "error_round_to_nearest": nearest_errors.sum(1).tolist(),
        "output_power": _weighted_squares(W, H).sum(1).tolist(),
        "dampening_fraction": dampening.tolist(),
        "clip_percentile": percentiles[choice.cpu()].mean(1).tolist(),
        "dead_columns": dead.sum(1).tolist(),
    }
    codes = _reorder(codes, order.argsort(dim=1), dim=2)
    return QuantizedTensor(codes.to(torch.int8), scales, BITS), pd.DataFrame(table)


def inverse_factor(name: str, H: Tensor, dampening_fraction: float) -> tuple[Tensor, Tensor]:
    """Upper triangular U with UᵀU = (H + λ·I)⁻¹ for H float64 [N, C, C] → U [N, C, C].

    λ = fraction · mean of the non-zero diagonal. Where a factorization fails, that matrix's
    fraction grows tenfold, a bounded number of times. Returns U and the fractions used, [N].
    Raises UserError naming the matrices that still fail: nothing falls back to plain rounding.
    """
    diagonal = H.diagonal(dim1=1, dim2=2)
    live_columns = (diagonal != 0).sum(1).clamp(min=1)
    mean = diagonal.sum(1) / live_columns
    mean = torch.where(mean == 0, 1.0, mean)
    fractions = torch.full_like(mean, dampening_fraction)
    identity = torch.eye(H.shape[1], dtype=H.dtype, device=H.device)
    for _ in range(DAMPENING_ATTEMPTS):
        damped = H + (fractions * mean).view(-1, 1, 1) * identity
        # Cholesky from the last column backwards: H = R·Rᵀ with R upper triangular, so U = R⁻¹ and
        # H⁻¹, which is less accurate, is never formed.
        lower, status = torch.linalg.cholesky_ex(damped.flip(1, 2))
        failed = status != 0
        if not failed.any():
            R = lower.flip(1, 2)
            return torch.linalg.solve_triangular(R, identity, upper=True), fractions
        fractions = torch.where(failed, fractions * 10, fractions)
    matrices = ", ".join(str(index) for index in failed.nonzero().flatten().tolist())
    raise UserError(
        f"{name}, matrices {matrices}: the Hessian is not positive definite even with "
        f"{dampening_fraction * 10 ** (DAMPENING_ATTEMPTS - 1):g} of its mean diagonal added: "
        "raise gptq.calibration_sequences or gptq.dampening_fraction"
    )


def clip_scales(W: Tensor, percentiles: Sequence[float], scale_factor: float = 1.0) -> Tensor:
    """fp16 scales [N, K, R]: one candidate per percentile of a row's |W|, linear between values.

    The largest code stands for the percentile times `scale_factor`.
    """
    ranks = [(1 - percentile) * (W.shape[2] - 1) for percentile in percentiles]
    depth = min(W.shape[2], int(max(ranks)) + 2)
    largest = W.abs().topk(depth, dim=2).values
    magnitudes = []
    for rank in ranks:
        below = min(int(rank) + 1, depth - 1)
        magnitudes.append(
            torch.lerp(largest[..., int(rank)], largest[..., below], rank - int(rank))
        )
    return scale_from_magnitude(scale_factor * torch.stack(magnitudes, dim=1), BITS)


def gptq_codes(W: Tensor, U: Tensor, scales: Tensor, block_columns: int) -> Tensor:
    """Codes [N, K, R, C], in the dtype of W, for every candidate of `scales` [N, K, R].

    Columns are taken from the first to the last; each one's rounding error is spread over the
    columns that are still to come, through its row of U.
    """
    N, R, C = W.shape
    K = scales.shape[1]
    # To the algorithm a candidate is just more rows of the same matrix.
    remaining = W.repeat(1, K, 1)
    row_scales = scales.to(W.dtype).reshape(N, K * R)
    codes = torch.empty_like(remaining)
    for start in range(0, C, block_columns):
        stop = min(start + block_columns, C)
        block = remaining[..., start:stop].permute(2, 0, 1).contiguous()
        block_codes, errors = _quantize_block(block, U[:, start:stop, start:stop], row_scales)
        codes[..., start:stop] = block_codes.permute(1, 2, 0)
        remaining[..., stop:] -= errors.permute(1, 2, 0) @ U[:, start:stop, stop:]
    return codes.view(N, K, R, C)


def _quantize_block(block: Tensor, U: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Columns first: block [B, N, rows], changed in place; U [N, B, B]; scales [N, rows]."""
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    for column in range(len(block)):
        weights = block[column]
        codes[column] = nearest_codes(weights, scales, BITS)
        residual = weights - codes[column] * scales
        errors[column] = residual / U[:, column, column].unsqueeze(1)
        later = U[:, column, column + 1 :].T.unsqueeze(2)
        block[column + 1 :] -= later * errors[column]
    return codes, errors


def _nearest(W: Tensor, scales: Tensor) -> Tensor:
    """Round-to-nearest codes [N, K, R, C] for scales [N, K, R]."""
    return nearest_codes(W.unsqueeze(1), scales.to(W.dtype).unsqueeze(3), BITS)


def _best_candidates(
    W: Tensor, H: Tensor, codes: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row the candidate of least error: codes [N, R, C], scales, errors and choice [N, R]."""
    N, K, R, C = codes.shape
    difference = W.unsqueeze(1) - codes * scales.to(W.dtype).unsqueeze(3)
    errors = _weighted_squares(difference.view(N, K * R, C), H).view(N, K, R)
    choice = errors.argmin(dim=1, keepdim=True)
    chosen = codes.gather(1, choice.unsqueeze(3).expand(N, 1, R, C)).squeeze(1)
    return (
        chosen,
        scales.gather(1, choice).squeeze(1),
        errors.gather(1, choice).squeeze(1),
        choice[:, 0],
    )


def _weighted_squares(rows: Tensor, H: Tensor) -> Tensor:
    """x·H·xᵀ for each row x of `rows` [N, rows, C] → [N, rows]."""
    return ((rows @ H) * rows).sum(2)


def _reorder(stack: Tensor, order: Tensor, dim: int) -> Tensor:
    """Each matrix of `stack` [N, ·, ·] with its rows (dim 1) or columns (dim 2) in `order`."""
    index = order.unsqueeze(3 - dim).expand_as(stack)
    return stack.gather(dim, index)
