"""GPTQ against a plain reference, against rounding to nearest, and at its edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.errors import UserError
from fairway.quantization.integers import round_to_nearest
from fairway.quantization.quantizers.gptq import (
    Gptq,
    bank_codes,
    clip_magnitudes,
    inverse_factor,
    prepared_bank,
)


def gptq_settings(**changes):
    return Gptq.Settings(**{"block_columns": 8, **changes})


def quantize_bank(name, weights, hessians, settings_, dtype=torch.float32):
    bank = prepared_bank(name, weights.to(dtype), hessians, settings_)
    return bank_codes(bank, settings_, settings_.scale_factor)


def random_problem(seed, matrices=3, rows=6, columns=20, correlation=0.8):
    """Weights [N, R, C] and Hessians [N, C, C] of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(matrices, rows, columns, dtype=torch.float64, generator=generator)
    own = torch.randn(matrices, 8 * columns, columns, dtype=torch.float64, generator=generator)
    shared = torch.randn(matrices, 8 * columns, 1, dtype=torch.float64, generator=generator)
    inputs = (1 - correlation) * own + correlation * shared
    inputs = inputs * torch.linspace(0.5, 2, columns, dtype=torch.float64)
    return weights, inputs.mT @ inputs / inputs.shape[1]


def reference_codes(weights, hessian, scale, dampening_fraction):
    """Optimal brain quantization, one column and one row at a time, with explicit inverses.

    weights [R, C], hessian [C, C], scale [R]: all float64. The textbook form: the inverse Hessian
    of the columns still to come is found afresh for every column, with no Cholesky and no blocks.
    """
    rows, columns = weights.shape
    damping = dampening_fraction * hessian.diagonal().mean()
    damped = hessian + damping * torch.eye(columns, dtype=torch.float64)
    waiting = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    work, codes = weights.clone(), torch.zeros(rows, columns, dtype=torch.int8)
    while waiting:
        inverse = torch.linalg.inv(damped[waiting][:, waiting])
        column = waiting[0]
        for row in range(rows):
            code = (work[row, column] / scale[row]).round().clamp(-31, 31)
            error = (work[row, column] - code * scale[row]) / inverse[0, 0]
            codes[row, column] = code.to(torch.int8)
            for position, other in enumerate(waiting[1:], start=1):
                work[row, other] -= error * inverse[0, position]
        waiting = waiting[1:]
    return codes


def reference_bank(weights, hessians, percentiles, dampening_fraction):
    codes, scales = [], []
    for matrix, hessian in zip(weights, hessians, strict=True):
        best_errors = torch.full((len(matrix),), torch.inf, dtype=torch.float64)
        best_codes = torch.zeros(matrix.shape, dtype=torch.int8)
        best_scales = torch.zeros(len(matrix), dtype=torch.float16)
        for percentile in percentiles:
            scale = (matrix.abs().quantile(percentile, dim=1) / 31).half()
            candidate = reference_codes(matrix, hessian, scale.double(), dampening_fraction)
            change = matrix - candidate.double() * scale.double()[:, None]
            errors = (change @ hessian * change).sum(1)
            better = errors < best_errors
            best_errors[better] = errors[better]
            best_codes[better] = candidate[better]
            best_scales[better] = scale[better]
        codes.append(best_codes)
        scales.append(best_scales)
    return torch.stack(codes), torch.stack(scales)


@pytest.mark.parametrize("percentiles", [(0.9, 0.99, 1.0), (1.0,)])
@pytest.mark.parametrize("block_columns", [1, 8, 20, 128])
def test_codes_equal_a_column_by_column_reference(block_columns, percentiles):
    weights, hessians = random_problem(seed=1)
    settings_ = gptq_settings(block_columns=block_columns, clip_percentiles=percentiles)
    tensor, _ = quantize_bank("bank", weights, hessians, settings_, dtype=torch.float64)
    codes, scales = reference_bank(weights, hessians, percentiles, 0.005)
    assert torch.equal(tensor.scales, scales)
    assert torch.equal(tensor.codes, codes)


