"""Try settings of the evaluation on held-out training text; validation is never read.

    python benchmarks/tune_adapters.py --dataset results/data/embedded/manifest.json \\
        --artifact results/quickstart/seed-42/shared/gptq/artifact.bin --config config.yaml \\
        --try '{evaluation: {adapters: {lora: {learning_rate: 0.01}}}}' \\
        --try '{evaluation: {adapters: [slot]}}' \\
        --try '{evaluation: {global_updates: {after: [0.25, 0.5]}}}'

Each --try is YAML over the config, of which `evaluation` counts; without any, the config itself is
tried. All share one model, so the first one's rate includes what is compiled and captured.
`selection` is text that neither train nor ttt learns from; `ema` has chosen its decay on it.
"""

import argparse
from functools import reduce

import numpy as np
import pandas as pd
import yaml
from context import say
from held_out import (
    add_arguments,
    first_sections,
    held_out_evaluator,
    held_out_text,
    score_held_out,
)

from fairway.data.dataset import Dataset
from fairway.data.token_bytes import byte_counts
from fairway.data.tokenizer import load_tokenizer
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.token_table import table_metrics, token_table
from fairway.plugins import search_beside
from fairway.recipe import complete, read_yaml
from fairway.settings import merge
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
    evaluator = held_out_evaluator(options, first_sections(complete(base)), dataset)
    rows = []
    for overlay, sections in zip(overlays, tries, strict=True):
        subject = evaluator.with_settings(sections["evaluation"])
        rows.append({"settings": yaml.safe_dump(overlay, default_flow_style=True).strip()})
        rows[-1] |= measure(subject, dataset, tokens)
        say(str(rows[-1]))
    say("\n" + pd.DataFrame(rows).to_string(index=False, float_format="{:.5f}".format))


def measure(subject: Evaluator, dataset: Dataset, tokens: np.ndarray) -> dict[str, float]:
    """val_bpb's counterpart on the split, the gains, and scored tokens a second."""
    scores, seconds = score_held_out(subject, tokens)
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
