"""The templates beside this file, made into pages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from fairway.files import atomic_path
from fairway.report.format import badge
from fairway.report.table import cells


def render(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Write a page to `path`. template: a file's name. content: what its names stand for."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = lambda name: escape(name).replace("_", Markup("_<wbr>"))
    environment.filters |= {"badge": badge, "cells": cells}
    page = environment.get_template(template).render(content)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
