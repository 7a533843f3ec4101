"""Build the averaged weights from train's trackers, without retraining, and evaluate them.

    python workflow/scripts/ema.py --config config.yaml --seed 42 \\
        --dataset results/data/embedded/manifest.json \\
        --train results/quickstart/seed-42/train --output results/quickstart/seed-42/ema
"""

import time
from pathlib import Path

from safetensors.torch import load_file

from fairway.command import run, seed_stage_parser, stage_settings
from fairway.data.dataset import load_dataset, read_split
from fairway.distributed import World, resolve_device
from fairway.evaluation.plain import evaluate_split
from fairway.files import require_file, write_json
from fairway.model.runtime import RuntimeSettings, prepare
from fairway.model.weights import load_model, save_model
from fairway.provenance import runtime_metrics, write_provenance
from fairway.training.selection import EMASettings, select_average


def main(arguments: list[str] | None = None) -> None:
    parser = seed_stage_parser("ema", __doc__)
    parser.add_argument("--train", type=Path, required=True, help="folder of the train stage")
    options = parser.parse_args(arguments)
    settings = stage_settings(options)
    started = time.perf_counter()
    runtime = RuntimeSettings(**settings["runtime"])
    world = World(rank=0, size=1, device=resolve_device(runtime.device))
    dataset = load_dataset(options.dataset)
    weights = options.train / "weights.safetensors"
    averages = require_file(options.train / "averages.safetensors", "the train stage")
    model = prepare(load_model(weights, world.device), runtime)
    chosen, losses = select_average(
        model,
        load_file(averages),
        EMASettings(**settings["ema"]),
        lambda: read_split(dataset, "selection"),
    )
    selection_seconds = time.perf_counter() - started if losses else 0.0
    save_model(options.output / "weights.safetensors", model)
    evaluation_started = time.perf_counter()
    score = evaluate_split(model, dataset, "val")
    write_json(
        options.output / "metrics.json",
        {
            "stage": "ema",
            "seed": options.seed,
            "variant": None,
            **score.as_metrics(),
            "average": chosen,
            "selection_losses": losses,
            "training_seconds": selection_seconds,
            "evaluation_seconds": time.perf_counter() - evaluation_started,
            "seconds": time.perf_counter() - started,
            **runtime_metrics(model, world),
        },
    )
    write_provenance(
        options.output,
        stage="ema",
        settings=settings,
        seed=options.seed,
        inputs=[options.dataset, weights, averages],
        outputs=[options.output / name for name in ("weights.safetensors", "metrics.json")],
        splits_read=["train"] if losses else [],
        parents=[options.train / "provenance.json"],
    )


if __name__ == "__main__":
    run(main)
