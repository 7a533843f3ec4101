"""Make a dataset: tokenizer, token shards, splits and their manifest.

python workflow/scripts/tokenize_text.py --config config.yaml --output results/data/embedded
python workflow/scripts/tokenize_text.py --config mine.yaml --output results/data/mine --threads 16
"""

import argparse
import os

from fairway.data.build import make_dataset
from fairway.stage import StageRun, run_stage


def make(stage: StageRun) -> None:
    metrics, files = make_dataset(stage.settings.data, stage.output, stage.options.threads)
    stage.note_inputs(files)
    stage.finish(metrics)


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="for the tokenizer's training and for encoding; changes no result",
    )


if __name__ == "__main__":
    run_stage("tokenize", make, __doc__, add_options=add_threads)
