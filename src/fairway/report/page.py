"""report.html, one page that needs nothing but itself, and the tables and figures beside it."""

import base64
from collections.abc import Mapping
from pathlib import Path

from fairway.report.content import page_content
from fairway.report.figures import write_figures
from fairway.report.render import render
from fairway.report.results import Results
from fairway.report.settings import ReportSettings
from fairway.report.tables import RunTables, make_tables


def write_report(folder: Path, results: Results, settings: ReportSettings) -> list[Path]:
    """Write the tables, figures/*.svg and report.html into `folder`; returns all paths."""
    tables = make_tables(results, settings)
    paths = tables.write(folder)
    figures = write_figures(folder / "figures", results, tables)
    page = folder / "report.html"
    write_page(page, results, tables, figures, settings)
    return [*paths, *figures.values(), page]


def write_page(
    path: Path,
    results: Results,
    tables: RunTables,
    figures: Mapping[str, Path],
    settings: ReportSettings,
) -> None:
    """Render the page to `path`. figures: the SVG files by name, embedded as they are."""
    content = page_content(results, tables, settings) | {
        "figures": {name: _data_uri(figure) for name, figure in figures.items()},
        "report_path": path.as_posix(),
    }
    render(path, "page.html.j2", content)


def _data_uri(figure: Path) -> str:
    encoded = base64.b64encode(figure.read_bytes()).decode("ascii")
    return f"data:image/svg+xml;base64,{encoded}"
