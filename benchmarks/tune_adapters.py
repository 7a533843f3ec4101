"""Try settings of the evaluation's adapters on held-out training text; validation is never read.

    python benchmarks/tune_adapters.py --dataset results/data/embedded/manifest.json \\
        --artifact results/quickstart/seed-42/causal/gptq/artifact.bin --config config.yaml \\
        --try '{lora: {learning_rate: 0.01}}' --try '{evaluation: {adapters: [slot]}}'

Each --try is YAML over the config; without any, the config itself is tried. `selection` is text
that neither train nor ttt learns from; `ema` has chosen its decay on it.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from context import say

from fairway.adaptation.scoring import evaluator_settings
from fairway.adaptation.token_table import score_rank, table_metrics, token_table
from fairway.command import run
from fairway.config import load_config, merge, validated
from fairway.data.dataset import load_dataset, read_split
from fairway.data.tokenizer import load_tokenizer
from fairway.distributed import resolve_device
from fairway.evaluation.bits_per_byte import byte_counts
from fairway.model.runtime import RuntimeSettings, prepare
from fairway.quantization.artifact import load_artifact


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True, help="manifest.json of tokenize")
    parser.add_argument("--artifact", type=Path, required=True, help="artifact.bin of gptq")
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="YAML files")
    parser.add_argument("--try", dest="overlays", action="append", type=yaml.safe_load)
    parser.add_argument("--split", choices=("selection", "adaptation"), default="selection")
    parser.add_argument("--tokens", type=int, default=262_144, help="of the split, from its start")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    base = load_config(options.config)
    overlays = options.overlays or [{}]
    # All are checked before any is run.
    configs = [validated(merge(base, overlay)) for overlay in overlays]
    rows = []
    for overlay, config in zip(overlays, configs, strict=True):
        rows.append({"settings": yaml.safe_dump(overlay, default_flow_style=True).strip()})
        rows[-1] |= measure(options, config)
        say(str(rows[-1]))
    say("\n" + pd.DataFrame(rows).to_string(index=False, float_format="{:.4f}".format))


def measure(options: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, float]:
    """val_bpb's counterpart on the split, the gains, and scored tokens a second."""
    runtime = RuntimeSettings(**config["runtime"])
    dataset = load_dataset(options.dataset)
    model = prepare(load_artifact(options.artifact, resolve_device(runtime.device)), runtime)
    device = model.token_embedding.device
    tokens = read_split(dataset, options.split)[: options.tokens + 1]
    stream = torch.from_numpy(tokens.astype("int64")).to(device)
    settings = evaluator_settings(config)
    started = time.perf_counter()
    scores = score_rank(
        model, stream, settings, dataset.bos_id, 0, 1, lambda windows: None,
        kernels=model.kernels, model=model, seed=options.seed,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    counts = byte_counts(load_tokenizer(dataset.tokenizer_path))
    metrics = table_metrics(token_table([scores], tokens, counts, dataset.bos_id))
    gains = {name: value for name, value in metrics.items() if name.startswith("gain_")}
    return {
        "bpb": metrics["val_bpb"],
        "bpb_plain": metrics["val_bpb_before"],
        **gains,
        "tokens_per_second": metrics["tokens"] / seconds,
    }


if __name__ == "__main__":
    run(main)
