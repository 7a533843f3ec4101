"""Going on with a run of the workflow that was killed: `fairway resume`.

Every Snakemake process of the workflow shares a lock on the folder that it works in, from before it
plans its jobs until it ends, in whatever way. One that starts jobs notes its command in RUNS.
`resume` takes the lock alone, so that none of them lives, and hands it on to the Snakemake that it
becomes.
"""

import argparse
import fcntl
import os
import platform
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from fairway.errors import UserError
from fairway.files import write_json

STATE = Path(".snakemake/fairway")
RUNS = STATE / "runs.json"
"""The runs that did not finish, in the order of their starts, and the last one."""
SNAKEMAKES_LOCKS = Path(".snakemake/locks")

RESUMED = "FAIRWAY_RESUMED"
"""Tells the Snakemake that a resume becomes: the descriptor of the lock, and the run's mark."""
MARK = "FAIRWAY_RUN"
"""The run's mark, in the environment of the processes that its jobs start."""

FORCING = ("-f", "--force", "-F", "--forceall")

STOP_SECONDS = 60.0
"""What a process has to write a checkpoint in after SIGTERM."""


class Run(BaseModel):
    """One start of the workflow's jobs."""

    arguments: list[str]
    """Those of `snakemake`."""
    folder: str
    """Where they were typed, relative to the folder that the workflow works in."""
    forced: bool
    """Whether they ask for jobs again that need not run."""
    process: int
    host: str
    mark: str
    finished: bool = False

    @property
    def command(self) -> str:
        return shlex.join(["snakemake", *self.arguments])

    def arguments_to_resume(self) -> list[str]:
        """What was forced is marked as incomplete where it has not run again yet."""
        dropped = {"--rerun-incomplete", *(FORCING if self.forced else ())}
        words = [word for word in self.arguments if word not in dropped]
        end = words.index("--") if "--" in words else len(words)
        # The last --forcerun counts, and an empty one forces nothing.
        options = ["--rerun-incomplete", *(["--forcerun"] if self.forced else [])]
        return [*words[:end], *options, *words[end:]]


# --- what the workflow does, in the folder that it works in --------------------------------------


def share_folder() -> str | None:
    """Lock the folder for as long as this process lives, beside others, but not beside a resume.

    Returns the mark of the run that this process resumes, if it does.
    """
    handed_on, _, resumed = os.environ.pop(RESUMED, "").partition(":")
    descriptor = int(handed_on) if handed_on else _open("lock")
    os.set_inheritable(descriptor, False)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return resumed or None


def note_start(arguments: Sequence[str], folder: str, *, forced: bool, resumed: str | None) -> str:
    """Note a run whose jobs are about to start, in place of the one it resumes; return its mark."""
    run = Run(
        arguments=list(arguments),
        folder=folder,
        forced=forced,
        process=os.getpid(),
        host=platform.node(),
        mark=uuid.uuid4().hex,
    )
    with _changed_runs() as runs:
        superseded = [
            one for one in runs if one.finished or one.mark == resumed or one.command == run.command
        ]
        runs[:] = [*(one for one in runs if one not in superseded), run]
    os.environ[MARK] = run.mark
    return run.mark


def typed_command() -> str | None:
    """The command of the run that this process is a job of; None outside of one."""
    mark = os.environ.get(MARK)
    return next((run.command for run in read_runs() if run.mark == mark), None)


def note_finish(mark: str) -> None:
    """Note that a run has done all of its jobs."""
    with _changed_runs() as runs:
        for run in runs:
            run.finished = run.finished or run.mark == mark


@contextmanager
def _changed_runs() -> Iterator[list[Run]]:
    descriptor = _open("runs.lock")
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        runs = read_runs()
        yield runs
        write_json(RUNS, [run.model_dump() for run in runs])
    finally:
        os.close(descriptor)


def read_runs() -> list[Run]:
    """The runs that are noted in the current folder."""
    if not RUNS.exists():
        return []
    try:
        return TypeAdapter(list[Run]).validate_json(RUNS.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{RUNS} is damaged, so what was started here is not known: remove it, and give the "
            "command again"
        ) from error


def _open(name: str) -> int:
    STATE.mkdir(parents=True, exist_ok=True)
    return os.open(STATE / name, os.O_RDWR | os.O_CREAT, 0o666)


# --- what the user does --------------------------------------------------------------------------


