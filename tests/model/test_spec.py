"""The table of parameters, and the settings that it follows from."""

import subprocess
import sys

import pytest

from fairway.errors import UserError
from fairway.model.gpt import GPT
from fairway.model.spec import (
    BANKS,
    PROJECTIONS,
    GPTConfig,
    ModelSettings,
    block_of_rows,
    parameters,
)
from fairway.settings import validated
from fairway.training.optimizers import parameter_groups
from trainings import SMALL

EMBEDDINGS = {"token_embedding", "bigram_embedding", "value_embedding"}
PROJECTED = {"bigram_projection", "value_projection"}
SCALES = {"bigram_scale", "smear_gate", "value_scale", "value_layer_scales", "skip_weights"}
SCALES_OF_BLOCKS = {"residual_mix", "attention_scale", "mlp_scale", "query_gain"}


def names_where(**wanted) -> set[str]:
    return {
        name
        for name, parameter in parameters(SMALL).items()
        if all(getattr(parameter, key) == value for key, value in wanted.items())
    }


def test_the_table_describes_every_parameter_of_the_model_in_its_order():
    described = {name: parameter.shape for name, parameter in parameters(SMALL).items()}
    found = {name: tuple(parameter.shape) for name, parameter in GPT(SMALL).named_parameters()}
    assert list(described.items()) == list(found.items())


def test_groups_are_for_the_optimizer():
    groups = parameter_groups(GPT(SMALL))
    assert set(groups["matrix"]) == set(BANKS)
    assert set(groups["embedding"]) == EMBEDDINGS
    assert set(groups["scalar"]) == PROJECTED | SCALES | SCALES_OF_BLOCKS
    for group, names in groups.items():
        assert names_where(group=group) == set(names)


def test_storage_is_for_the_artifact():
    assert names_where(storage="quantized") == set(BANKS)
    assert names_where(storage="int8") == EMBEDDINGS
    assert names_where(storage="float16") == PROJECTED
    assert names_where(storage="float32") == SCALES | SCALES_OF_BLOCKS


def test_blocks_own_their_matrices_and_scales():
    assert names_where(per_block=True) == set(BANKS) | SCALES_OF_BLOCKS
    assert block_of_rows("query_output_bank", SMALL) == [0, 1, 2, 3, 4] * 2
    assert block_of_rows("mlp_up_bank", SMALL) == block_of_rows("query_gain", SMALL) == [*range(5)]
    assert block_of_rows("skip_weights", SMALL) is None


def test_projections_cover_every_matrix_once():
    halves = [
        (bank, half)
        for bank in BANKS
        for half in range(parameters(SMALL)[bank].shape[0] // SMALL.layers)
    ]
    assert sorted(PROJECTIONS.values()) == sorted(halves)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 7}, "model.heads 7 does not divide model.width 512"),
        ({"kv_heads": 3}, "model.kv_heads 3 does not divide model.heads 8"),
        ({"rotary_dimensions": 66}, "model.rotary_dimensions 66 must be even and at most"),
        ({"rotary_dimensions": 5}, "model.rotary_dimensions 5 must be even"),
        ({"value_layers": [11]}, "model.value_layers names block 11, but model.layers is 11"),
        ({"recurrent_layers": [11]}, "model.recurrent_layers names block 11"),
        ({"recurrent_layers": [3, 5]}, "model.recurrent_layers is [3, 5]: expected neighboring"),
        ({"recurrent_layers": [4, 3]}, "model.recurrent_layers is [4, 3]: expected neighboring"),
        ({"recurrence_passes": 3}, "but model.recurrent_layers names no block"),
        ({"bigram_buckets": 1}, "model.bigram_buckets is 1: expected at least 2, or 0"),
        ({"head_gate_dimensions": 513}, "model.head_gate_dimensions 513 exceeds model.width 512"),
        (
            {"smear": "input", "smear_dimensions": 513},
            "model.smear_dimensions 513 exceeds model.width 512",
        ),
        ({"activation_slope": 1.0}, "model.activation_slope: found 1.0, expected less than 1"),
        ({"value_layers": [-1]}, "model.value_layers.0: found -1, expected at least 0"),
        ({"layers": 0}, "model.layers: found 0, expected at least 1"),
        ({"logit_softcap": 0.0}, "model.logit_softcap: found 0.0, expected more than 0"),
        ({"head": 8}, "model: unknown key head; did you mean heads?"),
    ],
)
def test_settings_that_do_not_fit_are_told_in_one_line(changes, message):
    with pytest.raises(UserError) as error:
        validated(ModelSettings, changes, "model")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_config_is_settings_and_what_the_data_and_the_training_fix():
    settings = ModelSettings(layers=2, value_layers=(1,))
    config = GPTConfig(**dict(settings), vocab_size=50, sequence_tokens=24)
    assert set(GPTConfig.model_fields) == {
        *ModelSettings.model_fields, "vocab_size", "sequence_tokens", "bos_id",
    }  # fmt: skip
    assert config.layers == 2 and config.width == settings.width and hash(config)


def test_settings_need_no_pytorch():
    code = (
        "import fairway.model.spec, fairway.model.settings, sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
