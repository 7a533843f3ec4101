"""Put a run's numbers, verdicts and figures on one page; reads files only, computes no score.

    python workflow/scripts/report.py --config config.yaml --run results/quickstart \\
        --output results/quickstart/report
"""

import argparse
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fairway.errors import UserError
from fairway.recipe import load_config
from fairway.report.content import about, cautions
from fairway.report.kept import drop_equal, keep
from fairway.report.page import write_report
from fairway.report.results import read_results
from fairway.report.tables import make_tables
from fairway.resume import typed_command
from fairway.settings import explain
from fairway.stage import StageRun, run_stage


def report(stage: StageRun) -> None:
    folders, seeds = layout(stage.options)
    results, settings = read_results(stage.options.run, folders, seeds), stage.settings.report
    tables = make_tables(results, settings)
    keep(stage.output)  # of a run of Snakemake, its start has done so
    kept = drop_equal(stage.output, said := about(results, tables, settings))
    products = write_report(stage.output, results, tables, settings, typed_command(), kept)
    stage.taken |= results.files
    stage.finish(said, products=[str(path.relative_to(stage.output)) for path in products])
    verdicts = ", ".join(f"{variant} {results.verdict(variant)}" for variant in folders)
    print(f"{stage.output / 'report.html'}: {verdicts}", *cautions(results), sep="\n  ")
    for one in kept:
        print(f"  an older report is kept in {one.folder}")


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
