"""Hessians, calibration text, training rows, and the whole of the gptq stage on a tiny GPT."""

import numpy as np
import pandas as pd
import pytest
import torch

from fairway.data.dataset import Dataset, Span
from fairway.data.shards import write_shard
from fairway.errors import UserError
from fairway.model.gpt import GPT
from fairway.model.sampling import self_generated_tokens
from fairway.model.spec import BANKS
from fairway.quantization.artifact import (
    load_artifact,
    quantizable,
    restored,
    storable,
)
from fairway.quantization.calibration import (
    HessianSums,
    calibration_tokens,
    collect_hessians,
    sum_of_products,
    training_tokens,
)
from fairway.quantization.integers import round_to_nearest
from fairway.quantization.quantize import prepared_model, with_code_columns
from fairway.quantization.settings import QuantizationSettings, quantizer_of
from producers import write_artifact
from scattered import SMALL, scattered_model

SETTINGS = QuantizationSettings(
    calibration="self_generated",
    calibration_sequences=24,
    calibration_tokens=24,
    temperature=0.8,
    batch_sequences=8,
    block_columns=16,
    dampening_fraction=0.005,
    clip_percentiles=(0.999, 1.0),
    scale_factor=1.0,
)
BOS = 1
TEXT = Dataset(48, BOS, None, {})
"""Self-generated calibration reads no more of it than its BOS."""


@pytest.fixture(scope="module")
def model():
    return scattered_model()


@pytest.fixture
def tokens():
    return torch.randint(2, 48, (12, 24), generator=torch.Generator().manual_seed(3))


def observed_inputs(model, tokens):
    """Every input each matrix sees: (bank, matrix) → float64 [tokens, C]."""
    seen = {}

    def observe(bank, index, inputs):
        seen.setdefault((bank, index), []).append(inputs.flatten(0, -2).double())

    model.activation_hook = observe
    with torch.no_grad():
        model(tokens)
    model.activation_hook = None
    return {key: torch.cat(parts) for key, parts in seen.items()}


def test_hessians_are_the_mean_products_of_every_matrix(model, tokens):
    hessians = collect_hessians(model, tokens, batch_sequences=5)
    inputs = observed_inputs(model, tokens)
    with torch.no_grad():
        inputs["token_embedding", 0] = model.hidden(tokens).flatten(0, 1).double()
    assert hessians.keys() == inputs.keys()
    assert len(hessians) == sum(len(getattr(model, bank)) for bank in BANKS) + 1
    for key, rows in inputs.items():
        expected = rows.T @ rows / len(rows)
        assert hessians[key].dtype == torch.float64
        assert torch.allclose(hessians[key], expected, rtol=1e-4, atol=1e-6), key
    assert model.activation_hook is None


def test_queries_keys_and_values_share_one_product(model, tokens):
    hessians = collect_hessians(model, tokens, batch_sequences=12)
    for layer in range(SMALL.layers):
        shared = hessians["query_output_bank", layer]
        assert shared is hessians["key_value_bank", layer]
        assert shared is hessians["key_value_bank", SMALL.layers + layer]
        assert shared is not hessians["query_output_bank", SMALL.layers + layer]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="tensor cores are a GPU's")
@pytest.mark.parametrize("shape", [(4, 2048, 512), (3, 5, 96), (7, 64)])
def test_tensor_cores_add_up_in_float32(shape):
    inputs = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    rows = inputs.flatten(0, -2).double()
    found, expected = sum_of_products(inputs), rows.T @ rows
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_equal_but_distinct_inputs_are_kept_apart():
    sums, inputs = HessianSums(), torch.ones(2, 3)
    sums("a", 0, inputs)
    sums("b", 0, inputs.clone())
    sums("b", 0, 3 * inputs)
    hessians = sums.hessians()
    assert torch.equal(hessians["a", 0], torch.ones(3, 3, dtype=torch.float64))
    assert torch.equal(hessians["b", 0], 5 * torch.ones(3, 3, dtype=torch.float64))


def test_the_hook_is_removed_when_the_model_fails(model):
    with pytest.raises(IndexError):
        collect_hessians(model, torch.full((1, 4), 10**6), batch_sequences=1)
    assert model.activation_hook is None


@pytest.fixture
def dataset(tmp_path):
    """Two shards of which the training split is [5, 45) and [0, 33); a token is its position."""
    spans = []
    for number, (start, stop) in enumerate([(5, 45), (0, 33)]):
        path = tmp_path / f"train_{number}.bin"
        write_shard(path, np.arange(100 * number, 100 * number + 50, dtype=np.uint16))
        spans.append(Span(path, start, stop))
    return Dataset(512, BOS, tmp_path / "tokenizer.model", {"train": tuple(spans)})


