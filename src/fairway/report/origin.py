"""Where a run's numbers come from: files to look at, commits, versions, and how to make them again.

Links are relative to the report's folder, which lies in the run's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairway.audit.interface import FAIL
from fairway.files import sha256_of_json
from fairway.provenance import PROVENANCE
from fairway.report.format import bits
from fairway.report.kept import Kept
from fairway.report.results import Results, stage_of
from fairway.report.table import Cell, Group, Table
from fairway.runs import error_lines

MOST_VARIANTS = 4
"""Of more variants of an older report than these, the others are counted."""
MOST_SEEDS = 8
"""Of more that are left out than these, the others are counted."""


def file_link(results: Results, variant: str, seed: int, stage: str, name: str) -> str:
    """A file of a stage's folder."""
    return f"../seed-{seed}/{results.folder(variant, stage)}/{stage_of(stage)}/{name}"


def log_link(results: Results, variant: str, seed: int, stage: str) -> str:
    """The stage's log; nothing where the workflow did not write one."""
    name = f"logs/seed-{seed}/{results.folder(variant, stage)}/{stage}.log"
    return f"../{name}" if (results.path / name).exists() else ""


def provenance_table(results: Results) -> Table:
    """What each stage was made from, for the first seed; the others differ in the seed only."""
    rows = []
    for sharers, stages in results.stages_by_sharers().items():
        for stage in stages:
            variant = sharers[0]
            entry = results.provenance[variant, results.seeds[0], stage]
            tainted = "val" in entry.splits and stage != "audit"
            rows.append(
                [
                    stage,
                    results.folder(variant, stage),
                    results.name_of(sharers, stage),
                    Cell(", ".join(entry.splits) or "none", warning="tainted" if tainted else ""),
                    sha256_of_json(entry.settings)[:12],
                    _short_commit(entry.git_commit),
                    *(Cell(links=_links(results, variant, seed, stage)) for seed in results.seeds),
                ]
            )
    seeds = [f"Seed {seed}" for seed in results.seeds]
    return Table(
        "What each stage was made from",
        "Ancestry: the splits of the data whose tokens went into the product. Settings: the first "
        "digits of their SHA-256. Of each seed, the stage’s numbers, its record (settings and "
        "SHA-256 of all that it read and wrote) and its log.",
        ["Stage", "Folder", "Used by", "Ancestry", "Settings", "Commit", *seeds],
        [Group(rows)],
    )


def _links(results: Results, variant: str, seed: int, stage: str) -> list[tuple[str, str]]:
    names = {"metrics": "metrics.json", "record": PROVENANCE}
    if stage == "audit":
        names = {"audit": "audit.json"} | names
    links = [(word, file_link(results, variant, seed, stage, name)) for word, name in names.items()]
    log = log_link(results, variant, seed, stage)
    return [*links, ("log", log)] if log else links


def _short_commit(commit: str | None) -> str:
    if not commit:
        return "not in a git checkout"
    digits, _, dirty = commit.partition("-")
    return digits[:12] + (" with local changes" if dirty else "")


def identity(results: Results) -> dict[str, Any]:
    """Commits, versions and the hash over every stage's settings, independent of key order."""
    commits = sorted({entry.git_commit or "" for entry in results.provenance.values()})
    settings = {
        f"{results.folder(variant, stage)} {stage}": entry.settings
        for (variant, _, stage), entry in results.provenance.items()
    }
    versions: dict[str, set[str]] = {}
    for entry in results.provenance.values():
        for package, version in entry.versions.items():
            versions.setdefault(package, set()).add(version)
    return {
        "commits": [_short_commit(commit) for commit in commits],
        "checkout": commits[0].partition("-")[0] if len(commits) == 1 else "",
        "settings_sha256": sha256_of_json(settings),
        "versions": {name: ", ".join(sorted(found)) for name, found in sorted(versions.items())},
    }


def commands_to_reproduce(checkout: str) -> list[str]:
    """Commands that make the run again in a clone of Fairway, with a copy of its config.yaml."""
    return [
        *([f"git checkout {checkout}"] if checkout else []),
        "make setup",
        "source .venv/bin/activate",
        "snakemake --cores 2 --replace-workflow-config --configfile reproduced.yaml",
    ]


def seeds_left_out(results: Results) -> list[str]:
    """What is known of other seeds in the run's folder: a report of some seeds says so."""
    told = []
    for folder in results.path.glob("seed-*"):
        seed = folder.name.removeprefix("seed-")
        if seed.isdigit() and int(seed) not in results.seeds:
            told.append((int(seed), _left_out(results, folder)))
    lines = [f"Seed {seed} is not in these numbers: {reason}." for seed, reason in sorted(told)]
    rest = len(lines) - MOST_SEEDS
    return lines if rest <= 0 else [*lines[:MOST_SEEDS], f"Nor are {rest} more."]


def _left_out(results: Results, seed_folder: Path) -> str:
    for stage in results.stages:
        for folder in dict.fromkeys(own[stage] for own in results.folders.values()):
            if not (seed_folder / folder / stage / PROVENANCE).exists():
                log = results.path / "logs" / seed_folder.name / folder / f"{stage}.log"
                errors = error_lines(log.read_text(errors="replace")) if log.exists() else []
                return f"its {stage} ended with “{errors[-1]}”" if errors else f"no {stage} of it"
    return "it is finished, but was not asked for"


def kept_table(kept: Sequence[Kept]) -> Table:
    """The older reports, each with its seeds and scores."""
    rows = [
        [
            Cell(one.folder.name, link=f"../{one.folder.name}/report.html"),
            ", ".join(map(str, one.about.get("seeds", ()))),
            _scores(one.about),
        ]
        for one in kept
    ]
    return Table(
        "Older reports of this run",
        "Each was of other seeds, variants or settings, or had other scores. The files that it was "
        "made from may have been replaced since.",
        ["Folder", "Seeds", "Scores"],
        [Group(rows)],
    )


def _scores(about: Mapping[str, Any]) -> str:
    """Mean scores of a few variants, each with its verdict; of one that failed, the verdict."""
    verdicts = about.get("verdicts", {})
    told = [
        f"{variant} {verdicts[variant]}"
        if verdicts[variant] == FAIL
        else f"{variant} {bits(score)} {verdicts[variant]}"
        for variant, score in about.get("scores", {}).items()
    ]
    rest = len(told) - MOST_VARIANTS
    return ", ".join(told if rest <= 0 else [*told[:MOST_VARIANTS], f"and {rest} more"])
