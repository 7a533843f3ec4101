"""Held-out training text scored with an artifact, as slot_eval scores validation text."""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fairway.data.dataset import Dataset, load_dataset, read_split
from fairway.distributed import resolve_device
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.token_table import RankScores
from fairway.model.runtime import prepare
from fairway.quantization.artifact import load_artifact
from fairway.recipe import Config
from fairway.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `score_held_out` takes."""
    parser.add_argument("--dataset", type=Path, required=True, help="manifest.json of tokenize")
    parser.add_argument("--artifact", type=Path, required=True, help="artifact.bin of gptq")
    parser.add_argument(
        "--config", type=Path, nargs="+", required=True, help="YAML files; the first variant counts"
    )
    parser.add_argument("--split", choices=("selection", "adaptation"), default="selection")
    parser.add_argument("--tokens", type=int, default=262_144, help="of the split, from its start")
    parser.add_argument("--seed", type=int, default=0)


def first_sections(config: Config) -> Mapping[str, Settings]:
    """The sections as the config's first variant has them."""
    return config.sections(next(iter(config.variants)))


def held_out_text(options: argparse.Namespace) -> tuple[Dataset, np.ndarray]:
    """The dataset and the tokens to score, integers [n + 1]."""
    dataset = load_dataset(options.dataset)
    return dataset, read_split(dataset, options.split)[: options.tokens + 1]


def held_out_evaluator(
    options: argparse.Namespace, sections: Mapping[str, Settings], dataset: Dataset
) -> Evaluator:
    """The artifact with the evaluation and the runtime of a config's `sections`."""
    runtime = sections["runtime"]
    model = prepare(load_artifact(options.artifact, resolve_device(runtime.device)), runtime)
    return Evaluator(
        model, sections["evaluation"], bos_id=dataset.bos_id, seed=options.seed, runtime=runtime
    )


def score_held_out(evaluator: Evaluator, tokens: np.ndarray) -> tuple[RankScores, float]:
    """Score integer tokens [n + 1]; the scores and the seconds."""
    started = time.perf_counter()
    device = next(evaluator.model.parameters()).device
    scores = evaluator.score_rank(torch.from_numpy(tokens.astype("int64")).to(device))
    return scores, time.perf_counter() - started
