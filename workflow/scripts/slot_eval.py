"""Score the validation split with an artifact: sliding windows, and adapters that learn from them.

    python workflow/scripts/slot_eval.py --config config.yaml --variant causal --seed 42 \\
        --dataset results/data/embedded/manifest.json \\
        --artifact results/quickstart/seed-42/causal/gptq \\
        --output results/quickstart/seed-42/causal/slot

Several processes: torchrun --standalone --nproc_per_node=8 workflow/scripts/slot_eval.py ...
Writes tokens.parquet (one row per scored target), metrics.json and provenance.json.
"""

import sys
import time
from pathlib import Path

import torch

from fairway.command import run, seed_stage_parser, stage_settings
from fairway.data.dataset import Dataset, load_dataset, read_split
from fairway.data.tokenizer import load_tokenizer
from fairway.distributed import World, barrier, distributed_world, gather_objects
from fairway.errors import UserError
from fairway.evaluation.adapters.lora import lora_kernels
from fairway.evaluation.bits_per_byte import byte_counts
from fairway.evaluation.evaluator import EvaluatorSettings, evaluator_settings
from fairway.evaluation.forward import forward_pass
from fairway.evaluation.token_table import (
    TimedLogits,
    score_rank,
    table_metrics,
    token_table,
    windows_of_rank,
)
from fairway.files import write_json, write_table
from fairway.model.runtime import RuntimeSettings, prepare, records_graphs
from fairway.progress import progress
from fairway.provenance import runtime_metrics, write_provenance
from fairway.quantization.artifact import load_artifact


def main(arguments: list[str] | None = None) -> None:
    parser = seed_stage_parser("slot", __doc__)
    parser.add_argument("--artifact", type=Path, required=True, help="folder of the gptq stage")
    options = parser.parse_args(arguments)
    settings = stage_settings(options)
    evaluator = evaluator_settings(settings)
    runtime = RuntimeSettings(**settings["runtime"])
    with distributed_world(runtime.device) as world:
        evaluate(options, settings, evaluator, runtime, world)


def evaluate(options, settings, evaluator, runtime, world) -> None:
    started = time.perf_counter()
    dataset = load_dataset(options.dataset)
    model = prepare(load_artifact(options.artifact / "artifact.bin", world.device), runtime)
    check_vocabulary(model, dataset, options)
    logits = TimedLogits(forward_pass(model, runtime), world.device)
    tokens = read_split(dataset, "val")
    stream = torch.from_numpy(tokens.astype("int64")).to(world.device)
    share, windows = windows_of_rank(len(tokens) - 1, evaluator, world.rank, world.size)
    warn_if_idle(share, evaluator, world)
    with progress(share, "slot_eval", "window", show=world.is_main) as bar:
        own = score_rank(
            logits,
            stream,
            evaluator,
            dataset.bos_id,
            world.rank,
            world.size,
            advance=bar.update,
            kernels=model.kernels,
            model=model,
            seed=options.seed,
        )
    scoring_seconds, sliding_seconds = time.perf_counter() - started, logits.seconds()
    parts = gather_objects(world, own)
    if world.is_main:
        counts = byte_counts(load_tokenizer(dataset.tokenizer_path))
        table = token_table(parts, tokens, counts, dataset.bos_id)
        write_table(options.output / "tokens.parquet", table)
        fits = [count for part in parts for count in part.iterations]
        metrics = {
            **table_metrics(table),
            "adapters": list(evaluator.evaluation.adapters),
            "shares_batches": evaluator.shares_batches,
            "windows": windows,
            "mean_iterations": float(sum(fits) / len(fits)) if fits else 0.0,
            "sliding_seconds": sliding_seconds,
            "adapter_seconds": scoring_seconds - sliding_seconds,
            "evaluation_seconds": time.perf_counter() - started,
            **runtime_metrics(model, world),
            "cuda_graphs": records_graphs(runtime, model),
        }
        if "lora" in evaluator.evaluation.adapters:
            metrics["lora_kernels"] = lora_kernels(model, evaluator.lora)
        write_products(options, settings, metrics, started)
    barrier(world)


def check_vocabulary(model, dataset: Dataset, options) -> None:
    if model.config.vocab_size != dataset.vocab_size:
        raise UserError(
            f"{options.artifact} has a vocabulary of {model.config.vocab_size} tokens, "
            f"{options.dataset} one of {dataset.vocab_size}: use the dataset it was trained on"
        )


def warn_if_idle(windows: int, settings: EvaluatorSettings, world: World) -> None:
    if windows == 0:
        lanes, rows = settings.evaluation.lanes, settings.evaluation.forward_windows
        print(
            f"rank {world.rank} has nothing to score: {lanes} lanes (evaluation.lanes) in groups "
            f"of {rows} (evaluation.forward_windows) do not reach {world.size} processes",
            file=sys.stderr,
        )


def write_products(options, settings, metrics, started) -> None:
    write_json(
        options.output / "metrics.json",
        {
            "stage": "slot",
            "seed": options.seed,
            "variant": options.variant,
            "training_seconds": 0.0,
            **metrics,
            "seconds": time.perf_counter() - started,
        },
    )
    write_provenance(
        options.output,
        stage="slot",
        settings=settings,
        seed=options.seed,
        inputs=[options.dataset, options.artifact / "artifact.bin"],
        outputs=[options.output / name for name in ("tokens.parquet", "metrics.json")],
        # Scoring a finished artifact on val makes nothing out of val.
        splits_read=[],
        parents=[options.artifact / "provenance.json"],
    )


if __name__ == "__main__":
    run(main)
