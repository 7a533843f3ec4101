"""What the model's optional parts promise beyond their formulas, which test_model.py holds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairway.data.dataset import Dataset
from fairway.evaluation.adapters.lora import BatchedLora, LoraSettings
from fairway.model.gpt import GPT
from fairway.model.spec import BANKS, GPTConfig, ModelSettings, block_order, parameters
from fairway.model.weights import load_model, save_model
from fairway.quantization.artifact import load_artifact
from fairway.quantization.calibration import collect_hessians
from fairway.quantization.quantize import quantize_to_file
from fairway.quantization.settings import QuantizationSettings
from trainings import ALL_FEATURES, FEATURES, SMALL, random_model

TOKENS = torch.randint(2, 50, (2, 16), generator=torch.Generator().manual_seed(3))
FRONTIER = ModelSettings(
    mlp_width=2048,
    bigram_buckets=0,
    value_layers=(),
    head_gate_dimensions=12,
    smear="input",
    skip_gates=True,
    recurrent_layers=(3, 4, 5),
    recurrence_passes=3,
)


def test_the_fields_geometry_has_its_parameters():
    """PR #1855 has 35,945,671: 66 more, the scalars of its parallel lanes (11·2·2 + 11·2)."""
    table = parameters(GPTConfig(**dict(FRONTIER), vocab_size=8192))
    assert sum(math.prod(parameter.shape) for parameter in table.values()) == 35_945_671 - 66


def test_the_fields_order_of_blocks():
    order = block_order(FRONTIER)
    assert order.blocks[:8] == (0, 1, 2, 3, 4, 5, 3, 4) and order.encoders == 8
    assert order.blocks[8:] == (5, 3, 4, 5, 6, 7, 8, 9, 10)
    assert block_order(FRONTIER, recurs=False) == (tuple(range(11)), 5)


@st.composite
def recurring(draw) -> ModelSettings:
    layers = draw(st.integers(1, 9))
    run = range(draw(st.integers(0, layers - 1)), draw(st.integers(1, layers)))
    passes = draw(st.integers(1, 4)) if run else 1
    return ModelSettings(
        layers=layers, value_layers=(), recurrent_layers=(*run,), recurrence_passes=passes
    )


@given(recurring())
def test_each_encoder_output_is_taken_up_once_the_last_one_first(settings):
    order = block_order(settings)
    run = settings.recurrent_layers
    for layer in range(settings.layers):
        assert order.blocks.count(layer) == (settings.recurrence_passes if layer in run else 1)
    steps = range(settings.steps)
    assert len(order.blocks) == settings.steps
    taken = [skip for step in steps if (skip := order.skip(step))]
    assert taken == [(row, settings.skips - 1 - row) for row in range(settings.skips)]
    assert all(order.skip(step) is None for step in steps[: order.encoders])
    assert block_order(settings, recurs=False).blocks == tuple(range(settings.layers))


@pytest.mark.parametrize("name", [name for name in FEATURES if name != "no value embedding"])
def test_a_feature_changes_no_other_parameters_initial_value(name):
    """Without a value embedding its numbers are not drawn."""
    before, after = GPT(SMALL, seed=3).state_dict(), GPT(FEATURES[name], seed=3).state_dict()
    common = [key for key in before if key in after and before[key].shape == after[key].shape]
    assert set(common) >= {*BANKS, "token_embedding", "value_embedding", "query_gain"}
    assert all(torch.equal(before[key], after[key]) for key in common)


def test_before_the_switch_each_block_runs_once():
    model, plain = (
        random_model(ALL_FEATURES),
        ALL_FEATURES.changed(recurrent_layers=(), recurrence_passes=1),
    )
    once = GPT(plain).double()
    state = {name: value for name, value in model.state_dict().items()}
    for name in ("skip_weights", "skip_gate"):
        state[name] = state[name][: plain.skips]
    once.load_state_dict(state)
    with torch.no_grad():
        recurring = model(TOKENS)
        model.recurs = False
        assert torch.equal(model(TOKENS), once(TOKENS))
    assert not torch.equal(recurring, once(TOKENS))


