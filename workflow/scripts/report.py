"""Put a run's numbers, verdicts and figures on one page; reads files only, computes no score.

    python workflow/scripts/report.py --config config.yaml --run-folder results/quickstart \\
        --data-folder results/data/embedded --seeds 1337 42 2025 --variants causal published \\
        --output results/quickstart/report
"""

from pathlib import Path

from fairway.command import run, stage_parser, stage_settings
from fairway.files import write_table
from fairway.provenance import write_provenance
from fairway.report.figures import write_figures
from fairway.report.page import write_page
from fairway.report.results import input_files, read_results
from fairway.report.tables import Budgets, ReportSettings, make_tables


def main(arguments: list[str] | None = None) -> None:
    parser = stage_parser("report", __doc__)
    parser.add_argument("--run-folder", type=Path, required=True, help="holds seed-<seed>/")
    parser.add_argument("--data-folder", type=Path, required=True, help="the tokenize stage's")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--variants", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    options = parser.parse_args(arguments)
    sections = stage_settings(options)
    settings, budgets = ReportSettings(**sections["report"]), Budgets(**sections["budgets"])

    results = read_results(options.run_folder, options.data_folder, options.seeds, options.variants)
    tables = make_tables(results, settings, budgets)
    table_paths = {}
    for name in ("stages", "summary", "comparisons", "gains"):
        table_paths[name] = options.output / f"{name}.parquet"
        write_table(table_paths[name], getattr(tables, name))
    figures = write_figures(options.output / "figures", results, tables)
    page = options.output / "report.html"
    write_page(page, results, tables, figures, settings)
    write_provenance(
        options.output,
        stage="report",
        settings=sections,
        inputs=input_files(options.run_folder, options.data_folder, results),
        outputs=[*table_paths.values(), *figures.values(), page],
        splits_read=(),
    )
    print(f"{page}: {', '.join(f'{name} {results.verdict(name)}' for name in results.variants)}")


if __name__ == "__main__":
    run(main)
