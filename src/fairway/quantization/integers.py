"""Symmetric integers with one fp16 scale per row: int6 for matrices, int8 for embeddings.

A weight is code · scale. Codes run from −(2^(bits−1) − 1) to +(2^(bits−1) − 1), so zero is exact
and the range symmetric: 63 codes for int6, 255 for int8.
"""

from dataclasses import dataclass

import numpy as np
import torch

from fairway.errors import UserError

# 2^-24, the least positive fp16 number (a subnormal), keeps the scale of an all-zero row positive.
SCALE_MINIMUM = 2.0**-24
SCALE_MAXIMUM = torch.finfo(torch.float16).max


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Integer codes and the scales that turn them back into weights."""

    codes: torch.Tensor
    """int8 [..., rows, columns]."""
    scales: torch.Tensor
    """float16 [..., rows], positive."""

    def dequantize(self) -> torch.Tensor:
        """float32 [..., rows, columns]: each code times its row's scale."""
        return self.codes.float() * self.scales.float().unsqueeze(-1)


def largest_code(bits: int) -> int:
    """31 for int6, 127 for int8."""
    return 2 ** (bits - 1) - 1


def scale_from_magnitude(magnitude: torch.Tensor, bits: int) -> torch.Tensor:
    """The fp16 scale that maps `magnitude` (any shape, ≥ 0) on the largest code.

    It is rounded to fp16 here, before any code is computed, so that codes fit the stored scale.
    """
    scale = magnitude / largest_code(bits)
    return scale.clamp(SCALE_MINIMUM, SCALE_MAXIMUM).to(torch.float16)


def nearest_codes(weights: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes nearest to weights / scales, clamped to the range; in the dtype of `weights`.

    weights [..., columns]; scales broadcast against it, of the same dtype; ties go to even codes.
    """
    limit = largest_code(bits)
    return (weights / scales).round().clamp(-limit, limit)


def round_to_nearest(weights: torch.Tensor, bits: int) -> QuantizedTensor:
    """Quantise each row of `weights` [..., rows, columns] on its own, with no clipping.

    Raises UserError where a weight is not finite.
    """
    require_finite(weights)
    scales = scale_from_magnitude(weights.abs().amax(-1), bits)
    codes = nearest_codes(weights, scales.to(weights.dtype).unsqueeze(-1), bits)
    return QuantizedTensor(codes.to(torch.int8), scales)


def require_finite(weights: torch.Tensor) -> None:
    """UserError where `weights` holds a NaN or an infinity."""
    bad = int((~torch.isfinite(weights)).sum())
    if bad:
        raise UserError(
            f"{bad} of {weights.numel()} weights are not finite: "
            "training diverged, so lower its learning rates and rerun it"
        )


def fake_quantize_int6(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [..., rows, columns] rounded to int6 in value, untouched in gradient.

    Straight-through estimator (Bengio, Léonard and Courville 2013), for late quantisation-aware
    training. The result is exactly the round-to-nearest weight, in the dtype of `weight`.
    """
    with torch.no_grad():
        scales = scale_from_magnitude(weight.abs().amax(-1, keepdim=True), bits=6).to(weight.dtype)
        rounded = nearest_codes(weight, scales, bits=6) * scales
    # The bracket is zero in value; adding `weight` outside it would round the result again.
    return rounded + (weight - weight.detach())


def codes_to_bytes(codes: torch.Tensor) -> bytes:
    """Codes (int8, any shape) as one two's-complement byte each, row-major.

    Why int6 codes are not packed in 6 bits: an entropy coder follows. On Gaussian rows of 512 under
    LZMA, whole bytes come to 0.675 bytes a code (their entropy is 0.661), packed ones to 0.722.
    """
    return codes.contiguous().cpu().numpy().astype(np.int8).tobytes()


def bytes_to_codes(data: bytes, shape: tuple[int, ...], bits: int) -> torch.Tensor:
    """The inverse of `codes_to_bytes`: int8 of `shape`; UserError where a code is out of range."""
    codes = np.frombuffer(data, dtype=np.int8).reshape(shape)
    limit = largest_code(bits)
    if codes.size and not -limit <= int(codes.min()) <= int(codes.max()) <= limit:
        raise UserError(
            f"codes from {codes.min()} to {codes.max()} found, int{bits} allows −{limit} to "
            f"{limit}: the artifact was not written by this program"
        )
    return torch.from_numpy(codes.copy())
