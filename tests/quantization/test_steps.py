"""Steps by deviation and by sensitivity, and the factor with which an artifact fills its limit."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.data.dataset import Dataset
from fairway.errors import UserError
from fairway.model.gpt import GPT
from fairway.model.sampling import self_generated_tokens
from fairway.model.spec import BANKS
from fairway.quantization.artifact import (
    encode_artifact,
    quantizable,
    read_artifact,
    restored,
    storable,
)
from fairway.quantization.calibration import collect_sensitivities
from fairway.quantization.coding import code_bits, pack
from fairway.quantization.filling import SLACK_FRACTION, fill_limit
from fairway.quantization.integers import QuantizedTensor, round_to_nearest
from fairway.quantization.quantize import prepared_model, quantize_to_file
from fairway.quantization.quantizers.gptq import LEAST_SENSITIVITY, geometric_steps
from fairway.quantization.settings import QuantizationSettings, Sigmas, quantizer_of
from producers import write_artifact
from scattered import SMALL, scattered_model

BOS = 1
TEXT = Dataset(48, BOS, None, {})
SETTINGS = QuantizationSettings(
    calibration_sequences=32, calibration_tokens=24, batch_sequences=32, block_columns=16
)
SENSITIVE = SETTINGS.changed(steps="sensitivity", embedding="gptq", scale_factor="budget")


@pytest.fixture(scope="module")
def model():
    return scattered_model()


@pytest.fixture(scope="module")
def tokens(model):
    return self_generated_tokens(model, 64, 24, 1.0, 64, 99, BOS)


def divergence(model, state, tokens):
    """Mean divergence in nats of the model with `state` from the one with full precision."""
    rounded = GPT(SMALL)
    rounded.load_state_dict(state)
    with torch.no_grad():
        exact, approximate = (m(tokens).log_softmax(-1) for m in (model, rounded))
    return float((exact.exp() * (exact - approximate)).sum(-1).mean())


@pytest.mark.parametrize(
    ("name", "sigmas", "largest"),
    [("key_value_bank", 13.0, 31), ("mlp_down_bank", 11.5, 31), ("token_embedding", 14.0, 63)],
)
def test_a_step_is_a_share_of_the_rows_deviation(name, sigmas, largest):
    weights = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    quantizer = quantizer_of(SETTINGS.changed(steps="sigmas", scale_factor=2.0))
    hessians = {(name, 0): torch.eye(64, dtype=torch.float64)}
    stored, _ = quantizer.quantize({name: weights}, hessians)
    expected = 2 * sigmas / largest * weights.double().std(2, correction=0)
    assert stored[name].scales.double().numpy() == pytest.approx(expected.numpy(), rel=1e-3)
    assert Sigmas().of(name) == sigmas


def test_sensitivities_are_mean_squared_gradients_of_every_output(model, tokens):
    class Offset:
        """Adds zeros to every output; their gradients are those in the outputs."""

        parts, changes_scales = {}, True

        def __init__(self):
            self.offsets = {}

        def product(self, bank, index, x, y):
            self.offsets[bank, index] = torch.zeros_like(y, requires_grad=True)
            return y + self.offsets[bank, index]

        def scale(self, name, layer, value):
            return value

    found = collect_sensitivities(model, tokens, batch_sequences=40)
    model.adapter = offset = Offset()
    logits = model(tokens)[:, :-1].double()
    model.adapter = None
    (-logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).sum()).backward()
    model.zero_grad()
    assert len(offset.offsets) == sum(len(getattr(model, bank)) for bank in BANKS)
    for key, zeros in offset.offsets.items():
        expected = zeros.grad.double().square().sum((0, 1)) / tokens.numel()
        assert torch.allclose(found[key], expected, rtol=1e-4, atol=1e-12), key
    p = logits.detach().softmax(-1)
    expected = (p * (1 - p)).sum((0, 1)) / tokens.numel()
    assert torch.allclose(found["token_embedding", 0], expected, rtol=1e-4)
    assert found.keys() == {*offset.offsets, ("token_embedding", 0)}
    assert model.adapter is None and all(one.grad is None for one in model.parameters())


@pytest.fixture(scope="module")
def filled(model, tmp_path_factory):
    """Table, metrics and path of an artifact that fills about 3.4 bits a code."""
    path = tmp_path_factory.mktemp("filled") / "artifact.bin"
    codes = sum(tensor.numel() for tensor in quantizable(model, takes_embedding=True).values())
    limit = len(encode_artifact(SMALL, without_codes(model))) + round(3.4 * codes / 8)
    table, metrics = quantize_to_file(path, model, SENSITIVE, TEXT, seed=0, limit_bytes=limit)
    return path, limit, table, metrics


def without_codes(model):
    """Everything stored but codes and their tables."""
    zeros = {name: torch.zeros_like(one) for name, one in quantizable(model).items()}
    return storable(model, {name: round_to_nearest(one, 6) for name, one in zeros.items()})


def test_the_artifact_fills_its_limit_and_no_code_is_zeroed(filled):
    path, limit, table, metrics = filled
    assert limit * (1 - SLACK_FRACTION) < metrics["artifact_bytes"] <= limit
    assert path.stat().st_size == metrics["artifact_bytes"] and metrics["zeros"] == 0
    assert set(table.bank) == {*BANKS, "token_embedding"}
    assert np.isfinite(table.drop(columns="bank").to_numpy(float)).all()


def test_less_diverges_at_equal_bytes_than_with_percentiles(filled, model, tokens, tmp_path):
    path, limit, *_ = filled
    state = read_artifact(path)[1]
    percentiles = SETTINGS.changed(scale_factor="budget")
    other = tmp_path / "artifact.bin"
    _, metrics = quantize_to_file(other, model, percentiles, TEXT, seed=0, limit_bytes=limit)
    assert metrics["artifact_bytes"] > limit * (1 - SLACK_FRACTION)
    ours, theirs = (divergence(model, one, tokens) for one in (state, read_artifact(other)[1]))
    assert ours < 0.8 * theirs


def test_the_same_model_gives_the_same_artifact(filled, model, tmp_path):
    path, limit, *_ = filled
    again = tmp_path / "artifact.bin"
    quantize_to_file(again, model, SENSITIVE, TEXT, seed=0, limit_bytes=limit)
    assert again.read_bytes() == path.read_bytes()


def test_what_is_read_back_is_what_was_stored(model, tmp_path):
    stored_at = prepared_model(model, quantizer_of(SENSITIVE), SENSITIVE, TEXT, 0)
    tensors, table = stored_at(1.5)
    assert all(tensors[name].input_scales is not None for name in table.bank.unique())
    write_artifact(tmp_path / "artifact.bin", SMALL, tensors)
    _, state = read_artifact(tmp_path / "artifact.bin")
    expected = restored(tensors)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_gptq_of_the_embedding_beats_rounding_in_the_logits(model, tokens):
    changed = SETTINGS.changed(steps="sigmas", embedding="gptq")
    stored_at = prepared_model(model, quantizer_of(changed), changed, TEXT, 0)
    tensors, table = stored_at(1.0)
    row = table[table.bank == "token_embedding"].iloc[0]
    assert row.error < row.error_round_to_nearest
    stored = tensors["token_embedding"]
    steps, weights = stored.steps(), model.token_embedding.detach()
    nearest = replace(stored, codes=(weights / steps).round().clamp(-63, 63).to(torch.int8))
    with torch.no_grad():
        hidden = model.hidden(tokens)
        ours, theirs = (
            (hidden @ (one.dequantize() - weights).T).square().mean() for one in (stored, nearest)
        )
    assert ours < theirs


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 10))
def test_steps_follow_sensitivity_of_rows_and_columns(seed, scale):
    """Every weight's step² times its sensitivity is the same, but for the grid of steps."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(1, 6, 8, generator=generator)
    variances = torch.rand(8, generator=generator, dtype=torch.float64) * 4 + 0.1
    rows = scale * (0.1 + torch.rand(6, generator=generator, dtype=torch.float64))
    changed = SETTINGS.changed(steps="sensitivity", dampening_fraction=1e-9)
    hessians = {("a", 0): variances.diag()}
    stored, table = quantizer_of(changed).prepared({"a": weights}, hessians, {("a", 0): rows})(1.0)
    sensitivities = rows + LEAST_SENSITIVITY * rows.mean()
    losses = stored["a"].steps().double()[0].square() * sensitivities[:, None] * variances
    assert losses.max() / losses.min() < 2**0.5 * 1.01
    assert table.sensitivity.iloc[0] == pytest.approx(float(sensitivities.mean()), rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-6, 6e4))
