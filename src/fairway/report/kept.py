"""Older reports of a run: what they are about, and how one is kept when another takes its place.

A report of other seeds, variants or settings, or with other scores, is never replaced: before the
report is made again its folder is copied to `report-<hash>` beside it. A copy that turns out to say
what the new report says is taken away again.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fairway.claims import remove
from fairway.errors import UserError
from fairway.files import atomic_folder, sha256_of
from fairway.metrics import read_metrics
from fairway.provenance import PROVENANCE


class Kept(NamedTuple):
    """An older report. about: its metrics.json; nothing where an earlier version made it."""

    folder: Path
    about: Mapping[str, Any]


def keep(report: Path) -> Path | None:
    """Copy a finished report to a folder beside it that its content names; None without one."""
    if not (report / PROVENANCE).exists():
        return None
    kept = report.with_name(f"{report.name}-{sha256_of(report / PROVENANCE)[:12]}")
    if not kept.exists():
        with atomic_folder(kept) as temporary:
            shutil.copytree(report, temporary, dirs_exist_ok=True)
    return kept


def kept_reports(report: Path) -> list[Kept]:
    """The older reports beside a report, the latest first."""
    found = [
        path for path in report.parent.glob(f"{report.name}-*") if (path / PROVENANCE).exists()
    ]
    found.sort(key=lambda path: ((path / PROVENANCE).stat().st_mtime, path.name), reverse=True)
    return [Kept(path, _about(path)) for path in found]


def _about(folder: Path) -> Mapping[str, Any]:
    try:
        return read_metrics(folder / "metrics.json", "report", "the report stage")
    except UserError:
        return {}


def drop_equal(report: Path, about: Mapping[str, Any]) -> list[Kept]:
    """Take away the copies that say what `about` does; return the others."""
    others = []
    for one in kept_reports(report):
        if one.about and all(one.about[key] == value for key, value in about.items()):
            remove(one.folder)
        else:
            others.append(one)
    return others
