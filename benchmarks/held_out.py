"""Held-out training text scored with an artifact, as slot_eval scores validation text."""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairway.data.dataset import Dataset, load_dataset, read_split
from fairway.distributed import resolve_device
from fairway.evaluation.evaluator import evaluator_settings
from fairway.evaluation.forward import forward_pass
from fairway.evaluation.token_table import RankScores, score_rank
from fairway.model.runtime import RuntimeSettings, prepare
from fairway.quantization.artifact import load_artifact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `score_held_out` takes."""
    parser.add_argument("--dataset", type=Path, required=True, help="manifest.json of tokenize")
    parser.add_argument("--artifact", type=Path, required=True, help="artifact.bin of gptq")
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="YAML files")
    parser.add_argument("--split", choices=("selection", "adaptation"), default="selection")
    parser.add_argument("--tokens", type=int, default=262_144, help="of the split, from its start")
    parser.add_argument("--seed", type=int, default=0)


def held_out_text(options: argparse.Namespace) -> tuple[Dataset, np.ndarray]:
    """The dataset and the tokens to score, integers [n + 1]."""
    dataset = load_dataset(options.dataset)
    return dataset, read_split(dataset, options.split)[: options.tokens + 1]


def score_held_out(
    options: argparse.Namespace, config: Mapping[str, Any], dataset: Dataset, tokens: np.ndarray
) -> tuple[RankScores, float]:
    """Score with the adapters that the validated `config` lists; the scores and the seconds."""
    runtime = RuntimeSettings(**config["runtime"])
    model = prepare(load_artifact(options.artifact, resolve_device(runtime.device)), runtime)
    stream = torch.from_numpy(tokens.astype("int64")).to(model.token_embedding.device)
    settings = evaluator_settings(config)
    started = time.perf_counter()
    scores = score_rank(
        forward_pass(model, runtime), stream, settings, dataset.bos_id, 0, 1, lambda windows: None,
        kernels=model.kernels, model=model, seed=options.seed,
    )  # fmt: skip
    return scores, time.perf_counter() - started
