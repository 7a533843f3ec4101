"""Put a run's numbers, verdicts and figures on one page; reads files only, computes no score.

    python workflow/scripts/report.py --config config.yaml --run results/quickstart \\
        --output results/quickstart/report
"""

import argparse
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fairway.errors import UserError
from fairway.recipe import load_config
from fairway.report.content import cautions
from fairway.report.page import write_report
from fairway.report.results import read_results
from fairway.settings import explain
from fairway.stage import StageRun, run_stage


def report(stage: StageRun) -> None:
    folders, seeds = layout(stage.options)
    results = read_results(stage.options.run, folders, seeds)
    products = write_report(stage.output, results, stage.settings.report)
    stage.taken |= results.files
    stage.finish({}, products=[str(path.relative_to(stage.output)) for path in products])
    verdicts = ", ".join(f"{variant} {results.verdict(variant)}" for variant in folders)
    print(f"{stage.output / 'report.html'}: {verdicts}", *cautions(results), sep="\n  ")


def layout(options: argparse.Namespace) -> tuple[dict[str, dict[str, str]], list[int]]:
    """variant → stage → folder, and the seeds: told, or those of the config."""
    if options.settings is None:
        config = load_config(options.config)
        return config.folders, list(config.seeds)
    try:
        folders = TypeAdapter(dict[str, dict[str, str]]).validate_json(options.variants or "")
    except ValidationError as error:
        raise UserError(explain(error, ("--variants",))) from None
    return folders, options.seeds or []


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="holds seed-<seed>/")
    parser.add_argument("--seeds", type=int, nargs="+", help="(with --settings)")
    parser.add_argument(
        "--variants", metavar="JSON", help="their stages' folders (with --settings)"
    )


if __name__ == "__main__":
    run_stage("report", report, __doc__, add_options=add_options)
