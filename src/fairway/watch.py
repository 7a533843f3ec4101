"""Show how far a run is, from its files alone: `fairway watch`.

    fairway watch                                the run under `results` that was started last
    fairway watch quickstart --once              one look, for a log
    fairway watch quickstart --tracker trackio   the curves go there, too; or wandb, or module:Name

It shows every training with its step, loss, speed, time left and held-out bpb, and every seed and
variant with the stage that it is at and what it has used of its budgets. It ends with the run, or
with Ctrl-C.
"""

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from fairway.errors import UserError, told
from fairway.metrics import read_metrics
from fairway.plugins import load, search_beside
from fairway.provenance import PROVENANCE, read_provenance
from fairway.runs import (
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    WAITING,
    Line,
    Place,
    Status,
    last_run,
    lines_of,
    no_such_run,
    report_of,
    run_folder,
    status_of,
)
from fairway.stages import STAGES, made_by
from fairway.trackers.base import Tracker
from fairway.training.curve import LIVE, TABLE, Curve, Row, read_curve_file, read_curve_table

REFRESH_SECONDS = 1.0
MOST_LOAD = 0.2
"""Share of a processor that looking takes at most: a long sweep is looked at less often."""
RATE_ROWS = 20
"""Rows of the curve that the speed is taken over."""
MOST_MARKS = 8
"""Measurements of held-out text in the table: the last ones."""
LOG_WIDTH = 120
"""Characters of a line where the output is no terminal."""
LEAST_ROWS = 4
"""Of each table, however low the terminal is."""
AROUND_ROWS = 18
"""Lines around the rows of the tables."""

URGENCY = (RUNNING, FAILED, STOPPED, WAITING, FINISHED)
"""Of more rows than fit, those that come first here are shown."""
STYLES = {RUNNING: "bold cyan", FAILED: "bold red", STOPPED: "yellow", FINISHED: "green"}
NONE = "–"


# --- what the files say --------------------------------------------------------------------------


class Limits(BaseModel):
    """What is needed here of the section `train`."""

    max_steps: int
    max_seconds: float | None
    batch_tokens: int
    held_out_seconds: float | None


