"""What an exported `evaluate.pyz` runs: score token shards with the artifact that lies beside it.

    python evaluate.pyz val_000000.bin
    torchrun --standalone --nproc_per_node=8 evaluate.pyz val_*.bin

It prints val_loss (nats per token) and val_bpb as JSON. With `--scores FILE` it leaves the
distributions themselves, for an audit.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairway.data.shards import check_vocabulary, read_shard
from fairway.data.token_bytes import byte_counts
from fairway.data.tokenizer import load_tokenizer
from fairway.distributed import World, device_name, distributed_world
from fairway.errors import UserError
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.settings import EvaluationSettings
from fairway.evaluation.token_table import gather_scores, table_metrics, token_columns
from fairway.model.runtime import prepare
from fairway.model.settings import RuntimeSettings
from fairway.quantization.artifact import load_artifact


def main(plan: dict[str, Any], folder: Path) -> None:
    """Score what the command line names; exit status 1 and one line for what users can mend.

    plan: `settings.json` of the program: `evaluation`, `runtime`, `seed`, and `threads` on a CPU.
    folder: holds artifact.bin and tokenizer.model.
    """
    options = _parser().parse_args()
    try:
        with distributed_world(options.device or plan["runtime"]["device"]) as world:
            if plan["threads"] and world.device.type == "cpu":
                torch.set_num_threads(plan["threads"])  # the last bits of sums depend on it
            found = _score(plan, folder, options, world)
            if found:
                print(json.dumps(found, indent=2))
    except UserError as error:
        sys.exit(f"error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.pyz", description="Print val_loss (nats per token) and val_bpb as JSON."
    )
    parser.add_argument("shards", type=Path, nargs="+", help="the text, one shard after the other")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: as it was made")
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="NPZ",
        help="write log_probs [n, V], positions, nats and lanes [n] there; the text must be short",
    )
    return parser


def _score(
    plan: dict[str, Any], folder: Path, options: argparse.Namespace, world: World
) -> dict[str, Any] | None:
    started = time.perf_counter()
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    for shard in options.shards:
        check_vocabulary(shard, tokenizer.vocab_size())
    tokens = np.concatenate([read_shard(shard) for shard in options.shards])
    runtime = RuntimeSettings.model_validate(plan["runtime"])
    evaluator = Evaluator(
        prepare(load_artifact(folder / "artifact.bin", world.device), runtime),
        EvaluationSettings.model_validate(plan["evaluation"]),
        bos_id=tokenizer.bos_id(),
        seed=plan["seed"],
        runtime=runtime,
    )
    text = torch.from_numpy(tokens.astype(np.int64)).to(world.device)
    if options.scores:
        return _write_scores(evaluator, text, options.scores)
    parts = gather_scores(world, evaluator.score_rank(text, world.rank, world.size))
    if not world.is_main:
        return None
    columns = token_columns(parts, tokens, byte_counts(tokenizer), tokenizer.bos_id())
    known = {name: value for name, value in table_metrics(columns).items() if value is not None}
    return {
        **known,
        "seconds": time.perf_counter() - started,
        "device": device_name(world.device),
        "processes": world.size,
    }


def _write_scores(evaluator: Evaluator, text: torch.Tensor, path: Path) -> None:
    found = evaluator.distributions(text)
    np.savez(path, **{name: value.cpu().numpy() for name, value in vars(found).items()})
