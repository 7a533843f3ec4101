"""What every stage script's command line shares."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairway import config as configuration
from fairway.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Call `main`; a UserError becomes one line on stderr and exit status 1."""
    # A reader that closes the pipe early (`script | head`) is no fault of the script.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        main()
    except UserError as error:
        sys.stdout.flush()
        rank = os.environ.get("RANK")
        where = f" (rank {rank})" if rank not in (None, "0") else ""
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def stage_parser(stage: str, documentation: str | None) -> argparse.ArgumentParser:
    """A parser with the options that say which settings a stage gets, and nothing else."""
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(stage=stage)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--config", nargs="+", type=Path, metavar="FILE", help="YAML files, later ones over earlier"
    )
    source.add_argument(
        "--settings", metavar="JSON", help="the stage's sections, as the workflow passes them"
    )
    parser.add_argument("--variant", help="which variant's changes apply (with --config)")
    return parser


def seed_stage_parser(stage: str, documentation: str | None) -> argparse.ArgumentParser:
    """`stage_parser` for the stages that run once a seed: with --dataset, --seed and --output."""
    parser = stage_parser(stage, documentation)
    parser.add_argument("--dataset", type=Path, required=True, help="manifest.json of tokenize")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for the products")
    return parser


def stage_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The stage's sections from `--settings`, or cut from the validated `--config` files."""
    if arguments.settings is not None:
        try:
            return json.loads(arguments.settings)
        except json.JSONDecodeError as error:
            raise UserError(f"--settings is not JSON: {error}") from error
    complete = configuration.load_config(arguments.config)
    return configuration.stage_settings(complete, arguments.stage, arguments.variant)
