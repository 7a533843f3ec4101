"""Runs as they lie on disk: found by name, and how far each of their stages is.

Only files are read. What a run is to make says its plan.json, which the workflow leaves at each
start; without one, whose stages were run by hand, there are the folders that lie there.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from fairway.claims import claimant, may_live
from fairway.errors import UserError
from fairway.plugins import did_you_mean
from fairway.provenance import PROVENANCE
from fairway.recipe import MOST_NAMES, Config
from fairway.records import read_record
from fairway.stages import STAGES, Budgets, stages_per

RESULTS = Path("results")
PLAN = "plan.json"

RUNNING, FAILED, STOPPED, WAITING, FINISHED = (
    "running", "failed", "stopped", "waiting", "finished",
)  # fmt: skip
"""States of a stage. Stopped: it was killed, or ended by a signal."""

STARTING_SECONDS = 60.0
"""What Python and its libraries have to load in, before a stage makes its claim."""


class Plan(BaseModel):
    """plan.json: what the last start of the workflow was to make, seeds × variants."""

    model_config = ConfigDict(extra="forbid")

    seeds: list[int]
    folders: dict[str, dict[str, str]]
    """Variant → stage → the folder under `seed-<s>`."""
    datasets: dict[str, str]
    """Variant → name of its dataset."""
    budgets: dict[str, Budgets]
    """Variant → its limits."""


def plan_of(config: Config) -> Plan:
    """What a config asks for."""
    return Plan(
        seeds=list(config.seeds),
        folders=config.folders,
        datasets={variant: config.dataset(variant) for variant in config.variants},
        budgets={variant: config.sections(variant)["budgets"] for variant in config.variants},
    )


# --- where a run lies ----------------------------------------------------------------------------


def run_folder(name: str | Path) -> Path | None:
    """The folder of a run: a path, or a name under `results`; None where there is none."""
    return next((path for path in (Path(name), RESULTS / name) if _is_run(path)), None)


def no_such_run(name: str) -> UserError:
    """What to say of a name that stands for no run: the known ones, and the nearest."""
    known = sorted(path.name for path in RESULTS.glob("*") if _is_run(path))
    return UserError(
        f"no run {name!r:.120}: expected a folder such as results/quickstart, or its name under "
        f"{RESULTS}, which has {', '.join(known[:MOST_NAMES]) or 'none'}"
        f"{did_you_mean(name.partition('/')[0], known)}"
    )


def last_run() -> Path:
    """The run under `results` that was started last; UserError where there is none."""
    runs = [path for path in RESULTS.glob("*") if _is_run(path)]
    if not runs:
        raise UserError(
            f"no run under {RESULTS}: start one with `snakemake --cores 2`, or name a folder"
        )
    return max(runs, key=_started)


def _is_run(folder: Path) -> bool:
    return (folder / PLAN).is_file() or any(folder.glob("seed-*"))


def _started(run: Path) -> float:
    signs = [run / PLAN] if (run / PLAN).is_file() else run.glob("seed-*")
    return max(path.stat().st_mtime for path in signs)


# --- its stages ----------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a stage leaves its products, and its log where the workflow runs it."""

    folder: Path
    log: Path


class Status(NamedTuple):
    """How far a stage is. note: what is to be said of it, such as its error."""

    state: str
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A seed and variant of a run, or without a plan a seed and folder.

    places: by stage, in the order of the table. budgets: the limits, None without a plan.
    """

    seed: int
    variant: str
    places: dict[str, Place]
    budgets: Budgets | None = None

    def statuses(self, known: dict[Place, Status]) -> dict[str, Status]:
        """By stage. What builds on a stage that is not finished again waits, whatever is there.

        known: those that were looked at already, for lines that share them; it is added to.
        """
        found: dict[str, Status] = {}
        redone: set[str] = set()
        for stage, place in self.places.items():
            waits = any(need in redone for need in STAGES[stage].needs)
            if place not in known:
                known[place] = status_of(place, waits)
            found[stage] = known[place]
            if waits or found[stage].state not in (FINISHED, WAITING):
                redone.add(stage)
        return found


def lines_of(run: Path) -> list[Line]:
    """Every seed and variant of a run, by variant; UserError where its plan is damaged."""
    if not (run / PLAN).is_file():
        return list(_found_lines(run))
    plan = read_record(Plan, run / PLAN, "a start of `snakemake`")
    return [
        Line(seed, variant, dict(_planned(run, plan, variant, seed)), plan.budgets[variant])
        for variant in plan.folders
        for seed in sorted(plan.seeds)
    ]


def report_of(run: Path) -> Place:
    """Where the report lies."""
    return Place(run / "report", run / "logs/report.log")


def _planned(run: Path, plan: Plan, variant: str, seed: int) -> Iterator[tuple[str, Place]]:
    for stage in stages_per("dataset"):
        name = plan.datasets[variant]
        log = run.parent / f"logs/{stage.name}_{name}.log"
        yield stage.name, Place(run.parent / "data" / name, log)
    for stage in stages_per("variant"):
        yield stage.name, _place(run, seed, plan.folders[variant][stage.name], stage.name)


def _found_lines(run: Path) -> Iterator[Line]:
    for folder in sorted(run.glob("seed-*/*")):
        seed = folder.parent.name.removeprefix("seed-")
        places = {
            stage.name: _place(run, int(seed), folder.name, stage.name)
            for stage in stages_per("variant")
            if (folder / stage.name).is_dir() or claimant(folder / stage.name)
        }
        if places:
            yield Line(int(seed), folder.name, places)


def _place(run: Path, seed: int, folder: str, stage: str) -> Place:
    beside = f"seed-{seed}/{folder}/{stage}"
    return Place(run / beside, run / f"logs/{beside}.log")


def error_lines(log: str) -> list[str]:
    """The lines of a stage's log in which it says what its user can mend."""
    return [line for line in log.split("\n") if line.startswith("error")]


def status_of(place: Place, waits: bool = False) -> Status:
    """waits: for a stage before it, so that what lies there is an earlier run's."""
    holder = claimant(place.folder)
    if holder and may_live(*holder):
        return Status(RUNNING)
    if waits:
        return Status(WAITING)
    if (place.folder / PROVENANCE).is_file():
        return Status(FINISHED)
    try:
        age = time.time() - place.log.stat().st_mtime
        log = place.log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Status(STOPPED if holder else WAITING)
    said, errors = list(filter(str.strip, log.split("\n"))), error_lines(log)
    if errors or any(line.startswith("Traceback") for line in said):
        return Status(FAILED, [*said, *errors][-1])
    # The log is there before Python is, which makes the claim.
    return Status(STOPPED if holder or said or age > STARTING_SECONDS else RUNNING)
