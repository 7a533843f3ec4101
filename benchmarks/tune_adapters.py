"""Try settings of the evaluation's adapters on held-out training text; validation is never read.

    python benchmarks/tune_adapters.py --dataset results/data/embedded/manifest.json \\
        --artifact results/quickstart/seed-42/shared/gptq/artifact.bin --config config.yaml \\
        --try '{evaluation: {adapters: {lora: {learning_rate: 0.01}}}}' \\
        --try '{evaluation: {adapters: [slot]}}'

Each --try is YAML over the config; without any, the config itself is tried. `selection` is text
that neither train nor ttt learns from; `ema` has chosen its decay on it.
"""

import argparse
from collections.abc import Mapping
from functools import reduce

import numpy as np
import pandas as pd
import yaml
from context import say
from held_out import add_arguments, first_sections, held_out_text, score_held_out

from fairway.data.dataset import Dataset
from fairway.data.token_bytes import byte_counts
from fairway.data.tokenizer import load_tokenizer
from fairway.evaluation.token_table import table_metrics, token_table
from fairway.plugins import search_beside
from fairway.recipe import complete, read_yaml
from fairway.settings import Settings, merge
from fairway.stage import user_errors


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--try", dest="overlays", action="append", type=yaml.safe_load)
    options = parser.parse_args(arguments)
    search_beside(path.resolve().parent for path in options.config)
    base = reduce(merge, map(read_yaml, options.config))
    overlays = options.overlays or [{}]
    # All are checked before any is run.
    tries = [first_sections(complete(merge(base, overlay))) for overlay in overlays]
    dataset, tokens = held_out_text(options)
    rows = []
    for overlay, sections in zip(overlays, tries, strict=True):
        rows.append({"settings": yaml.safe_dump(overlay, default_flow_style=True).strip()})
        rows[-1] |= measure(options, sections, dataset, tokens)
        say(str(rows[-1]))
    say("\n" + pd.DataFrame(rows).to_string(index=False, float_format="{:.4f}".format))


def measure(
    options: argparse.Namespace,
    sections: Mapping[str, Settings],
    dataset: Dataset,
    tokens: np.ndarray,
) -> dict[str, float]:
    """val_bpb's counterpart on the split, the gains, and scored tokens a second."""
    scores, seconds = score_held_out(
        options, sections["evaluation"], sections["runtime"], dataset, tokens
    )
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
    with user_errors():
        main()