@pytest.mark.parametrize("percentiles", [(0.99, 1.0), (1.0,)])
def test_table_reports_the_error_of_the_codes(percentiles):
    weights, hessians = random_problem(seed=2)
    settings_ = gptq_settings(clip_percentiles=percentiles)
    tensor, table = quantize_bank("up", weights, hessians, settings_, dtype=torch.float64)
    change = weights - tensor.codes.double() * tensor.scales.double().unsqueeze(-1)
    errors = (change @ hessians * change).sum((1, 2))
    assert table.error.tolist() == pytest.approx(errors.tolist(), rel=1e-9)
    power = (weights @ hessians * weights).sum((1, 2))
    assert table.output_power.tolist() == pytest.approx(power.tolist(), rel=1e-9)
    assert table.bank.tolist() == ["up"] * 3 and table.matrix.tolist() == [0, 1, 2]
    assert (table.dampening_fraction == 0.005).all() and (table.dead_columns == 0).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), correlation=st.floats(0.5, 0.9))
def test_error_is_below_round_to_nearest_on_correlated_inputs(seed, correlation):
    weights, hessians = random_problem(seed, rows=16, columns=32, correlation=correlation)
    _, table = quantize_bank("bank", weights, hessians, gptq_settings())
    assert (table.error < table.error_round_to_nearest).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_identity_hessian_gives_round_to_nearest(dtype):
    weights, _ = random_problem(seed=3)
    hessians = torch.eye(20).expand(3, 20, 20)
    only_maximum = gptq_settings(clip_percentiles=(1.0,))
    tensor, table = quantize_bank("bank", weights, hessians, only_maximum, dtype=dtype)
    nearest = round_to_nearest(weights.to(dtype), 6)
    assert torch.equal(tensor.codes, nearest.codes)
    assert torch.equal(tensor.scales, nearest.scales)
    assert table.error.tolist() == table.error_round_to_nearest.tolist()


def test_clip_candidates_never_do_worse_than_the_maximum_alone():
    weights, hessians = random_problem(seed=4)
    _, best = quantize_bank("bank", weights, hessians, gptq_settings())
    _, maximum = quantize_bank("bank", weights, hessians, gptq_settings(clip_percentiles=(1.0,)))
    assert (best.error <= maximum.error * (1 + 1e-6)).all()


def test_dead_columns_are_zeroed_and_do_not_disturb_the_others():
    weights, hessians = random_problem(seed=5)
    dead = [0, 7, 19]
    alive = [column for column in range(20) if column not in dead]
    hessians[:, dead] = 0
    hessians[:, :, dead] = 0
    # An outlier that nothing ever multiplies must not widen its row's scale.
    weights[:, :, 7] = 100
    tensor, table = quantize_bank(
        "bank", weights, hessians, gptq_settings(clip_percentiles=(1.0,)), dtype=torch.float64
    )
    assert (tensor.codes[:, :, dead] == 0).all()
    assert table.dead_columns.tolist() == [3, 3, 3]
    smaller, _ = quantize_bank(
        "bank",
        weights[:, :, alive],
        hessians[:, alive][:, :, alive],
        gptq_settings(clip_percentiles=(1.0,)),
        dtype=torch.float64,
    )
    assert torch.equal(tensor.codes[:, :, alive], smaller.codes)
    assert torch.equal(tensor.scales, smaller.scales)


def test_a_bank_whose_inputs_are_all_zero_becomes_zero():
    weights, _ = random_problem(seed=6)
    tensor, table = quantize_bank("bank", weights, torch.zeros(3, 20, 20), gptq_settings())
    assert (tensor.codes == 0).all()
    assert (table.dead_columns == 20).all() and (table.error == 0).all()


