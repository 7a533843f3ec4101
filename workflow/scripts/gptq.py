"""Quantise the adapted weights with GPTQ and write the artifact: one file, at most the size limit.

    python workflow/scripts/gptq.py --config config.yaml --variant causal --seed 42 \\
        --dataset results/data/embedded/manifest.json \\
        --weights results/quickstart/seed-42/causal/ttt \\
        --output results/quickstart/seed-42/causal/gptq

Writes artifact.bin, layers.parquet (one row per matrix), metrics.json and provenance.json.
"""

import time
from dataclasses import asdict
from pathlib import Path

from fairway.code_hash import import_closure
from fairway.command import run, seed_stage_parser, stage_settings
from fairway.data.dataset import load_dataset
from fairway.distributed import World, resolve_device
from fairway.evaluation.plain import evaluate_split
from fairway.files import write_json, write_table
from fairway.model.gpt import BANKS
from fairway.model.runtime import RuntimeSettings, prepare
from fairway.model.weights import load_model
from fairway.provenance import runtime_metrics, write_provenance
from fairway.quantization.artifact import load_artifact, storable, stream_table, write_artifact
from fairway.quantization.calibration import calibration_tokens, collect_hessians
from fairway.quantization.gptq import GptqSettings, quantize_banks
from fairway.quantization.pruning import code_bytes, count_zeros, fit_to_limit

# The artifact needs this program, and what it imports, to be scored: its bytes count as well.
EVALUATION_SCRIPT = Path(__file__).with_name("slot_eval.py")
PRODUCTS = ("artifact.bin", "layers.parquet", "metrics.json")


def main(arguments: list[str] | None = None) -> None:
    parser = seed_stage_parser("gptq", __doc__)
    parser.add_argument("--weights", type=Path, required=True, help="folder of the ttt stage")
    options = parser.parse_args(arguments)
    settings = stage_settings(options)
    started = time.perf_counter()
    metrics = quantize(options, settings)
    metrics["seconds"] = time.perf_counter() - started
    write_json(options.output / "metrics.json", metrics)
    write_provenance(
        options.output,
        stage="gptq",
        settings=settings,
        seed=options.seed,
        inputs=[options.dataset, options.weights / "weights.safetensors"],
        outputs=[options.output / name for name in PRODUCTS],
        splits_read=["train"] if settings["gptq"]["calibration"] == "train" else [],
        parents=[options.weights / "provenance.json"],
    )


def quantize(options, settings) -> dict:
    """Write artifact.bin and layers.parquet; return the metrics, evaluated from the file."""
    started = time.perf_counter()
    gptq, runtime = GptqSettings(**settings["gptq"]), RuntimeSettings(**settings["runtime"])
    world = World(rank=0, size=1, device=resolve_device(runtime.device))
    dataset = load_dataset(options.dataset)
    model = prepare(load_model(options.weights / "weights.safetensors", world.device), runtime)

    tokens = calibration_tokens(model, dataset, gptq, options.seed)
    hessians = collect_hessians(model, tokens, gptq.batch_sequences)
    banks = {name: getattr(model, name) for name in BANKS}
    quantized, layers = quantize_banks(banks, hessians, gptq)

    config, limit = asdict(model.config), settings["budgets"]["artifact_bytes"]
    code = code_bytes(import_closure(EVALUATION_SCRIPT))
    tensors, zeroed = fit_to_limit(config, storable(model.state_dict(), quantized), limit - code)
    size = write_artifact(options.output / "artifact.bin", config, tensors)
    streams = stream_table((options.output / "artifact.bin").read_bytes())
    write_table(options.output / "layers.parquet", count_zeros(layers, tensors))
    evaluation_started = time.perf_counter()
    reloaded = prepare(load_artifact(options.output / "artifact.bin", world.device), runtime)
    score = evaluate_split(reloaded, dataset, "val")
    finished = time.perf_counter()
    return {
        "stage": "gptq",
        "seed": options.seed,
        "variant": options.variant,
        **score.as_metrics(),
        "calibration": gptq.calibration,
        "artifact_bytes": size,
        **{f"{name}_bytes": length for name, (_, length) in streams.items()},
        "codecs": {name: codec for name, (codec, _) in streams.items()},
        "code_bytes": code,
        "total_bytes": size + code,
        "limit_bytes": limit,
        "zeros": zeroed,
        "mean_error": layers["error"].mean(),
        "mean_error_round_to_nearest": layers["error_round_to_nearest"].mean(),
        "training_seconds": evaluation_started - started if gptq.calibration == "train" else 0.0,
        "evaluation_seconds": finished - evaluation_started,
        **runtime_metrics(model, world),
    }


if __name__ == "__main__":
    run(main)
