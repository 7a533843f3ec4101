"""Integer codes, their scales, and the straight-through estimator."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fairway.errors import UserError
from fairway.quantization.integers import (
    QuantizedTensor,
    fake_quantize,
    round_to_nearest,
)

matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=7),
    elements=st.floats(-1000, 1000, width=32),
).map(torch.from_numpy)


groups = st.none() | st.integers(1, 9)


@pytest.mark.parametrize(("bits", "limit"), [(2, 1), (4, 7), (6, 31), (8, 127)])
@settings(max_examples=100, deadline=None)
@given(weights=matrices, group_columns=groups)
def test_error_is_at_most_half_a_step(weights, group_columns, bits, limit):
    quantized = round_to_nearest(weights, bits, group_columns)
    assert quantized.codes.dtype == torch.int8 and quantized.scales.dtype == torch.float16
    assert quantized.codes.abs().max() <= limit
    step = quantized.steps()
    # The scale is itself rounded to fp16: relative 2^-11, or half of 2^-24 where it is subnormal.
    slack = limit * (step * 2**-11 + 2**-25)
    assert ((quantized.dequantize() - weights).abs() <= step / 2 + slack).all()


@settings(max_examples=50, deadline=None)
@given(weights=matrices, group_columns=st.integers(1, 9))
def test_groups_of_columns_are_quantized_like_rows_of_their_own(weights, group_columns):
    quantized = round_to_nearest(weights, 4, group_columns)
    parts = [round_to_nearest(part, 4) for part in weights.split(group_columns, dim=-1)]
    assert torch.equal(quantized.codes, torch.cat([part.codes for part in parts], dim=-1))
    assert torch.equal(quantized.scales, torch.stack([part.scales for part in parts], dim=-1))
    decoded = torch.cat([part.dequantize() for part in parts], dim=-1)
    assert torch.equal(quantized.dequantize(), decoded)


def test_quantizing_what_was_quantized_changes_nothing():
    weights = round_to_nearest(torch.randn(5, 64), 6).dequantize()
    again = round_to_nearest(weights, 6)
    assert torch.equal(again.dequantize(), weights)


def test_largest_magnitude_of_a_row_gets_the_largest_code():
    weights = torch.tensor([[-2.0, 1.0, 0.0], [0.5, 0.25, 4.0]])
    codes = round_to_nearest(weights, 6).codes
    assert codes[0].tolist() == [-31, 16, 0] and codes[1, 2] == 31


def test_zero_rows_stay_zero_and_keep_a_positive_scale():
    quantized = round_to_nearest(torch.zeros(3, 4), 6)
    assert (quantized.codes == 0).all() and (quantized.scales > 0).all()


def test_scales_are_used_as_stored_in_fp16():
    weights = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    quantized = round_to_nearest(weights, 6)
    expected = (weights / quantized.scales.float().unsqueeze(1)).round().clamp(-31, 31)
    assert torch.equal(quantized.codes.float(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    weights = torch.ones(2, 3)
    weights[1, 2] = value
    with pytest.raises(UserError, match="1 of 6 weights are not finite"):
        round_to_nearest(weights, 6)


@pytest.mark.parametrize(("bits", "group_columns"), [(6, None), (4, 8), (4, 5)])
def test_fake_quantization_is_exact_in_value_and_transparent_in_gradient(bits, group_columns):
    weight = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    output = fake_quantize(weight, bits, group_columns)
    stored = round_to_nearest(weight.detach(), bits, group_columns)
    assert torch.equal(output, stored.dequantize())
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    output.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def tensor(codes=(2, 6), scales=(2,), dtype=torch.float16, **arguments):
    codes, scales = torch.ones(codes, dtype=torch.int8), torch.ones(scales, dtype=dtype)
    return QuantizedTensor(codes, scales, **{"bits": 6, **arguments})


def test_dequantized_weights_are_float32():
    assert tensor().dequantize().dtype == torch.float32
    assert tensor(scales=(2, 2), group_columns=4).dequantize().dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": (3,)}, r"scales are \(3,\), expected \(2,\)"),
        ({"group_columns": 4}, r"scales are \(2,\), expected \(2, 2\)"),
        ({"scales": (2, 3), "group_columns": 4}, r"expected \(2, 2\)"),
        ({"dtype": torch.float32}, "expected int8 and float16"),
        ({"bits": 1}, "bits is 1"),
        ({"bits": 9}, "bits is 9"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tensor(**arguments)