def test_matrices_of_a_bank_do_not_influence_each_other():
    weights, hessians = random_problem(seed=7)
    other_weights, other_hessians = random_problem(seed=8)
    together, _ = quantize_bank("bank", weights, hessians, gptq_settings(), dtype=torch.float64)
    weights[1:], hessians[1:] = other_weights[1:], other_hessians[1:]
    changed, _ = quantize_bank("bank", weights, hessians, gptq_settings(), dtype=torch.float64)
    assert torch.equal(together.codes[0], changed.codes[0])


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse():
    _, hessians = random_problem(seed=9)
    factor, fractions = inverse_factor("bank", hessians, 0.01)
    mean = hessians.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
    inverse = torch.linalg.inv(hessians + 0.01 * mean * torch.eye(20, dtype=torch.float64))
    assert torch.allclose(factor.mT @ factor, inverse, rtol=1e-10, atol=1e-12)
    assert torch.equal(factor, factor.triu())
    assert fractions.tolist() == [0.01] * 3


def test_dampening_escalates_only_where_needed_and_says_so():
    weights, hessians = random_problem(seed=10)
    # Indefinite by 2 % of the mean diagonal: 0.005 is too little, 0.05 is enough.
    eigenvalue = torch.linalg.eigvalsh(hessians[1])[0]
    mean = hessians[1].diagonal().mean()
    hessians[1] -= (eigenvalue + 0.02 * mean) * torch.eye(20, dtype=torch.float64)
    _, table = quantize_bank("bank", weights, hessians, gptq_settings())
    assert table.dampening_fraction.tolist() == pytest.approx([0.005, 0.05, 0.005])


def test_a_hopeless_hessian_is_an_error_that_names_the_matrix():
    weights, hessians = random_problem(seed=11)
    hessians[2, 0, 1] = hessians[2, 1, 0] = 1e6 * hessians[2].diagonal().max()
    with pytest.raises(UserError, match=r"mlp_up_bank, matrices 2: .*not positive definite"):
        quantize_bank("mlp_up_bank", weights, hessians, gptq_settings())


def test_numbers_that_are_not_finite_are_refused():
    weights, hessians = random_problem(seed=12)
    hessians[0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="bank: calibration gave"):
        quantize_bank("bank", weights, hessians, gptq_settings())
    weights[0, 0, 0] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        quantize_bank("bank", weights, torch.eye(20).expand(3, 20, 20), gptq_settings())


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    columns=st.integers(1, 40),
    percentiles=st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
)
def test_clip_magnitudes_are_percentiles(seed, columns, percentiles):
    weights = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(seed))
    magnitudes = clip_magnitudes(weights, percentiles)
    assert magnitudes.shape == (2, len(percentiles), 3)
    for index, percentile in enumerate(percentiles):
        expected = weights.abs().quantile(percentile, dim=2)
        assert torch.allclose(magnitudes[:, index], expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 6),
    columns=st.integers(1, 12),
    block_columns=st.integers(1, 13),
)
def test_any_shape_gives_codes_in_range(seed, rows, columns, block_columns):
    weights, hessians = random_problem(seed, matrices=2, rows=rows, columns=columns)
    tensor, table = quantize_bank(
        "bank", weights, hessians, gptq_settings(block_columns=block_columns)
    )
    assert tensor.codes.shape == weights.shape and tensor.codes.dtype == torch.int8
    assert tensor.codes.abs().max() <= 31
    assert (tensor.scales > 0).all() and torch.isfinite(tensor.scales).all()
    assert len(table) == 2


def test_all_banks_are_quantized_and_their_tables_joined():
    first, first_hessians = random_problem(seed=13, matrices=2)
    second, second_hessians = random_problem(seed=14, matrices=1, columns=9)
    hessians = {("a", index): hessian for index, hessian in enumerate(first_hessians)}
    hessians["b", 0] = second_hessians[0]
    tensors, table = Gptq(gptq_settings()).quantize({"a": first, "b": second}, hessians)
    alone, _ = quantize_bank("b", second, second_hessians, gptq_settings())
    assert torch.equal(tensors["b"].codes, alone.codes)
    assert list(zip(table.bank, table.matrix, strict=True)) == [("a", 0), ("a", 1), ("b", 0)]


def test_late_quantization_aware_training_rounds_to_the_nearest_int6():
    weight, _ = random_problem(seed=15)
    rounded = Gptq(gptq_settings()).fake("mlp_up_bank", weight.float())
    assert torch.equal(rounded, round_to_nearest(weight.float(), 6).dequantize())
