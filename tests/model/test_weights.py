"""Weights files: what is written is read, older files load, damaged and foreign ones do not."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fairway.errors import UserError
from fairway.files import write_tensors
from fairway.model.gpt import GPT
from fairway.model.spec import GPTConfig
from fairway.model.weights import build_model, load_model, save_model
from trainings import SMALL


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


def save_with_config(path, config) -> None:
    """A weights file whose configuration is the text `config`."""
    write_tensors(path, GPT(SMALL, seed=4).state_dict(), {"config": config})


def test_weights_survive_the_file(path):
    model = GPT(SMALL, seed=4)
    save_model(path, model)
    loaded = load_model(path)
    assert loaded.config == SMALL
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens), loaded(tokens))


def test_a_file_older_than_a_key_means_its_default(path):
    newer = {
        "logit_softcap", "query_gain", "activation_slope", "head_gate_dimensions", "smear",
        "smear_dimensions", "skip_gates", "recurrent_layers", "recurrence_passes",
        "asymmetric_softcap", "document_masks", "bos_id",
    }  # fmt: skip
    older = SMALL.model_dump(mode="json", exclude=newer)
    save_with_config(path, json.dumps(older))
    assert load_model(path).config == SMALL == GPTConfig(**older)


def test_a_file_from_when_a_model_without_value_layers_had_value_weights_is_refused(path):
    save_with_config(path, json.dumps({**SMALL.model_dump(mode="json"), "value_layers": []}))
    with pytest.raises(UserError, match=r"for 'value_embedding'.*no such thing.*rerun that stage"):
        load_model(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layerz": 5}, "unknown key layerz; did you mean layers?"),
        ({"layers": -1}, "layers: found -1, expected at least 1"),
        ({"width": 1e400}, "it has the number Infinity"),
        ({"rope_base": "ten"}, "rope_base: found 'ten', expected a number"),
        ({"value_layers": 3}, "value_layers: found 3, expected a list"),
        ({"layers": 10**9, "value_layers": []}, "the model's config needs"),
        ({"recurrent_layers": [1], "recurrence_passes": 10**9}, "the model's config needs"),
    ],
)
def test_a_strange_configuration_is_told_in_one_line(path, config, message):
    save_with_config(path, json.dumps({**SMALL.model_dump(mode="json"), **config}))
    with pytest.raises(UserError) as error:
        load_model(path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("config", ["not JSON", "[]", "null"])
def test_what_is_no_configuration_is_refused(path, config):
    save_with_config(path, config)
    with pytest.raises(UserError, match="weights.safetensors"):
        load_model(path)


def test_damaged_or_foreign_weights_are_refused(path):
    with pytest.raises(UserError, match="missing"):
        load_model(path)
    save_model(path, GPT(SMALL))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_model(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="checksum is missing"):
        load_model(path)
    write_tensors(path, {"weight": torch.zeros(1)}, {})
    with pytest.raises(UserError, match="holds no model configuration"):
        load_model(path)
    state = GPT(SMALL).state_dict()
    with pytest.raises(UserError, match="smear_gate"):
        build_model(SMALL, {k: v for k, v in state.items() if k != "smear_gate"}, "cpu")
    with pytest.raises(UserError, match="weights for 'extra'"):
        build_model(SMALL, {**state, "extra": torch.zeros(1)}, "cpu")


@settings(deadline=None, max_examples=50)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_bit_of_the_weights_flips_unseen(tmp_path_factory, place, bit):
    path = tmp_path_factory.mktemp("flipped") / "weights.safetensors"
    model = GPT(SMALL, seed=4)
    save_model(path, model)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"weights\.safetensors"):
        load_model(path)


def test_weights_that_are_no_numbers_are_refused(path):
    state = GPT(SMALL).state_dict()
    state["smear_gate"] = state["smear_gate"].to(torch.int8)
    write_tensors(path, state, {"config": SMALL.model_dump_json()})
    with pytest.raises(UserError, match="weights for smear_gate: found torch.int8"):
        load_model(path)
