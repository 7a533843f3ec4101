"""Who may change a folder: waiting, taking over, and what one that was taken over still does."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fairway.claims import claimed, remove
from fairway.errors import UserError
from fairway.files import atomic_folder, atomic_path, write_json

PRODUCTS = ("product.json", "step-1/state.json", "step-2/state.json", "voucher.json")
OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")
HOLDER = """
import sys, time
from fairway.claims import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def write(folder: Path, who: str) -> None:
    for name in PRODUCTS:
        write_json(folder / name, who)


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in files}


@pytest.fixture
def folder(tmp_path):
    """A folder with an older run's files."""
    made = tmp_path / "stage"
    write(made, "older")
    return made


def forked(work: Callable[[], object]) -> int:
    """Do `work` in a process of its own, whose exit status is 1 after a UserError."""
    process = os.fork()
    if process == 0:
        status = 2
        try:
            work()
            status = 0
        except UserError as error:
            status = 1 if "has taken over" in str(error) else 3
        finally:
            os._exit(status)
    return process


def work_and_stop(folder: Path, number: int, at: int) -> None:
    """Change all kinds of things in `folder`; a signal comes right before a file operation."""
    done = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal done
        done += event in OPERATIONS
        if event in OPERATIONS and done == at:
            os.kill(os.getpid(), number)

    with claimed(folder, "voucher.json"):
        sys.addaudithook(watch)
        write_json(folder / "product.json", "frozen")
        remove(folder / "step-1")
        with atomic_folder(folder / "step-2") as step:
            write_json(step / "state.json", "frozen")
        write_json(folder / "voucher.json", "frozen")


def hidden(folder: Path) -> list[Path]:
    return [*folder.parent.glob(".*"), *folder.rglob(".*")]


@pytest.mark.slow  # half a hundred processes
def test_a_process_frozen_anywhere_changes_nothing_once_another_took_over(folder, capsys):
    statuses = []
    for at in range(1, 200):
        process = forked(lambda at=at: work_and_stop(folder, signal.SIGSTOP, at))
        if not os.WIFSTOPPED(os.waitpid(process, os.WUNTRACED)[1]):
            break
        with claimed(folder, "voucher.json"):
            write(folder, "later")
        assert f"process {process} is stopped" in capsys.readouterr().err
        os.kill(process, signal.SIGCONT)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        assert content(folder) == dict.fromkeys(PRODUCTS, "later"), at
        assert not hidden(folder), at
    # All but the last operations, after the last product, were too late for it.
    assert len(statuses) > 40 and statuses.count(1) >= len(statuses) - 3, statuses
    assert set(statuses) <= {0, 1}


@pytest.mark.slow  # half a hundred processes
def test_a_process_killed_anywhere_leaves_whole_files_and_its_rest_is_swept(folder):
    for at in range(1, 200):
        write(folder, "older")
        process = forked(lambda at=at: work_and_stop(folder, signal.SIGKILL, at))
        if not os.WIFSIGNALED(os.waitpid(process, 0)[1]):
            break
        with claimed(folder):
            found = content(folder)
        assert set(found.values()) <= {"older", "frozen"}, at
        assert "product.json" in found and not hidden(folder), at
        if found.get("voucher.json") == "older":
            assert set(found.values()) == {"older"} and set(found) == set(PRODUCTS), at
    assert at > 40


def test_only_the_temporary_files_of_this_folder_are_swept(tmp_path):
    for name in ("stage", "other"):
        for kept in (".gitkeep", ".snakemake_timestamp", "x.partial", "figures/.x.json.a1.partial"):
            (tmp_path / name / kept).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / kept).write_text("")
        (tmp_path / name / ".step-1.a1.partial").mkdir()
    with claimed(tmp_path / "stage"):
        pass
    names = {path.name for path in (tmp_path / "stage").rglob("*")}
    assert names == {".gitkeep", ".snakemake_timestamp", "x.partial", "figures"}
    assert len(list((tmp_path / "other").rglob("*"))) == 6


def hold(folder: Path, seconds: float) -> subprocess.Popen:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(seconds)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_running_process_is_waited_for(folder, capsys):
    holder = hold(folder, 1.0)
    with claimed(folder):
        assert holder.wait(timeout=1) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"waiting for process {holder.pid} on ") and "SIGTERM" in line


def test_a_killed_process_is_not_waited_for(folder, capsys):
    holder = hold(folder, 60)
    holder.kill()
    holder.wait()
    with claimed(folder):
        pass
    assert capsys.readouterr().err == ""


def test_a_process_that_hangs_is_taken_over_by_removing_its_lock(folder):
    holder = hold(folder, 1.0)
    (folder.parent / ".stage.lock").unlink()
    started = time.monotonic()
    with claimed(folder):
        assert time.monotonic() - started < 0.5 and holder.poll() is None
        holder.wait()
        write(folder, "later")  # its end leaves this claim alone


def test_without_locks_in_the_file_system_whoever_comes_last_takes_over(folder, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="has taken over"), claimed(folder):
        with claimed(folder):
            pass
        write(folder, "frozen")
    assert set(content(folder).values()) == {"older"}


def test_a_block_that_fails_changes_nothing(folder):
    with (
        pytest.raises(ZeroDivisionError),
        claimed(folder, "voucher.json"),
        atomic_path(folder / "product.json") as path,
    ):
        path.write_text(str(1 // 0))
    assert content(folder) == dict.fromkeys(PRODUCTS, "older")
    assert not hidden(folder)


@pytest.mark.parametrize("path", ["file", "file/folder", "file/folder/below", "x" * 255])
def test_what_can_be_no_folder_is_refused_at_once(tmp_path, path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="choose another `results` folder"),
        claimed(tmp_path / path),
    ):
        raise AssertionError("it must not start")
