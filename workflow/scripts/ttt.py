"""Test-time training of the averaged weights, before they are quantised.

    python workflow/scripts/ttt.py --config config.yaml --variant causal --seed 42 \\
        --dataset results/data/embedded/manifest.json \\
        --ema results/quickstart/seed-42/ema --output results/quickstart/seed-42/causal/ttt

Several processes: torchrun --standalone --nproc_per_node=8 workflow/scripts/ttt.py ...
"""

import time
from pathlib import Path

from fairway.command import run, seed_stage_parser, stage_settings
from fairway.data.dataset import load_dataset, read_split
from fairway.distributed import barrier, distributed_world
from fairway.evaluation.plain import evaluate_split
from fairway.files import write_json
from fairway.model.runtime import RuntimeSettings, compiles, prepare
from fairway.model.weights import load_model, save_model
from fairway.provenance import runtime_metrics, write_provenance
from fairway.training.ttt import TTTSettings, adapt

# `data: train` reads held-out training text, which train itself never draws.
SPLITS = {"train": "adaptation", "val": "val"}


def main(arguments: list[str] | None = None) -> None:
    parser = seed_stage_parser("ttt", __doc__)
    parser.add_argument("--ema", type=Path, required=True, help="folder of the ema stage")
    options = parser.parse_args(arguments)
    settings = stage_settings(options)
    runtime = RuntimeSettings(**settings["runtime"])
    with distributed_world(runtime.device) as world:
        train(options, settings, runtime, world)


def train(options, settings, runtime, world) -> None:
    started = time.perf_counter()
    ttt = TTTSettings(**settings["ttt"])
    dataset = load_dataset(options.dataset)
    weights = options.ema / "weights.safetensors"
    model = prepare(load_model(weights, world.device), runtime)
    losses = []
    if ttt.data != "none":
        losses = adapt(
            model,
            read_split(dataset, SPLITS[ttt.data]),
            ttt,
            seed=options.seed,
            world=world,
            compile_model=compiles(runtime, model),
        )
    training_seconds = time.perf_counter() - started if losses else 0.0
    if world.is_main:
        write_products(options, settings, model, dataset, world, losses, training_seconds, started)
    barrier(world)


def write_products(
    options, settings, model, dataset, world, losses, training_seconds, started
) -> None:
    save_model(options.output / "weights.safetensors", model)
    evaluation_started = time.perf_counter()
    score = evaluate_split(model, dataset, "val")
    write_json(
        options.output / "metrics.json",
        {
            "stage": "ttt",
            "seed": options.seed,
            "variant": options.variant,
            **score.as_metrics(),
            "data": settings["ttt"]["data"],
            "epoch_losses": losses,
            "training_seconds": training_seconds,
            "evaluation_seconds": time.perf_counter() - evaluation_started,
            "seconds": time.perf_counter() - started,
            **runtime_metrics(model, world),
        },
    )
    write_provenance(
        options.output,
        stage="ttt",
        settings=settings,
        seed=options.seed,
        inputs=[options.dataset, options.ema / "weights.safetensors"],
        outputs=[options.output / name for name in ("weights.safetensors", "metrics.json")],
        splits_read=[] if not losses else [settings["ttt"]["data"]],
        parents=[options.ema / "provenance.json"],
    )


if __name__ == "__main__":
    run(main)