class Training(NamedTuple):
    """One training, which several variants may share. limits: None before the first row."""

    name: str
    status: Status
    rows: list[Row]
    settings: dict[str, Any]
    limits: Limits | None = None

    def tokens_per_second(self) -> float | None:
        """Over the last rows, on the training clock."""
        start = Row(step=0, loss=0, lr_scale=0, seconds=0, tokens=0)
        rows = [start, *self.rows][-RATE_ROWS:]
        seconds = rows[-1].seconds - rows[0].seconds
        return (rows[-1].tokens - rows[0].tokens) / seconds if seconds > 0 else None

    def seconds_left(self) -> float | None:
        """Until the clock or the steps are used up, at this speed."""
        limits, rate = self.limits, self.tokens_per_second()
        if limits is None or rate is None:
            return None
        last = self.rows[-1]
        left = (limits.max_steps - last.step) * limits.batch_tokens / rate
        if limits.max_seconds is not None:
            left = min(left, limits.max_seconds - last.seconds)
        return max(0.0, left)

    def held_out(self) -> dict[float, str]:
        """Second of the training clock → bpb of held-out text, with an arrow where it rose.

        Seconds are multiples of held_out_seconds, so that they are the same for all seeds.
        """
        found, before = {}, math.inf
        for row in self.rows:
            if row.held_out_bpb is not None and self.limits and self.limits.held_out_seconds:
                every = self.limits.held_out_seconds
                rose = row.held_out_bpb > before
                found[row.seconds // every * every] = "↑ " * rose + f"{row.held_out_bpb:.4f}"
                before = row.held_out_bpb
        return found


class Spent(NamedTuple):
    """What a seed and variant has used of its budgets so far; None where nothing was yet."""

    training_seconds: float | None
    evaluation_seconds: float | None
    artifact_bytes: float | None


class View(NamedTuple):
    """A run at one moment. lines: with each stage's status. faults: what cannot be read."""

    run: Path
    lines: list[tuple[Line, dict[str, Status], Spent]]
    trainings: dict[Path, Training]
    report: Status
    faults: list[str]


def look_at(run: Path) -> View:
    """Read how far a run is; UserError where its plan is damaged."""
    faults: dict[str, None] = {}
    known: dict[Place, Status] = {}
    lines, trainings = [], {}
    for line in lines_of(run):
        statuses = line.statuses(known)
        for stage, status in statuses.items():
            if status.note:
                faults[f"{line.places[stage].folder}: {status.note}"] = None
        place = line.places.get("train")
        if place and place.folder not in trainings:
            name = str(place.folder.parent.relative_to(run))
            trainings[place.folder] = _training(name, place, statuses["train"], faults)
        training = trainings[place.folder] if place else None
        lines.append((line, statuses, _spent(line, statuses, training, faults)))
    unfinished = any(one.state != FINISHED for _, found, _ in lines for one in found.values())
    return View(run, lines, trainings, status_of(report_of(run), unfinished), list(faults))


def _training(name: str, place: Place, status: Status, faults: dict[str, None]) -> Training:
    try:
        settings, rows = _curve(place.folder, status)
        limits = Limits.model_validate(settings["train"]) if rows else None
        return Training(name, status, rows, settings, limits)
    except OSError:  # it was taken away between two looks
        pass
    except (ValueError, KeyError) as error:  # a UserError is a ValueError
        faults[" ".join(str(error).split())] = None
    return Training(name, status, [], {})


def _curve(folder: Path, status: Status) -> Curve:
    if status.state == FINISHED:
        return _finished_curve(folder, (folder / TABLE).stat().st_mtime_ns)
    files = (folder.parent / ".checkpoints/train").glob(f"*/{LIVE}")
    by_age = sorted(files, key=lambda path: path.stat().st_mtime)
    return read_curve_file(by_age[-1], made_by("train")) if by_age else Curve({}, [])


@cache
def _finished_curve(folder: Path, modified: int) -> Curve:
    again = made_by("train", again=True)
    settings = read_provenance(folder / PROVENANCE, again).settings
    return Curve(settings, read_curve_table(folder / TABLE, again))


def _spent(
    line: Line,
    statuses: dict[str, Status],
    training: Training | None,
    faults: dict[str, None],
) -> Spent:
    seconds: dict[str, float | None] = {"training": None, "evaluation": None}
    artifact_bytes = None
    if training and training.rows and training.status.state != FINISHED:
        seconds["training"] = training.rows[-1].seconds
    for stage, status in statuses.items():
        path, budget = line.places[stage].folder / "metrics.json", STAGES[stage].charged
        if status.state != FINISHED or budget is None:
            continue
        try:
            metrics = _metrics(path, stage, path.stat().st_mtime_ns)
        except OSError:  # it was taken away between two looks
            continue
        except UserError as error:
            faults[str(error)] = None
            continue
        seconds[budget] = (seconds[budget] or 0.0) + metrics[f"{budget}_seconds"]
        artifact_bytes = metrics.get("total_bytes", artifact_bytes)
    return Spent(seconds["training"], seconds["evaluation"], artifact_bytes)


@cache
def _metrics(path: Path, stage: str, modified: int) -> dict[str, Any]:
    return read_metrics(path, stage, made_by(stage, again=True))


# --- what is shown -------------------------------------------------------------------------------


class Shown(NamedTuple):
    """A row of a table, and how far what it is about is."""

    state: str
    cells: list[str]


def shown(view: View, room: int | None = None) -> Group:
    """All that there is to see. room: rows of each table at most; the others are counted."""
    tables = [
        _table("Training", TRAINING, [_training_row(one) for one in view.trainings.values()], room),
        _held_out_table(view, room),
        _table("Stages and budgets", STAGES_HEADS, [_line_row(*one) for one in view.lines], room),
    ]
    return Group(_title(view), *filter(None, tables), *map(_fault, view.faults[:room]))


def _title(view: View) -> Text:
    statuses = {
        line.places[stage].folder: status.state
        for line, found, _ in view.lines
        for stage, status in found.items()
    }
    told = _counted(statuses.values())
    now = time.strftime("%H:%M:%S")
    return Text(f"{view.run} at {now}: stages {told or 'none'}; report {view.report.state}")


def _counted(states: Iterable[str]) -> str:
    counts = Counter(states)
    return ", ".join(f"{counts[state]} {state}" for state in URGENCY if counts[state])


TRAINING = ("training", "state", "#step", "#loss", "#tokens/s", "#time left", "#held-out bpb")


def _training_row(training: Training) -> Shown:
    state, rows = training.status.state, training.rows
    if not rows or training.limits is None:
        return Shown(state, [training.name, state, *[NONE] * 5])
    rate, left = training.tokens_per_second(), training.seconds_left()
    measured = [row.held_out_bpb for row in rows if row.held_out_bpb is not None]
    cells = [
        f"{rows[-1].step:,}/{training.limits.max_steps:,}",
        f"{rows[-1].loss:.4f}",
        NONE if rate is None else f"{rate:,.0f}",
        NONE if left is None or state == FINISHED else tqdm.format_interval(left),
        f"{measured[-1]:.4f}" if measured else NONE,
    ]
    return Shown(state, [training.name, state, *cells])


def _held_out_table(view: View, room: int | None) -> Table | None:
    measured = {one.name: (one, one.held_out()) for one in view.trainings.values()}
    marks = sorted({mark for _, found in measured.values() for mark in found})[-MOST_MARKS:]
    rows = [
        Shown(one.status.state, [name, *(found.get(mark, NONE) for mark in marks)])
        for name, (one, found) in measured.items()
    ]
    heads = ["training", *(f"#{mark:,g} s" for mark in marks)]
    title = "Held-out bpb, by the training clock"
    return _table(title, heads, rows, room) if marks else None


STAGES_HEADS = (
    "seed", "variant", "#finished", "now", "#training s", "#evaluation s", "#artifact bytes",
)  # fmt: skip


def _line_row(line: Line, statuses: dict[str, Status], spent: Spent) -> Shown:
    stage = min(statuses, key=lambda one: URGENCY.index(statuses[one].state))
    state = statuses[stage].state
    finished = sum(one.state == FINISHED for one in statuses.values())
    used = [_used(one, getattr(line.budgets, name, None)) for name, one in spent._asdict().items()]
    now = state if state == FINISHED else f"{stage} {state}"
    cells = [str(line.seed), line.variant, f"{finished}/{len(statuses)}", now, *used]
    return Shown(state, cells)


def _used(spent: float | None, limit: float | None) -> str:
    if spent is None or limit is None:
        return NONE if spent is None else f"{spent:,.0f}"
    return f"{spent:,.0f}/{limit:,.0f}" + (" over" if spent > limit else "")


def _fault(text: str) -> Text:
    return Text(text, style=STYLES[FAILED])


def _table(title: str, heads: Sequence[str], rows: list[Shown], room: int | None) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for head in heads:
        justify = "right" if head.startswith("#") else "left"
        table.add_column(head.removeprefix("#"), justify=justify)
    if room is not None and len(rows) > room:
        rows = sorted(rows, key=lambda row: URGENCY.index(row.state))
        rest = _counted(row.state for row in rows[room:])
        table.caption, table.caption_justify = f"and {rest} more", "left"
    for state, cells in rows[:room]:
        table.add_row(*(Text(cell, style=STYLES.get(state, "")) for cell in cells))
    return table


# --- trackers ------------------------------------------------------------------------------------


@contextmanager
def handing_on(name: str, run: str) -> Iterator[Callable[[Iterable[Training]], None]]:
    """Yields what gives a tracker every row that it has not had yet. name: as of a plugin.

    Raises UserError where there is no such tracker, where its package is not installed, and for
    whatever it raises.
    """
    search_beside([Path.cwd()])
    kind = load(name, "fairway.trackers")
    if not (isinstance(kind, type) and issubclass(kind, Tracker)):
        raise UserError(f"--tracker {name}: found no subclass of fairway.trackers.base.Tracker")
    trackers: dict[str, Tracker] = {}
    last: dict[str, int] = {}

    def hand_on(trainings: Iterable[Training]) -> None:
        for training in trainings:
            new = [row for row in training.rows if row.step > last.get(training.name, -1)]
            if new and training.name not in trackers:
                trackers[training.name] = kind(run, training.name, training.settings)
            for row in new:
                values = row.model_dump(exclude={"step"}, exclude_none=True)
                trackers[training.name].log(row.step, values)
                last[training.name] = row.step
            if training.status.state == FINISHED and training.name in trackers:
                trackers.pop(training.name).finish()

    def finish() -> None:
        for tracker in trackers.values():
            tracker.finish()

    try:
        yield partial(_telling, name, hand_on)
    finally:
        _telling(name, finish)


def _telling(name: str, work: Callable[..., None], *arguments: Any) -> None:
    """Do a tracker's work; what it raises is a UserError of one line."""
    try:
        work(*arguments)
    except (Exception, SystemExit) as error:
        raise UserError(f"--tracker {name} ended with {told(error)}") from error


# --- the command ---------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `fairway watch`."""
    parser.add_argument(
        "name",
        nargs="?",
        metavar="RUN",
        help="a folder, or its name under results (the one started last)",
    )
    parser.add_argument("--once", action="store_true", help="look once, and end")
    parser.add_argument(
        "--tracker", metavar="NAME", help="trackio, wandb, or module:Name of your own"
    )


def run(parsed: argparse.Namespace) -> int:
    """`fairway watch`: exit status 0, however far the run is."""
    folder = last_run() if parsed.name is None else run_folder(parsed.name)
    if folder is None:
        raise no_such_run(parsed.name)
    is_terminal = sys.stdout.isatty()
    console = Console(width=None if is_terminal else LOG_WIDTH)
    nowhere = nullcontext(lambda trainings: None)
    tracker = handing_on(parsed.tracker, folder.name) if parsed.tracker else nowhere
    live = Live(console=console, auto_refresh=False, transient=True)
    view = None
    with tracker as hand_on, suppress(KeyboardInterrupt), live:
        while True:
            began = time.monotonic()
            view = look_at(folder)
            hand_on(view.trainings.values())
            room = max(LEAST_ROWS, (console.height - AROUND_ROWS) // 3)
            live.update(shown(view, room), refresh=is_terminal)
            if parsed.once or view.report.state == FINISHED:
                break
            spent = time.monotonic() - began
            time.sleep(max(REFRESH_SECONDS, spent / MOST_LOAD - spent))
    if view:
        console.print(shown(view))
    return 0
