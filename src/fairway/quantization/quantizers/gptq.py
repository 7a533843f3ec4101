"""Full-Hessian GPTQ of banks of matrices (Frantar et al., "GPTQ", 2022).

A bank is a stack of matrices of one shape: it is quantized as one batched problem, every clip
candidate at once. Shapes: N matrices, K clip candidates, R rows (outputs), C columns (inputs).
Algebra: W weights, H = mean of x·xᵀ over calibration inputs x, U upper triangular with UᵀU = H⁻¹.

`steps: sensitivity` allots the bits of an entropy coder. A code of step Δ costs h − log₂ Δ bits and
changes the loss by s·Δ²/24 nats a token, where s = g²/U_cc²: g² is the mean square of the loss's
gradient in the row's output (K-FAC: Martens and Grosse, 2015), and 1/U_cc² is the variance of the
column's input given those that are quantized after it, which is what GPTQ leaves of an error. The
sum is least for given bits where s·Δ² is the same for every weight: Δ = δ·U_cc/g, with one δ for
the whole model (reverse water-filling; for columns: Lifar et al., "WaterSIC", 2026).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fairway.errors import UserError
from fairway.progress import progress
from fairway.quantization.integers import (
    EMBEDDING,
    SCALE_MAXIMUM,
    SCALE_MINIMUM,
    QuantizedTensor,
    fake_quantize,
    largest_code,
    nearest_codes,
    require_finite,
    scale_from_magnitude,
)
from fairway.quantization.quantizers.base import Hessians, Quantized, Quantizer, Sensitivities
from fairway.quantization.settings import GptqSettings

BITS = 6
EMBEDDING_BITS = 7
FREE_BITS = 8
"""Where steps follow sensitivity, so that none is clipped: codes that do not occur cost nothing."""
STEPS_AN_OCTAVE = 8
"""Steps are powers of 2^(1/8), which LZMA packs in 6 bits instead of 13. A step that is wrong by up
to 4.4 % costs 0.001 bits a code."""
TYPICAL_STEP = 0.4
"""Steps of 0.4 deviations make codes of about 3.4 bits."""
LEAST_SENSITIVITY = 0.03
"""Added to every row's g², as a share of its matrix's mean: small ones are not well measured."""
EMBEDDING_LEAST_SENSITIVITY = 3.0
"""The same for the rows of the embedding: a token that the calibration text lacks still occurs."""
SMALLEST_SENSITIVITY = 1e-30
"""Of a matrix that the loss does not depend on."""
EMBEDDING_DAMPENING = 0.05
"""The embedding's dampening fraction, at least. Its rows are inputs too, and there every column
counts alike."""
LARGEST_MARGIN = 1.05
"""What a largest code stands for is at least so many times the row's largest weight."""
DAMPENING_ATTEMPTS = 5
"""A factorization is tried with ten times the dampening of the attempt before."""
LARGEST_SAVING_BITS = 2
"""Wider scales save at most so much a code; to save more, another number of bits is needed."""


class Gptq(Quantizer):
    """GPTQ with one scale a row; its settings are keys of the section `gptq` itself."""

    Settings = GptqSettings
    title = "GPTQ"
    needs_hessians = True

    @property
    def needs_sensitivities(self) -> bool:
        return self.settings.steps == "sensitivity"

    @property
    def takes_embedding(self) -> bool:
        return self.settings.embedding == "gptq"

    @property
    def fills_budget(self) -> bool:
        return self.settings.scale_factor == "budget"

    def quantize(self, matrices: Mapping[str, Tensor], hessians: Hessians | None) -> Quantized:
        """Every parameter in turn; the table is that of `bank_codes`."""
        return self.prepared(matrices, hessians, None)(1.0)

    def prepared(
        self,
        matrices: Mapping[str, Tensor],
        hessians: Hessians | None,
        sensitivities: Sensitivities | None,
    ) -> Callable[[float], Quantized]:
        """As `quantize`, as a function of a factor on every step beside `scale_factor`."""
        banks = [
            prepared_bank(
                name,
                weights.detach(),
                _stacked(hessians, name, len(weights)),
                self.settings,
                _stacked(sensitivities, name, len(weights)) if self.needs_sensitivities else None,
            )
            for name, weights in matrices.items()
        ]
        unit = 1.0 if self.fills_budget else self.settings.scale_factor
        if self.needs_sensitivities:
            unit *= sensitivity_unit(banks)

        def at(factor: float) -> Quantized:
            quantized, tables = {}, []
            with progress(len(banks), "gptq", "bank") as bar:
                for bank in banks:
                    codes, table = bank_codes(bank, self.settings, factor * unit)
                    quantized[bank.name] = codes
                    tables.append(table)
                    bar.update(1)
            return quantized, pd.concat(tables, ignore_index=True)

        return at

    def fake(self, name: str, weight: Tensor) -> Tensor:
        """Rounded to the nearest: without Hessians there is nothing better."""
        return fake_quantize(weight, BITS)

    def remedy(self, excess_bits: float) -> str | None:
        """Scales f times as wide save log₂ f bits a code."""
        if excess_bits > LARGEST_SAVING_BITS:
            return None
        return f"multiply gptq.scale_factor by {1.01 * 2**excess_bits:.2f} or set it to budget"