def test_nothing_crosses_into_a_document():
    """To the bit: not by the smear, nor by attention."""
    model = random_model(ALL_FEATURES)
    before, after = TOKENS.clone(), TOKENS.flip(1)
    before[:, 7], after[:, 7:] = 1, before[:, 7:]
    after[:, 7] = 1
    with torch.no_grad():
        assert torch.equal(model(before)[:, 7:], model(after)[:, 7:])
        alone = model(before[:, 7:])
        torch.testing.assert_close(model(before)[:, 7:], alone, rtol=1e-4, atol=1e-4)


def test_without_masks_only_attention_crosses_into_a_document():
    """The smear of one block whose attention adds nothing."""
    model = random_model(FEATURES["smear by input"].changed(bigram_buckets=0))
    changed = TOKENS.clone()
    changed[:, 6] += 1
    changed %= 48
    with torch.no_grad():
        model.attention_scale.zero_()
        for token, crosses in ((1, False), (3, True)):
            one, other = TOKENS.clone(), changed.clone()
            one[:, 7] = other[:, 7] = token
            assert torch.equal(model(one)[:, 7], model(other)[:, 7]) is not crosses


def test_hessians_are_of_the_inputs_of_every_pass():
    model, inputs = random_model(ALL_FEATURES).float(), {}
    model.activation_hook = lambda bank, index, x: inputs.setdefault((bank, index), []).append(x)
    with torch.no_grad():
        model(TOKENS)
    hessians = collect_hessians(model, TOKENS, batch_sequences=1)
    assert hessians.keys() - inputs.keys() == {("token_embedding", 0)}
    for (bank, index), parts in inputs.items():
        rows = torch.cat([part.flatten(0, 1) for part in parts]).double()
        runs = 3 if index % SMALL.layers in ALL_FEATURES.recurrent_layers else 1
        assert len(rows) == runs * TOKENS.numel()
        torch.testing.assert_close(
            hessians[bank, index], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5
        )


def test_additions_to_a_recurring_block_get_the_gradients_of_all_passes():
    model, targets = random_model(ALL_FEATURES), TOKENS.roll(-1, 1)
    model.compute_dtype = torch.float64
    lora = BatchedLora(model, 1, LoraSettings(rank=2, projections=("up",)), seed=1)
    values = torch.randn(lora.values.shape, generator=torch.Generator().manual_seed(5)).double()
    share = torch.full((1, 16), 1 / 16)
    found = lora.split(lora.gradient(values, TOKENS[:1], targets[:1], share).double())
    bank = model.mlp_up_bank.requires_grad_()
    for layer in range(SMALL.layers):
        A, B = (part[0] for part in lora.split(values)["mlp_up_bank", layer])
        bank.data[layer] += B @ A
    model.loss(TOKENS[:1], targets[:1]).backward()
    for layer in range(SMALL.layers):
        A, B = (part[0] for part in lora.split(values)["mlp_up_bank", layer])
        expected = B.T @ bank.grad[layer], bank.grad[layer] @ A.T
        for part, wanted in zip(found["mlp_up_bank", layer], expected, strict=True):
            torch.testing.assert_close(part[0], wanted, rtol=1e-4, atol=1e-8)


def test_weights_and_artifacts_hold_every_feature(tmp_path):
    model = random_model(ALL_FEATURES).float()
    save_model(tmp_path / "weights.safetensors", model)
    loaded = load_model(tmp_path / "weights.safetensors")
    assert loaded.config == ALL_FEATURES
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), model(TOKENS))
    quantize_to_file(
        tmp_path / "artifact.bin", model,
        QuantizationSettings(calibration_sequences=2, calibration_tokens=8, block_columns=8),
        Dataset(SMALL.vocab_size, 1, None, {}), seed=0, limit_bytes=16_000_000,
    )  # fmt: skip
    stored = load_artifact(tmp_path / "artifact.bin")
    assert stored.config == ALL_FEATURES
    for name in ("head_gate", "skip_gate"):
        assert torch.equal(getattr(stored, name), getattr(model, name).half().float())
    for name in ("smear_scale", "smear_weights", "softcaps"):
        assert torch.equal(getattr(stored, name), getattr(model, name))