def resume(*, not_running: bool = False) -> str:
    """Become the Snakemake that goes on with the current folder's last run.

    not_running: the user's word that nothing runs where this cannot be seen.
    Returns, with what to tell, only where the last run finished. Raises UserError where nothing was
    started, and where a run lives or may live.
    """
    if find_spec("snakemake") is None:
        raise UserError(
            "Snakemake is not installed beside fairway: pip install 'fairway[workflow]'"
        )
    runs = read_runs()
    if not runs:
        raise UserError(
            f"no job of a run has started in {Path.cwd()}: start one with `snakemake --cores 2`"
        )
    unfinished = [run for run in runs if not run.finished]
    with _alone(unfinished, not_running) as lock:
        _stop_left_behind(unfinished)
        shutil.rmtree(SNAKEMAKES_LOCKS, ignore_errors=True)
        if not runs[-1].finished:
            _become_snakemake(runs[-1], lock)
    earlier = f"; `{unfinished[-1].command}` before it did not" if unfinished else ""
    return f"nothing to resume: `{runs[-1].command}` finished{earlier}"


@contextmanager
def _alone(unfinished: list[Run], not_running: bool) -> Iterator[int]:
    """Hold the lock, whose descriptor it yields, where no process of the workflow lives here."""
    lock, unseen = _open("lock"), [run for run in unfinished if run.host != platform.node()]
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(_tell_living(unfinished)) from None
        except OSError:  # a file system without locks
            unseen = unfinished
        if unseen and not not_running:
            run = unseen[-1]
            raise UserError(
                f"`{run.command}` was started as process {run.process} on {run.host}, and whether "
                "it still runs cannot be seen from here: look there, stop it if need be, and then "
                "give `fairway resume --not-running`"
            )
        yield lock
    finally:
        os.close(lock)


def _tell_living(unfinished: list[Run]) -> str:
    import psutil

    for run in (run for run in unfinished if run.host == platform.node()):
        with suppress(psutil.Error):
            if any("snakemake" in word for word in psutil.Process(run.process).cmdline()):
                return (
                    f"process {run.process} is still running `{run.command}` here: wait for it, or "
                    f"stop it with `kill {run.process}`, and resume then"
                )
    return (
        f"a Snakemake process is at work in {Path.cwd()}: wait for it or stop it, and resume then"
    )


def _stop_left_behind(runs: list[Run]) -> None:
    """Stop what killed Snakemakes have started: train writes a checkpoint, others' work is lost."""
    import psutil

    marks = {run.mark for run in runs}
    left = [
        process
        for process in psutil.process_iter(["environ"], ad_value={})
        if process.info["environ"].get(MARK) in marks
    ]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            # One that is stopped would take the signal only when it goes on.
            stopped = process.status() == psutil.STATUS_STOPPED
            process.kill() if stopped else process.terminate()
    for process in psutil.wait_procs(left, timeout=STOP_SECONDS)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if left:
        numbers = ", ".join(str(process.pid) for process in left)
        print(f"stopped what the killed run had left running: processes {numbers}", flush=True)


def _become_snakemake(run: Run, lock: int) -> None:
    os.set_inheritable(lock, True)
    arguments = run.arguments_to_resume()
    print(f"resuming: {shlex.join(['snakemake', *arguments])}", flush=True)
    os.chdir(run.folder)
    # -P: or modules in the folder would be found before Snakemake's.
    words = [sys.executable, "-P", "-m", "snakemake", *arguments]
    os.execve(sys.executable, words, {**os.environ, RESUMED: f"{lock}:{run.mark}"})


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `fairway resume`."""
    parser.add_argument(
        "--directory", type=Path, default=Path(), help="folder that the workflow works in"
    )
    parser.add_argument(
        "--not-running",
        action="store_true",
        help="nothing runs any more of what was started on another machine",
    )


def run(parsed: argparse.Namespace) -> int:
    """`fairway resume`: exit status 0 where there is nothing to do; else Snakemake's."""
    if not parsed.directory.is_dir():
        raise UserError(f"--directory {parsed.directory}: there is no such folder")
    os.chdir(parsed.directory)
    print(resume(not_running=parsed.not_running))
    return 0


if __name__ == "__main__":  # where only the workflow is installed: no PyTorch, so no `fairway`
    options = argparse.ArgumentParser(prog="python -m fairway.resume")
    add_options(options)
    try:
        sys.exit(run(options.parse_args()))
    except UserError as error:
        sys.exit(f"fairway: {error}")
