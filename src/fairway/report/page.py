"""A report's files: tables, figures, a summary, a config, and one page that needs nothing else."""

import base64
from collections.abc import Sequence
from pathlib import Path

from fairway.files import write_bytes
from fairway.report.configuration import CONFIG, config_of, config_text, own_modules, resolved
from fairway.report.content import page_content, summary_markdown
from fairway.report.figures import write_figures
from fairway.report.kept import Kept
from fairway.report.render import render
from fairway.report.results import Results
from fairway.report.settings import ReportSettings
from fairway.report.tables import RunTables


def write_report(
    folder: Path,
    results: Results,
    tables: RunTables,
    settings: ReportSettings,
    command: str | None = None,
    kept: Sequence[Kept] = (),
) -> list[Path]:
    """Write everything into `folder`; returns all paths.

    command: what started the run, where it is known. kept: older reports.
    """
    # Before the first file, for it reads the datasets' provenance, which may be refused.
    sections = {variant: resolved(results, variant) for variant in results.variants}
    figures = write_figures(folder / "figures", results, tables)
    config = config_text(
        config_of(results.run, results.seeds, sections)
        | {"report": settings.model_dump(mode="json")}
    )
    written = {
        CONFIG: config,
        "summary.md": summary_markdown(results, tables, settings),
    }
    for name, text in written.items():
        write_bytes(folder / name, text.encode())
    content = page_content(results, tables, settings, kept) | {
        "figures": {name: _data_uri(figure) for name, figure in figures.items()},
        "config": config,
        "own_modules": own_modules(config),
        "command": command,
    }
    page = folder / "report.html"
    render(page, "page.html.j2", content)
    return [*tables.write(folder), *figures.values(), *(folder / one for one in written), page]


def _data_uri(figure: Path) -> str:
    encoded = base64.b64encode(figure.read_bytes()).decode("ascii")
    return f"data:image/svg+xml;base64,{encoded}"
