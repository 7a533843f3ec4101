"""TTT: what moves, what is frozen, what it says of its ancestry."""

import json

import numpy as np
import pytest
import torch

from fairway.distributed import World
from fairway.errors import UserError
from fairway.model.gpt import GPT
from fairway.model.spec import block_of_rows
from fairway.model.weights import load_model
from fairway.training.ttt import TTTSettings, adapt, cosine_rate
from tiny import run_script
from trainings import SMALL, run_here

SETTINGS = TTTSettings(
    data="train",
    epochs=2,
    learning_rate=1e-2,
    final_learning_rate_fraction=0.1,
    weight_decay=0.1,
    batch_sequences=4,
    gradient_clip=1.0,
    frozen_blocks=2,
)
PER_BLOCK = (
    "query_output_bank",
    "key_value_bank",
    "mlp_up_bank",
    "mlp_down_bank",
    "residual_mix",
    "attention_scale",
    "mlp_scale",
    "query_gain",
)
WORLD = World(rank=0, size=1, device=torch.device("cpu"))
TOKENS = np.random.default_rng(0).integers(0, 50, 24 * 9 + 5).astype(np.uint16)


def test_frozen_blocks_keep_their_bank_slices_and_scalars_to_the_bit():
    model = GPT(SMALL, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = adapt(model, TOKENS, SETTINGS, seed=1, world=WORLD)
    assert len(losses) == 2 and losses[1] < losses[0]
    for name, value in model.state_dict().items():
        if name not in PER_BLOCK:
            assert block_of_rows(name, SMALL) is None
            continue
        # Half a bank after the other, each with one matrix a block.
        frozen = np.arange(len(value)) % SMALL.layers < SETTINGS.frozen_blocks
        assert torch.equal(value[frozen], before[name][frozen]), name
        assert not torch.equal(value[~frozen], before[name][~frozen]), name


def test_adaptation_is_seeded():
    models = [GPT(SMALL, seed=0) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        adapt(model, TOKENS, SETTINGS, seed=seed, world=WORLD)
    assert torch.equal(models[0].mlp_up_bank, models[1].mlp_up_bank)
    assert not torch.equal(models[0].mlp_up_bank, models[2].mlp_up_bank)


def test_learning_rate_falls_by_a_cosine_over_each_epoch():
    assert cosine_rate(0.0, SETTINGS) == pytest.approx(1e-2)
    assert cosine_rate(0.5, SETTINGS) == pytest.approx(1e-2 * 0.55)
    assert cosine_rate(1.0, SETTINGS) == pytest.approx(1e-3)


def test_user_faults():
    with pytest.raises(UserError, match="raise data.adaptation_tokens"):
        adapt(GPT(SMALL), TOKENS[:10], SETTINGS, seed=0, world=WORLD)
    with pytest.raises(UserError, match="ttt.frozen_blocks 9 exceeds"):
        adapt(GPT(SMALL), TOKENS, SETTINGS.changed(frozen_blocks=9), seed=0, world=WORLD)
    with pytest.raises(UserError, match="ttt loss is nan"):
        model = GPT(SMALL)
        model.smear_gate.data.fill_(float("nan"))
        adapt(model, TOKENS, SETTINGS, seed=0, world=WORLD)


def test_freezing_more_blocks_than_there_are_is_a_fault_of_the_config():
    SETTINGS.check_with({"model": SMALL})
    with pytest.raises(UserError, match="ttt.frozen_blocks 6 exceeds model.layers 5"):
        SETTINGS.changed(frozen_blocks=6).check_with({"model": SMALL})


def test_script_tells_its_ancestry_and_agrees_across_processes(
    averaged, tiny_config_file, tiny_dataset, tmp_path
):
    def arguments(variant, output):
        return (
            "--config", tiny_config_file, "--variant", variant, "--seed", 7,
            "--tokenize", tiny_dataset.parent, "--ema", averaged, "--output", tmp_path / output,
        )  # fmt: skip

    run_here("ttt.py", *arguments("causal", "causal1"))
    run_here("ttt.py", *arguments("leaky", "leaky1"))
    run_script("ttt.py", *arguments("causal", "causal2"), processes=2)
    splits = {
        name: json.loads((tmp_path / name / "provenance.json").read_text())["splits"]
        for name in ("causal1", "leaky1")
    }
    assert splits == {"causal1": ["train"], "leaky1": ["train", "val"]}
    one, two = (load_model(tmp_path / f"causal{n}/weights.safetensors") for n in (1, 2))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name], rtol=1e-3, atol=2e-4)