@dataclass(frozen=True)
class Bank:
    """A parameter made ready: N problems, columns in the order in which they are quantized.

    Where columns have scales, W, H and U are those of the weights divided by them.
    """

    name: str
    W: Tensor
    """[N, R, C]."""
    H: Tensor
    """[N, C, C]."""
    U: Tensor
    """[N, C, C]."""
    order: Tensor
    """int64 [N, C]: the column of the weights at each position."""
    magnitudes: Tensor
    """[N, K, R]: what each candidate maps on the largest code, before any factor."""
    least: Tensor
    """[N, K, R]: what it maps there at least, however small the factor."""
    bits: int
    table: dict[str, Any]
    """Columns of the layer table that are known already."""
    input_scales: Tensor | None = None
    """float16 [N, C]."""
    sensitivities: Tensor | None = None
    """[N, R]."""


def prepared_bank(
    name: str,
    weights: Tensor,
    hessians: Tensor,
    settings: GptqSettings,
    sensitivities: Tensor | None = None,
) -> Bank:
    """What GPTQ of weights [N, R, C] needs of hessians [N, C, C] for any factor on the steps.

    sensitivities: g² of every row, [N, R], for `steps: sensitivity`.
    Factorizations run in float64, the rest in the dtype of `weights`, and all on its device.
    Raises UserError where a number is not finite or a Hessian cannot be factorized.
    """
    require_finite(weights)
    if not torch.isfinite(hessians).all():
        raise UserError(f"{name}: calibration gave activations that are not finite")
    H = hessians.to(weights.device, torch.float64)
    dead = H.diagonal(dim1=1, dim2=2) == 0
    alive = ~dead
    H = H * (alive.unsqueeze(1) & alive.unsqueeze(2))
    W = weights * alive.unsqueeze(1)

    # Stable, so that columns of equal weight keep their order on every device.
    order = H.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    H = _reorder(_reorder(H, order, dim=1), order, dim=2)
    W = _reorder(W, order, dim=2)
    fraction = max(settings.dampening_fraction, EMBEDDING_DAMPENING if name == EMBEDDING else 0.0)
    U, dampening = inverse_factor(name, H, fraction)
    table = {"dampening_fraction": dampening.tolist(), "dead_columns": dead.sum(1).tolist()}
    if settings.steps == "sensitivity":
        rows = sensitivities.to(weights.device, torch.float64)
        return _sensitivity_bank(name, W, H, U, order, rows, table)
    if settings.steps == "sigmas":
        magnitudes = settings.sigmas.of(name) * weights.std(-1, correction=0).unsqueeze(1)
    else:
        magnitudes = clip_magnitudes(W, settings.clip_percentiles)
    least = torch.zeros_like(magnitudes)
    if settings.scale_factor == "budget":
        least = torch.minimum(magnitudes, W.abs().amax(2).unsqueeze(1))
    bits = EMBEDDING_BITS if name == EMBEDDING else BITS
    return Bank(name, W, H.to(W.dtype), U.to(W.dtype), order, magnitudes, least, bits, table)


def _sensitivity_bank(
    name: str, W: Tensor, H: Tensor, U: Tensor, order: Tensor, rows: Tensor, table: dict[str, Any]
) -> Bank:
    """A bank with a scale for each column, and steps U_cc/g before any factor.

    GPTQ of W·diag(c)⁻¹ on inputs diag(c)·x, whose H⁻¹ has the factor U·diag(c)⁻¹.
    """
    columns = U.diagonal(dim1=1, dim2=2)
    level = columns.log().mean(1, keepdim=True).exp()
    input_scales = geometric_steps(columns / level)
    least = EMBEDDING_LEAST_SENSITIVITY if name == EMBEDDING else LEAST_SENSITIVITY
    rows = (rows + least * rows.mean(1, keepdim=True)).clamp(min=SMALLEST_SENSITIVITY)
    c = input_scales.to(torch.float64).unsqueeze(1)
    scaled = W / c.to(W.dtype)
    return Bank(
        name,
        scaled,
        (H * c * c.mT).to(W.dtype),
        (U / c).to(W.dtype),
        order,
        (largest_code(FREE_BITS) * level * rows.rsqrt()).unsqueeze(1),
        LARGEST_MARGIN * scaled.abs().amax(2).unsqueeze(1).double(),
        FREE_BITS,
        table,
        input_scales,
        rows,
    )


