"""Symmetric integers with fp16 scales: one scale for a row, or for each group of its columns.

A weight is code · scale, times the scale of its column where columns have scales too. Codes run
from −(2^(bits−1) − 1) to +(2^(bits−1) − 1), so zero is exact and the range symmetric: 63 codes for
int6, 255 for int8.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.errors import UserError

EMBEDDING = "token_embedding"
"""The parameter that is one matrix and lies in no bank; a quantizer is given it as [1, V, C]."""
# 2^-24, the least positive fp16 number (a subnormal), keeps the scale of an all-zero row positive.
SCALE_MINIMUM = 2.0**-24
SCALE_MAXIMUM = torch.finfo(torch.float16).max
ALLOWED_BITS = range(2, 9)
"""From −1, 0 and 1 to what a byte holds."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Integer codes and the scales that turn them back into weights.

    Raises ValueError where dtypes, shapes and bits do not belong together.
    """

    codes: Tensor
    """int8 [..., rows, columns]."""
    scales: Tensor
    """float16 [..., rows], or [..., rows, groups] with `group_columns`; positive."""
    bits: int
    """Of the largest code, sign included: from 2 to 8."""
    group_columns: int | None = None
    """Neighboring columns of a row that share a scale, fewer in the last group where they do not
    divide the row; None: one scale for the row."""
    input_scales: Tensor | None = None
    """float16 [..., columns]: a further factor for each column of a matrix; positive."""

    def __post_init__(self) -> None:
        shape = tuple(self.codes.shape)
        if self.codes.dtype != torch.int8 or self.scales.dtype != torch.float16:
            found = f"{self.codes.dtype} and {self.scales.dtype}"
            raise ValueError(f"codes and scales are {found}, expected int8 and float16")
        _expect_shape("scales", self.scales, scales_shape(shape, self.group_columns))
        if self.input_scales is not None:
            _expect_shape("input scales", self.input_scales, input_scales_shape(shape))
        if self.bits not in ALLOWED_BITS:
            raise ValueError(f"bits is {self.bits}, expected 2 to 8")

    def dequantize(self) -> Tensor:
        """float32 [..., rows, columns]: each code times its step."""
        return self.codes.float() * self.steps()

    def steps(self) -> Tensor:
        """What a code of 1 stands for: float32 [..., rows, columns], or [..., rows, 1] where it is
        the same in all of a row."""
        steps = _spread(self.scales, self.group_columns, self.codes.shape[-1]).float()
        return (
            steps if self.input_scales is None else steps * self.input_scales.float().unsqueeze(-2)
        )

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "QuantizedTensor":
        """With `function`, such as a move to another device, applied to each tensor."""
        tensors = {name: function(getattr(self, name)) for name in ("codes", "scales")}
        if self.input_scales is not None:
            tensors["input_scales"] = function(self.input_scales)
        return replace(self, **tensors)


def _expect_shape(name: str, scales: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(scales.shape) != expected:
        raise ValueError(f"{name} are {tuple(scales.shape)}, expected {expected}")


def scales_shape(shape: tuple[int, ...], group_columns: int | None) -> tuple[int, ...]:
    """The shape of the scales of codes of `shape` [..., rows, columns]."""
    if group_columns is None:
        return shape[:-1]
    return (*shape[:-1], -(-shape[-1] // group_columns))


def input_scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the input scales of codes of `shape` [..., rows, columns]."""
    return (*shape[:-2], shape[-1])


def largest_code(bits: int) -> int:
    """31 for int6, 127 for int8."""
    return 2 ** (bits - 1) - 1


def scale_from_magnitude(magnitude: Tensor, bits: int) -> Tensor:
    """The fp16 scale that maps `magnitude` (any shape, ≥ 0) on the largest code.

    It is rounded to fp16 here, before any code is computed, so that codes fit the stored scale.
    """
    scale = magnitude / largest_code(bits)
    return scale.clamp(SCALE_MINIMUM, SCALE_MAXIMUM).to(torch.float16)


def nearest_codes(weights: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes nearest to weights / scales, clamped to the range; in the dtype of `weights`.

    weights [..., columns]; scales broadcast against it, of the same dtype; ties go to even codes.
    """
    limit = largest_code(bits)
    return (weights / scales).round().clamp(-limit, limit)


def round_to_nearest(
    weights: Tensor, bits: int, group_columns: int | None = None
) -> QuantizedTensor:
    """Quantize `weights` [..., rows, columns] with no clipping: the largest weight that shares a
    scale gets the largest code.

    Raises UserError where a weight is not finite.
    """
    require_finite(weights)
    scales = _scales(weights, bits, group_columns)
    spread = _spread(scales, group_columns, weights.shape[-1]).to(weights.dtype)
    codes = nearest_codes(weights, spread, bits)
    return QuantizedTensor(codes.to(torch.int8), scales, bits, group_columns)


def fake_quantize(weight: Tensor, bits: int, group_columns: int | None = None) -> Tensor:
    """`weight` [..., rows, columns] as `round_to_nearest` would store it, untouched in gradient.

    For late quantization-aware training; nothing in it waits for a GPU. In the dtype of `weight`.
    """
    with torch.no_grad():
        scales = _scales(weight, bits, group_columns)
        scales = _spread(scales, group_columns, weight.shape[-1]).to(weight.dtype)
        rounded = nearest_codes(weight, scales, bits) * scales
    return straight_through(weight, rounded)


def straight_through(weight: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` in value, `weight` in gradient; both of one shape.

    The straight-through estimator (Bengio, Léonard and Courville 2013).
    """
    # The bracket is zero in value; adding `weight` outside it would round the result again.
    return rounded + (weight - weight.detach())


def require_finite(weights: Tensor) -> None:
    """UserError where `weights` holds a NaN or an infinity."""
    bad = int((~torch.isfinite(weights)).sum())
    if bad:
        raise UserError(
            f"{bad} of {weights.numel()} weights are not finite: "
            "training diverged, so lower its learning rates and rerun it"
        )


def _scales(weights: Tensor, bits: int, group_columns: int | None) -> Tensor:
    """float16 [..., rows] or [..., rows, groups], from the largest |weight| of a row or group."""
    magnitudes = weights.abs()
    if group_columns is not None:
        group_columns = min(group_columns, weights.shape[-1])
        missing = -weights.shape[-1] % group_columns
        magnitudes = F.pad(magnitudes, (0, missing)).unflatten(-1, (-1, group_columns))
    return scale_from_magnitude(magnitudes.amax(-1), bits)


def _spread(scales: Tensor, group_columns: int | None, columns: int) -> Tensor:
    """Scales as they multiply codes of `columns` columns: [..., rows, columns or 1]."""
    if group_columns is None:
        return scales.unsqueeze(-1)
    return scales.repeat_interleave(min(group_columns, columns), dim=-1)[..., :columns]
