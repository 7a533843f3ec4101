"""report.html: one page that needs nothing but itself; no script, no font, no other file."""

import base64
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fairway.files import atomic_path
from fairway.report.captions import figure_captions
from fairway.report.content import page_content
from fairway.report.results import Results
from fairway.report.tables import ReportSettings, Tables

TEMPLATE = Path(__file__).with_name("page.html.j2")


def write_page(
    path: Path,
    results: Results,
    tables: Tables,
    figures: Mapping[str, Path],
    settings: ReportSettings,
) -> None:
    """Render the report to `path`. figures: the SVG files by name, embedded as they are."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE.name).render(
        page_content(results, tables, settings),
        figures={name: _data_uri(figure) for name, figure in figures.items()},
        captions=figure_captions(results),
        report_path=path.as_posix(),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _data_uri(figure: Path) -> str:
    encoded = base64.b64encode(figure.read_bytes()).decode("ascii")
    return f"data:image/svg+xml;base64,{encoded}"
