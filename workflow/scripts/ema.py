"""Build the averaged weights from train's trackers, without retraining, and evaluate them.

    python workflow/scripts/ema.py --config config.yaml --seed 42 \\
        --tokenize results/data/embedded \\
        --train results/quickstart/seed-42/shared/train \\
        --output results/quickstart/seed-42/shared/ema
"""

from functools import partial

from fairway.data.dataset import load_dataset, read_split
from fairway.evaluation.plain import val_metrics
from fairway.files import read_tensors
from fairway.model.runtime import import_ahead, prepare
from fairway.model.weights import load_model, save_model
from fairway.stage import StageRun, run_stage
from fairway.stages import made_by
from fairway.training.selection import select_average


def average(stage: StageRun) -> None:
    dataset = load_dataset(
        stage.take("tokenize", "manifest.json"), ("selection", "val"), world=stage.world
    )
    weights = stage.take("train", "weights.safetensors")
    averages, _ = read_tensors(stage.take("train", "averages.safetensors"), made_by("train"))
    model = prepare(load_model(weights, stage.world.device), stage.settings.runtime, brief=True)
    with stage.charge("training"):
        chosen, losses = select_average(
            model, averages, stage.settings.ema, lambda: read_split(dataset, "selection")
        )
    save_model(stage.product("weights.safetensors"), model)
    stage.finish(
        {**val_metrics(stage, model, dataset), "average": chosen, "selection_losses": losses},
        splits_read=["train"] if losses else [],
    )


if __name__ == "__main__":
    run_stage("ema", average, __doc__, import_ahead=partial(import_ahead, brief=True))
