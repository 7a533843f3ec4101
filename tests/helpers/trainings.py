"""A small model, and stage scripts run without starting a process for each."""

import runpy
import signal
import sys
from pathlib import Path
from unittest.mock import patch

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
