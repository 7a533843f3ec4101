"""Try settings of the evaluation's adapters on held-out training text; validation is never read.

    python benchmarks/tune_adapters.py --dataset results/data/embedded/manifest.json \\
        --artifact results/quickstart/seed-42/causal/gptq/artifact.bin --config config.yaml \\
        --try '{lora: {learning_rate: 0.01}}' --try '{evaluation: {adapters: [slot]}}'

Each --try is YAML over the config; without any, the config itself is tried. `selection` is text
that neither train nor ttt learns from; `ema` has chosen its decay on it.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import yaml
from context import say
from held_out import add_arguments, held_out_text, score_held_out

from fairway.command import run
from fairway.config import load_config, merge, validated
from fairway.data.dataset import Dataset
from fairway.data.tokenizer import load_tokenizer
from fairway.evaluation.bits_per_byte import byte_counts
from fairway.evaluation.token_table import table_metrics, token_table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--try", dest="overlays", action="append", type=yaml.safe_load)
    options = parser.parse_args(arguments)
    base = load_config(options.config)
    overlays = options.overlays or [{}]
    # All are checked before any is run.
    configs = [validated(merge(base, overlay)) for overlay in overlays]
    dataset, tokens = held_out_text(options)
    rows = []
    for overlay, config in zip(overlays, configs, strict=True):
        rows.append({"settings": yaml.safe_dump(overlay, default_flow_style=True).strip()})
        rows[-1] |= measure(options, config, dataset, tokens)
        say(str(rows[-1]))
    say("\n" + pd.DataFrame(rows).to_string(index=False, float_format="{:.4f}".format))


def measure(
    options: argparse.Namespace, config: Mapping[str, Any], dataset: Dataset, tokens: np.ndarray
) -> dict[str, float]:
    """val_bpb's counterpart on the split, the gains, and scored tokens a second."""
    scores, seconds = score_held_out(options, config, dataset, tokens)
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