def bank_codes(
    bank: Bank, settings: GptqSettings, factor: float
) -> tuple[QuantizedTensor, pd.DataFrame]:
    """The codes of a bank, with every step `factor` times as wide, and their table.

    The table has one row per matrix: bank, matrix, error = tr((W−Q)·H·(W−Q)ᵀ), that of rounding to
    nearest with the same choice of clip candidates, output_power = tr(W·H·Wᵀ) to compare them with,
    the geometric mean of the steps, the dampening fraction used, and dead columns; with
    `steps: percentiles` the rows' mean clip percentile; with `steps: sensitivity` the mean g² and
    the nats a token that the error is expected to cost.
    """
    W, H, bits = bank.W, bank.H, bank.bits
    candidates = scale_from_magnitude(torch.maximum(factor * bank.magnitudes, bank.least), bits)
    if bank.input_scales is not None:
        candidates = geometric_steps(candidates)
    codes = gptq_codes(W, bank.U, candidates, bits, settings.block_columns)
    codes, scales, errors, choice = _best_candidates(W, H, codes, candidates)
    nearest = nearest_codes(W.unsqueeze(1), candidates.to(W.dtype).unsqueeze(3), bits)
    *_, nearest_errors, _ = _best_candidates(W, H, nearest, candidates)

    table = {
        "bank": bank.name,
        "matrix": range(len(W)),
        "error": errors.sum(1).tolist(),
        "error_round_to_nearest": nearest_errors.sum(1).tolist(),
        "output_power": _weighted_squares(W, H).sum(1).tolist(),
        "step": scales.double().log().mean(1).exp().tolist(),
        **bank.table,
    }
    if settings.steps == "percentiles":
        percentiles = torch.tensor(settings.clip_percentiles, dtype=torch.float64)
        table["clip_percentile"] = percentiles[choice.cpu()].mean(1).tolist()
    if bank.sensitivities is not None:
        table["sensitivity"] = bank.sensitivities.mean(1).tolist()
        table["expected_nats"] = (bank.sensitivities * errors).sum(1).div(2).tolist()
    back = bank.order.argsort(dim=1)
    codes, inputs = _reorder(codes, back, dim=2).to(torch.int8), bank.input_scales
    inputs = None if inputs is None else inputs.gather(1, back)
    return QuantizedTensor(codes, scales, bits, input_scales=inputs), pd.DataFrame(table)


def sensitivity_unit(banks: Sequence[Bank]) -> float:
    """The δ with which the geometric mean of step / deviation of the row is TYPICAL_STEP.

    Over all weights; rows that are zero do not count.
    """
    total, count = 0.0, 0
    for bank in banks:
        magnitudes, columns = bank.magnitudes[:, 0], bank.W.shape[2]
        deviations = (bank.W * bank.input_scales.unsqueeze(1)).double().std(2, correction=0)
        counts = deviations > 0
        ratios = magnitudes[counts] / largest_code(bank.bits) / deviations[counts]
        total += float(ratios.log().sum()) * columns
        count += int(counts.sum()) * columns
    return TYPICAL_STEP / math.exp(total / max(1, count))


def geometric_steps(steps: Tensor) -> Tensor:
    """The nearest powers of 2^(1/STEPS_AN_OCTAVE), float16, of any shape."""
    exponents = (steps.double().log2() * STEPS_AN_OCTAVE).round() / STEPS_AN_OCTAVE
    return exponents.exp2().clamp(SCALE_MINIMUM, SCALE_MAXIMUM).to(torch.float16)


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


def clip_magnitudes(W: Tensor, percentiles: Sequence[float]) -> Tensor:
    """Percentiles of every row's |W| for W [N, R, C], linear between values: [N, K, R]."""
    ranks = [(1 - percentile) * (W.shape[2] - 1) for percentile in percentiles]
    depth = min(W.shape[2], int(max(ranks)) + 2)
    largest = W.abs().topk(depth, dim=2).values
    magnitudes = []
    for rank in ranks:
        below = min(int(rank) + 1, depth - 1)
        magnitudes.append(
            torch.lerp(largest[..., int(rank)], largest[..., below], rank - int(rank))
        )
    return torch.stack(magnitudes, dim=1)


def gptq_codes(W: Tensor, U: Tensor, scales: Tensor, bits: int, block_columns: int) -> Tensor:
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
        factor = U[:, start:stop, start:stop]
        block_codes, errors = _quantize_block(block, factor, row_scales, bits)
        codes[..., start:stop] = block_codes.permute(1, 2, 0)
        remaining[..., stop:] -= errors.permute(1, 2, 0) @ U[:, start:stop, stop:]
    return codes.view(N, K, R, C)


def _quantize_block(block: Tensor, U: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Columns first: block [B, N, rows], changed in place; U [N, B, B]; scales [N, rows]."""
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    for column in range(len(block)):
        weights = block[column]
        codes[column] = nearest_codes(weights, scales, bits)
        residual = weights - codes[column] * scales
        errors[column] = residual / U[:, column, column].unsqueeze(1)
        later = U[:, column, column + 1 :].T.unsqueeze(2)
        block[column + 1 :] -= later * errors[column]
    return codes, errors


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


def _stacked(parts: Mapping[tuple[str, int], Tensor] | None, name: str, count: int) -> Tensor:
    """What there is for each of a parameter's matrices, as one tensor."""
    return torch.stack([parts[name, index] for index in range(count)])