def test_training_rows_are_distinct_rows_of_the_training_split(dataset):
    rows = training_tokens(dataset, sequences=7, tokens=10, seed=0)
    assert rows.dtype == torch.int64 and rows.shape == (7, 10)
    starts = [5, 15, 25, 35, 100, 110, 120]
    assert torch.equal(rows, torch.tensor(starts)[:, None] + torch.arange(10))


def test_training_rows_are_a_seeded_draw(dataset):
    draws = {
        tuple(training_tokens(dataset, sequences=3, tokens=10, seed=seed)[:, 0].tolist())
        for seed in range(20)
    }
    assert len(draws) > 5
    first = training_tokens(dataset, sequences=3, tokens=10, seed=1)
    assert torch.equal(first, training_tokens(dataset, sequences=3, tokens=10, seed=1))


def test_too_few_training_rows_are_an_error(dataset):
    with pytest.raises(UserError, match=r"holds 7 rows of gptq\.calibration_tokens = 10"):
        training_tokens(dataset, sequences=8, tokens=10, seed=0)


def test_calibration_reads_what_the_settings_say(model, dataset):
    generated = SETTINGS.changed(
        calibration_sequences=6, calibration_tokens=20, batch_sequences=4, temperature=0.7
    )
    expected = self_generated_tokens(model, 6, 20, 0.7, 6, 5, BOS)
    assert torch.equal(calibration_tokens(model, dataset, generated, 5), expected)
    read = SETTINGS.changed(calibration="train", calibration_sequences=2)
    expected = training_tokens(dataset, 2, SETTINGS.calibration_tokens, 5)
    assert torch.equal(calibration_tokens(model, dataset, read, 5), expected)


@pytest.fixture(scope="module")
def quantized(model):
    hessians = collect_hessians(model, calibration_tokens(model, TEXT, SETTINGS, 0), 8)
    return quantizer_of(SETTINGS).quantize(quantizable(model), hessians)


def test_all_in_one_call(model, quantized):
    tensors, layers = prepared_model(model, quantizer_of(SETTINGS), SETTINGS, TEXT, 0)(1.0)
    assert layers.equals(quantized[1])
    expected = restored(storable(model, quantized[0]))
    assert all(torch.equal(found, expected[name]) for name, found in restored(tensors).items())
    assert list(tensors) == list(expected) == list(model.state_dict())


def kl_from_full_precision(model, state, tokens):
    """Mean divergence in nats of the model with `state` from the one with full precision."""
    rounded = GPT(SMALL)
    rounded.load_state_dict(state)
    with torch.no_grad():
        exact, approximate = (m(tokens).log_softmax(-1) for m in (model, rounded))
    return float((exact.exp() * (exact - approximate)).sum(-1).mean())


def test_gptq_beats_round_to_nearest_on_every_bank_and_on_the_output(model, quantized):
    banks, layers = quantized
    by_bank = layers.groupby("bank")[["error", "error_round_to_nearest"]].sum()
    assert (by_bank.error < by_bank.error_round_to_nearest).all()
    # On samples from the model that calibration did not see.
    tokens = self_generated_tokens(model, 64, 24, 1.0, 64, 99, BOS)
    nearest = {name: round_to_nearest(getattr(model, name).detach(), 6) for name in BANKS}
    with_gptq, with_nearest = (
        kl_from_full_precision(model, restored(storable(model, choice)), tokens)
        for choice in (banks, nearest)
    )
    assert with_gptq < with_nearest


def test_model_from_disk_gives_bitwise_the_losses_of_the_one_in_memory(
    model, quantized, tokens, tmp_path
):
    tensors = storable(model, quantized[0])
    write_artifact(tmp_path / "artifact.bin", model.config, tensors)
    in_memory = GPT(SMALL)
    in_memory.load_state_dict(restored(tensors))
    with torch.no_grad():
        expected = in_memory.loss(tokens[:, :-1], tokens[:, 1:])
        assert expected == load_artifact(tmp_path / "artifact.bin").loss(
            tokens[:, :-1], tokens[:, 1:]
        )
        assert torch.equal(in_memory(tokens), load_artifact(tmp_path / "artifact.bin")(tokens))


def test_zeros_are_counted_per_matrix(quantized):
    banks, layers = quantized
    counted = with_code_columns(layers, banks)
    assert isinstance(counted, pd.DataFrame) and "zeros" not in layers
    for _, row in counted.iterrows():
        assert row.zeros == int((banks[row.bank].codes[row.matrix] == 0).sum())
