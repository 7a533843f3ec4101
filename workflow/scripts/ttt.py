"""Test-time training of the averaged weights, before they are quantized.

    python workflow/scripts/ttt.py --config config.yaml --variant leaky --seed 42 \\
        --tokenize results/data/embedded --ema results/quickstart/seed-42/shared/ema \\
        --output results/quickstart/seed-42/leaky/ttt

Several processes: torchrun --standalone --nproc_per_node=8 workflow/scripts/ttt.py ...
"""

from functools import partial

from fairway.data.dataset import load_dataset, read_split
from fairway.evaluation.plain import val_metrics
from fairway.model.runtime import compiles, import_ahead, prepare
from fairway.model.weights import load_model, save_model
from fairway.stage import StageRun, run_stage
from fairway.training.ttt import adapt

SPLITS = {"train": "adaptation", "val": "val"}
"""`data: train` reads held-out training text, which train itself never draws."""


def train(stage: StageRun) -> None:
    settings, runtime = stage.settings.ttt, stage.settings.runtime
    dataset = load_dataset(
        stage.take("tokenize", "manifest.json"), ("adaptation", "val"), world=stage.world
    )
    weights = stage.take("ema", "weights.safetensors")
    model = prepare(load_model(weights, stage.world.device), runtime, brief=True)
    losses: list[float] = []
    if settings.data != "none":
        with stage.charge("training"):
            losses = adapt(
                model,
                read_split(dataset, SPLITS[settings.data]),
                settings,
                seed=stage.seed,
                world=stage.world,
                compile_model=compiles(runtime, model),
            )
    if stage.world.is_main:
        save_model(stage.product("weights.safetensors"), model)
    score = val_metrics(stage, model, dataset)
    if stage.world.is_main:
        stage.finish(
            {**score, "data": settings.data, "epoch_losses": losses},
            splits_read=[settings.data] if losses else [],
        )


if __name__ == "__main__":
    run_stage("ttt", train, __doc__, import_ahead=partial(import_ahead, brief=True))
