"""Make a dataset: tokenizer, token shards, splits and their manifest.

    python workflow/scripts/tokenize_text.py --config config.yaml --output results/data/embedded
    python workflow/scripts/tokenize_text.py --config config.yaml config/record.yaml \\
        --output results/data/fineweb --threads 16
"""

import os

from fairway.command import run, stage_parser, stage_settings
from fairway.data.build import make_dataset
from fairway.data.settings import DataSettings


def main(arguments: list[str] | None = None) -> None:
    parser = stage_parser("tokenize", __doc__)
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="results/data/<data.name>"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="for encoding; changes no result"
    )
    options = parser.parse_args(arguments)
    settings = DataSettings(**stage_settings(options)["data"])
    make_dataset(settings, options.output, options.threads)


if __name__ == "__main__":
    run(main)
