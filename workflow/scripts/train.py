"""Train one seed's model; leave the last weights, the weight averages and the loss curve.

    python workflow/scripts/train.py --config config.yaml --seed 42 \\
        --dataset results/data/embedded/manifest.json \\
        --output results/quickstart/seed-42/train \\
        --checkpoints results/quickstart/seed-42/.checkpoints/train

Eight GPUs: torchrun --standalone --nproc_per_node=8 workflow/scripts/train.py ...
Stopped by SIGTERM or Ctrl-C it writes a checkpoint first; the same command resumes.
"""

import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
from safetensors.torch import save_file

from fairway.code_hash import fingerprint
from fairway.command import run, seed_stage_parser, stage_settings
from fairway.data.dataset import load_dataset
from fairway.data.loader import CoprimeLoader
from fairway.distributed import barrier, distributed_world, gather_objects
from fairway.evaluation.plain import evaluate_split
from fairway.files import (
    atomic_path,
    read_json,
    sha256_of,
    sha256_of_json,
    write_json,
    write_table,
)
from fairway.model.gpt import GPT, config_from_settings
from fairway.model.runtime import RuntimeSettings, compiles, prepare, records_graphs
from fairway.model.weights import save_model
from fairway.provenance import runtime_metrics, write_provenance
from fairway.training.checkpoint import Checkpoints, exclusive
from fairway.training.trainer import Trainer, TrainSettings, check_batch

PRODUCTS = ("weights.safetensors", "averages.safetensors", "metrics.parquet", "metrics.json")


def main(arguments: list[str] | None = None) -> None:
    parser = seed_stage_parser("train", __doc__)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder for mid-run state")
    options = parser.parse_args(arguments)
    settings = stage_settings(options)
    runtime = RuntimeSettings(**settings["runtime"])
    with (
        distributed_world(runtime.device) as world,
        # The first process holds the lock for all of them.
        exclusive(options.checkpoints) if world.is_main else nullcontext(),
    ):
        # An orphan of a killed workflow may have finished this very run in the meantime.
        if any(gather_objects(world, is_finished(options, settings))):
            print(
                f"{options.output} holds this very run already: remove it to train again",
                file=sys.stderr,
            )
        else:
            train(options, settings, runtime, world)


def run_identity(options, settings) -> str:
    """What makes this run this run: another identity takes up none of its checkpoints."""
    identity = {
        "settings": settings,
        "seed": options.seed,
        "dataset": sha256_of(options.dataset),
        "code": fingerprint(__file__),
    }
    return sha256_of_json(identity)


def is_finished(options, settings) -> bool:
    """Whether the products of this very run are there, the provenance, which comes last, too."""
    products = [options.output / name for name in (*PRODUCTS, "provenance.json")]
    if not all(path.is_file() for path in products):
        return False
    metrics = read_json(options.output / "metrics.json")
    return metrics["identity"] == run_identity(options, settings)


def train(options, settings, runtime, world) -> None:
    started = time.perf_counter()
    train_settings = TrainSettings(**settings["train"])
    check_batch(train_settings, world.size)
    dataset = load_dataset(options.dataset)
    sequence_tokens = train_settings.sequence_tokens
    config = config_from_settings(settings["model"], dataset.vocab_size, sequence_tokens)
    model = prepare(GPT(config, seed=options.seed).to(world.device), runtime)
    loader = CoprimeLoader(
        dataset.splits["train"],
        sequence_tokens,
        train_settings.batch_sequences,
        seed=options.seed,
        rank=world.rank,
        world_size=world.size,
    )
    checkpoints = Checkpoints(options.checkpoints, run_identity(options, settings))
    trainer = Trainer(
        model,
        train_settings,
        loader,
        world,
        checkpoints,
        compile_model=compiles(runtime, model),
        cuda_graphs=records_graphs(runtime, model),
    )
    if world.is_main:
        print(describe(model, train_settings, world), file=sys.stderr, flush=True)
    result = trainer.run()
    if world.is_main:
        write_products(options, settings, dataset, trainer, result, started)
        checkpoints.remove()
    barrier(world)


def describe(model: GPT, settings: TrainSettings, world) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{parameters:,} parameters on {world.size} × {world.device}, {model.compute_dtype}, "
        f"attention {model.attention_backend}; {settings.batch_tokens:,} tokens a step "
        f"({settings.batch_sequences} sequences of {settings.sequence_tokens})"
    )


def write_products(options, settings, dataset, trainer: Trainer, result, started: float) -> None:
    output, model = options.output, trainer.model
    save_model(output / "weights.safetensors", model)
    averages = {name: tensor.cpu() for name, tensor in trainer.averages.state_tensors().items()}
    with atomic_path(output / "averages.safetensors") as temporary:
        save_file(averages, temporary)
    write_table(output / "metrics.parquet", pd.DataFrame(result.history))
    evaluation_started = time.perf_counter()
    score = evaluate_split(model, dataset, "val")
    write_json(
        output / "metrics.json",
        {
            "stage": "train",
            "seed": options.seed,
            "variant": None,
            **score.as_metrics(),
            "identity": run_identity(options, settings),
            "steps": result.step,
            "train_tokens": result.step * trainer.settings.batch_tokens,
            "train_loss": result.history[-1]["loss"],
            "tokens_per_second": result.step * trainer.settings.batch_tokens / result.seconds,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "training_seconds": result.seconds,
            "evaluation_seconds": time.perf_counter() - evaluation_started,
            "seconds": time.perf_counter() - started,
            **runtime_metrics(model, trainer.world),
            "cuda_graphs": trainer.cuda_graphs,
        },
    )
    write_provenance(
        output,
        stage="train",
        settings=settings,
        seed=options.seed,
        inputs=[options.dataset],
        outputs=[output / name for name in PRODUCTS],
        splits_read=["train"],
        parents=[options.dataset.parent / "provenance.json"],
    )


if __name__ == "__main__":
    run(main)
