"""A small model, and stage scripts run without starting a process for each."""

import runpy
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from fairway.model.gpt import GPT
from fairway.model.spec import GPTConfig
from tiny import SCRIPTS

SMALL = GPTConfig(
    vocab_size=50,
    sequence_tokens=24,
    layers=5,
    width=24,
    heads=4,
    kv_heads=2,
    mlp_width=40,
    rotary_dimensions=4,
    rope_trained_tokens=12,
    bigram_buckets=17,
    bigram_width=6,
    value_width=5,
    value_layers=(3, 4),
)

FEATURES = {
    "no bigrams": {"bigram_buckets": 0},
    "no value embedding": {"value_layers": ()},
    "slope": {"activation_slope": 0.3},
    "head gate": {"head_gate_dimensions": 5},
    "smear by input": {"smear": "input", "smear_dimensions": 7},
    "no smear": {"smear": "none"},
    "skip gates": {"skip_gates": True},
    "recurrence": {"recurrent_layers": (2, 3), "recurrence_passes": 3},
    "two soft caps": {"asymmetric_softcap": True},
    "document masks": {"document_masks": True},
}
ALL_FEATURES = SMALL.changed(
    **{
        key: value
        for name in FEATURES
        if name != "no smear"
        for key, value in FEATURES[name].items()
    }
)
FEATURES = {name: SMALL.changed(**changes) for name, changes in FEATURES.items()}
"""Configurations with a part of the model switched on or off."""


def random_model(config: GPTConfig) -> GPT:
    """Random weights everywhere: at its initial values half of the model is invisible."""
    model = GPT(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def run_here(name: str, *arguments) -> None:
    """Run a stage script in this process, which has imported torch already.

    A fault is SystemExit(1), and its line on stderr, as in a process of its own.
    """
    script, on_pipe = str(SCRIPTS / name), signal.getsignal(signal.SIGPIPE)
    try:
        with patch.object(sys, "argv", [script, *map(str, arguments)]):
            runpy.run_path(script, run_name="__main__")
    finally:
        signal.signal(signal.SIGPIPE, on_pipe)


def train_arguments(config: Path, manifest: Path, folder: Path, seed: int = 7) -> list[str]:
    """The options of train.py: products in `folder`/train, checkpoints beside it."""
    return [
        "--config", str(config), "--seed", str(seed), "--tokenize", str(manifest.parent),
        "--output", str(folder / "train"), "--checkpoints", str(folder / "checkpoints"),
    ]  # fmt: skip
