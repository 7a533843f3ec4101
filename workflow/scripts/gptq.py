"""Quantize the adapted weights and write the artifact: one file, at most the size limit.

    python workflow/scripts/gptq.py --config config.yaml --variant leaky --seed 42 \\
        --tokenize results/data/embedded --ttt results/quickstart/seed-42/leaky/ttt \\
        --output results/quickstart/seed-42/leaky/gptq
"""

from contextlib import nullcontext
from functools import partial

from fairway.data.dataset import load_dataset
from fairway.evaluation.plain import val_metrics
from fairway.files import write_table
from fairway.model.runtime import import_ahead, prepare
from fairway.model.weights import load_model
from fairway.packing import code_bytes
from fairway.quantization.artifact import load_artifact
from fairway.quantization.quantize import quantize_to_file
from fairway.stage import StageRun, run_stage


def quantize(stage: StageRun) -> None:
    settings, runtime, device = stage.settings.gptq, stage.settings.runtime, stage.world.device
    dataset = load_dataset(stage.take("tokenize", "manifest.json"), world=stage.world)
    model = prepare(
        load_model(stage.take("ttt", "weights.safetensors"), device), runtime, brief=True
    )
    limit, code = stage.settings.budgets.artifact_bytes, code_bytes()
    artifact = stage.product("artifact.bin")
    reads_train = settings.calibration == "train"
    with stage.charge("training") if reads_train else nullcontext():
        layers, metrics = quantize_to_file(
            artifact, model, settings, dataset, seed=stage.seed, limit_bytes=limit - code
        )
    write_table(stage.product("layers.parquet"), layers)
    reloaded = prepare(load_artifact(artifact, device), runtime, brief=True)
    sizes = {"code_bytes": code, "total_bytes": metrics["artifact_bytes"] + code}
    stage.finish(
        {**val_metrics(stage, reloaded, dataset), **metrics, **sizes, "limit_bytes": limit},
        splits_read=["train"] if metrics["calibration"] == "train" else [],
    )


if __name__ == "__main__":
    run_stage("gptq", quantize, __doc__, import_ahead=partial(import_ahead, brief=True))
