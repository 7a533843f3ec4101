"""Hessians of the plain formulation; GPTQ and compression as the reference submission has them.

GPTQ runs matrix by matrix on the CPU, compression is LZMA.
"""

import lzma
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fairway.model.gpt import GPT
from fairway.quantization.artifact import Stored
from fairway.quantization.integers import QuantizedTensor

LARGEST_CODE = 31
SMALLEST_SCALE = 2.0**-24


@torch.no_grad()
def baseline_hessians(
    model: GPT, tokens: Tensor, batch_sequences: int
) -> dict[tuple[str, int], Tensor]:
    """(bank, matrix) → mean of x·xᵀ over int64 `tokens` [S, T], float64, from float32 products.

    model: in the plain formulation, which is not compiled. Queries, keys and values share one.
    """
    sums: dict[tuple[str, int], Tensor] = {}
    latest: list[Tensor | None] = [None, None]

    def add(bank: str, index: int, inputs: Tensor) -> None:
        if inputs is not latest[0]:
            rows = inputs.flatten(0, -2).float()
            latest[:] = inputs, (rows.T @ rows).double() / tokens.numel()
        sums[bank, index] = sums.get((bank, index), 0) + latest[1]

    model.activation_hook = add
    for batch in tokens.split(batch_sequences):
        model.hidden(batch.to(model.token_embedding.device))
    model.activation_hook = None
    return sums


def baseline_gptq(
    weights: Tensor, hessian: Tensor, percentiles: Sequence[float], block: int, dampening: float
) -> tuple[Tensor, Tensor]:
    """int6 codes [rows, columns] and fp16 scales [rows] of one matrix, on the CPU.

    One pass over the columns per clip percentile, each over the whole matrix; the pass with the
    least squared error of the outputs is kept.
    """
    W, H = weights.float().cpu(), hessian.float().cpu().clone()
    dead = H.diagonal() == 0
    H[dead, dead] = 1.0
    W = W.masked_fill(dead, 0.0)
    order = H.diagonal().argsort(descending=True)
    H, W = H[order][:, order], W[:, order]
    damped = H + dampening * H.diagonal().mean() * torch.eye(len(H))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    U = torch.linalg.cholesky(inverse, upper=True)
    best: tuple[float, Tensor, Tensor] | None = None
    for percentile in percentiles:
        magnitude = torch.quantile(W.abs(), percentile, dim=1)
        scales = (magnitude / LARGEST_CODE).clamp_min(SMALLEST_SCALE).half()
        codes = gptq_pass(W.clone(), U, scales.float(), block)
        error = output_error(W - codes * scales.float()[:, None], H)
        if best is None or error < best[0]:
            best = error, codes, scales
    _, codes, scales = best
    return codes[:, order.argsort()].to(torch.int8), scales


def gptq_pass(W: Tensor, U: Tensor, scales: Tensor, block: int) -> Tensor:
    """Codes [rows, columns]; W is changed in place."""
    codes = torch.empty_like(W)
    for start in range(0, W.size(1), block):
        stop = min(start + block, W.size(1))
        part, triangle = W[:, start:stop].clone(), U[start:stop, start:stop]
        errors = torch.zeros_like(part)
        for column in range(stop - start):
            weight = part[:, column]
            code = torch.clamp(torch.round(weight / scales), -LARGEST_CODE, LARGEST_CODE)
            error = (weight - code * scales) / triangle[column, column]
            part[:, column:] -= error[:, None] * triangle[column, column:][None, :]
            codes[:, start + column], errors[:, column] = code, error
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return codes


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """tr(D·H·Dᵀ): the squared error of the outputs, summed over rows."""
    return float(((difference @ hessian) * difference).sum())


def baseline_archive(tensors: Mapping[str, Stored]) -> bytes:
    """One byte a code, everything else as it is, through LZMA at preset 9."""
    parts = []
    for name in sorted(tensors):
        tensor = tensors[name]
        numbers = [tensor.codes, tensor.scales] if isinstance(tensor, QuantizedTensor) else [tensor]
        parts += [part.contiguous().cpu().numpy().tobytes() for part in numbers]
    return lzma.compress(b"".join(parts), preset=9)