def test_steps_lie_on_a_grid_of_eighths_of_an_octave(step):
    found = float(geometric_steps(torch.tensor(step)))
    assert 2 ** (-1 / 16) / 1.01 < found / step < 2 ** (1 / 16) * 1.01


def random_banks(factor, deviation=0.02):
    """A model of one bank, rounded to steps `factor` times as wide."""
    weights = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)) * deviation
    scales = torch.full((2, 64), 0.01 * factor).half()
    codes = (weights / scales.float().unsqueeze(2)).round().clamp(-127, 127).to(torch.int8)
    return {"mlp_up_bank": QuantizedTensor(codes, scales, 8)}


@pytest.mark.parametrize("limit", [1200, 3000, 5000, 8000])
def test_the_limit_is_filled_from_below(limit):
    table = pd.DataFrame({"bank": ["mlp_up_bank"] * 2, "matrix": [0, 1]})
    tried = []

    def stored_at(factor):
        tried.append(factor)
        return random_banks(factor), table

    data, tensors, _, factor = fill_limit(SMALL, stored_at, limit)
    assert limit * (1 - SLACK_FRACTION) < len(data) <= limit
    assert data == encode_artifact(SMALL, tensors)
    assert factor in tried and len(tried) <= 8


def test_steps_grow_no_finer_than_codes_have_range_for():
    table = pd.DataFrame({"bank": ["mlp_up_bank"], "matrix": [0]})
    _, tensors, *_ = fill_limit(SMALL, lambda factor: (random_banks(factor), table), 10**6)
    codes = tensors["mlp_up_bank"].codes
    assert 120 <= codes.abs().max() <= 127


def test_a_limit_out_of_reach_is_an_error():
    table = pd.DataFrame({"bank": ["mlp_up_bank"], "matrix": [0]})
    with pytest.raises(UserError, match=r"even with steps .* budgets\.artifact_bytes"):
        fill_limit(SMALL, lambda factor: (random_banks(factor), table), 500)


def test_bits_per_code_are_those_that_the_range_coder_needs():
    generator = np.random.default_rng(0)
    spreads = np.exp(generator.normal(0, 0.5, (4, 256, 1)))
    stack = np.rint(generator.normal(0, 3, (4, 256, 256)) * spreads).clip(-127, 127).astype(np.int8)
    bits = code_bits([stack])[0]
    assert bits.shape == (4,)
    assert bits.sum() * 256 * 256 / 8 == pytest.approx(len(pack([stack], "range")[1]), rel=0.05)
