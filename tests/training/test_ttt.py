"""TTT: what moves, what is frozen, what it says of its ancestry."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_model import CONFIG

from fairway.distributed import World
from fairway.errors import UserError
from fairway.model.gpt import BANKS, GPT, block_of_bank_row
from fairway.model.weights import load_model
from fairway.training.ttt import TTTSettings, adapt, cosine_rate
from tiny import run_script

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
WORLD = World(rank=0, size=1, device=torch.device("cpu"))
TOKENS = np.random.default_rng(0).integers(0, 50, 24 * 9 + 5).astype(np.uint16)


def test_frozen_blocks_keep_their_bank_slices_and_scalars_to_the_bit():
    model = GPT(CONFIG, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = adapt(model, TOKENS, SETTINGS, seed=1, world=WORLD)
    assert len(losses) == 2 and losses[1] < losses[0]
    for name, value in model.state_dict().items():
        if name in BANKS:
            blocks = np.array(block_of_bank_row(name, CONFIG.layers))
        elif name in ("residual_mix", "attention_scale", "mlp_scale", "query_gain"):
            blocks = np.arange(CONFIG.layers)
        else:
            continue
        frozen = blocks < SETTINGS.frozen_blocks
        assert torch.equal(value[frozen], before[name][frozen]), name
        assert not torch.equal(value[~frozen], before[name][~frozen]), name


def test_adaptation_is_seeded():
    models = [GPT(CONFIG, seed=0) for _ in range(3)]
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
        adapt(GPT(CONFIG), TOKENS[:10], SETTINGS, seed=0, world=WORLD)
    with pytest.raises(UserError, match="ttt.frozen_blocks 9 exceeds"):
        adapt(GPT(CONFIG), TOKENS, replace(SETTINGS, frozen_blocks=9), seed=0, world=WORLD)
    with pytest.raises(UserError, match="ttt loss is nan"):
        model = GPT(CONFIG)
        model.smear_gate.data.fill_(float("nan"))
        adapt(model, TOKENS, SETTINGS, seed=0, world=WORLD)


@pytest.fixture
def ema_folder(tmp_path, tiny_config_file, tiny_dataset):
    common = ("--config", tiny_config_file, "--dataset", tiny_dataset, "--seed", 7)
    run_script("train.py", *common, "--output", tmp_path / "train", "--checkpoints", tmp_path / "c")
    run_script("ema.py", *common, "--train", tmp_path / "train", "--output", tmp_path / "ema")
    return tmp_path / "ema"


def test_script_records_its_ancestry_and_agrees_across_processes(
    ema_folder, tiny_config_file, tiny_dataset, tmp_path
):
    common = ("--config", tiny_config_file, "--dataset", tiny_dataset, "--seed", 7)
    for variant, processes in (("causal", 1), ("causal", 2), ("published", 1)):
        run_script(
            "ttt.py", *common, "--variant", variant, "--ema", ema_folder,
            "--output", tmp_path / f"{variant}{processes}", processes=processes,
        )  # fmt: skip
    splits = {
        name: json.loads((tmp_path / name / "provenance.json").read_text())["splits"]
        for name in ("causal1", "published1")
    }
    assert splits == {"causal1": ["train"], "published1": ["train", "val"]}
    one, two = (load_model(tmp_path / f"causal{n}/weights.safetensors") for n in (1, 2))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name], rtol=1e-3, atol=2e-4)
