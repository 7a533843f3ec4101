"""Kill the workflow, start it again: what is finished stays, training goes on to the same bytes."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from checkouts import COMMAND, ENVIRONMENT, RESULTS, SEED, make_project, parse_jobs, snakemake
from fairway.claims import claimed
from fairway.files import sha256_of

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

# Long enough to be caught in the middle, with checkpoints to be caught between.
TRAIN = {"max_steps": 600, "warmdown_steps": 300, "checkpoint_seconds": 0.25}
SHARED = f"{RESULTS}/seed-{SEED}/shared"
CHECKPOINTS = f"{SHARED}/.checkpoints/train"
LOG = f"{RESULTS}/logs/seed-{SEED}/shared/train.log"
PRODUCTS = ("weights.safetensors", "averages.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The bytes that every resumed training must arrive at."""
    folder = make_project(tmp_path_factory.mktemp("uninterrupted") / "project", train=TRAIN)
    snakemake(folder, "train")
    return products(folder)


def products(folder: Path) -> list[str]:
    return [sha256_of(folder / SHARED / "train" / name) for name in PRODUCTS]


@pytest.fixture
def caught(tmp_path):
    """A project and its Snakemake, leader of its process group, in the middle of train."""
    folder = make_project(tmp_path / "project", train=TRAIN)
    process = start(folder, "train")
    wait_for(lambda: len(list((folder / CHECKPOINTS).glob("*/step-*"))) == 2, process)
    yield folder, process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [*COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, start_new_session=True,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def resume(folder: Path, *targets: str) -> set[str]:
    """The documented commands (`make resume`); returns the jobs that they ran."""
    snakemake(folder, "--unlock")
    return parse_jobs(snakemake(folder, *targets).stderr)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_same_bytes(caught, uninterrupted, number):
    folder, process = caught
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) != 0
    with claimed(folder / CHECKPOINTS):  # Snakemake may be gone before its training is
        stopped_after = last_checkpoint(folder)
    assert not (folder / SHARED / "train/weights.safetensors").exists()
    if number != signal.SIGKILL:
        # The signal's own checkpoint: training ended with it.
        assert f"train: {stopped_after}/{TRAIN['max_steps']} step" in (folder / LOG).read_text()
    assert resume(folder, "train") == {f"train {SEED} shared"}
    assert resumed_after(folder) == stopped_after
    assert products(folder) == uninterrupted


def last_checkpoint(folder: Path) -> int:
    return max(int(path.name[5:]) for path in (folder / CHECKPOINTS).glob("*/step-*"))


def resumed_after(folder: Path) -> int:
    found = re.search(r"^resumed after step (\d+)$", (folder / LOG).read_text(), re.MULTILINE)
    assert found, (folder / LOG).read_text()
    return int(found[1])


def test_a_restart_cannot_collide_with_an_orphan(caught, uninterrupted):
    """Snakemake alone is killed: its training goes on, and the restarted one waits for it."""
    folder, process = caught
    process.kill()
    process.wait()
    assert resume(folder, "train") == {f"train {SEED} shared"}
    assert products(folder) == uninterrupted
    assert not list((folder / CHECKPOINTS).glob("*/step-*"))


def test_an_orphan_that_is_told_to_stop_hands_over(caught, uninterrupted):
    folder, process = caught
    process.kill()
    process.wait()
    snakemake(folder, "--unlock")
    restarted = start(folder, "train")
    wait_for(lambda: (folder / "output.txt").read_text().count("Job "), restarted)
    os.killpg(process.pid, signal.SIGTERM)
    assert restarted.wait(timeout=120) == 0, (folder / "output.txt").read_text()
    assert resumed_after(folder) > 0
    assert products(folder) == uninterrupted


def test_a_run_killed_in_a_later_stage_redoes_no_finished_one(tmp_path):
    folder = make_project(tmp_path / "project")
    process = start(folder)
    log = folder / RESULTS / f"logs/seed-{SEED}/shared/slot_eval.log"
    wait_for(log.exists, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = finished_jobs((folder / "output.txt").read_text())
    assert {
        "tokenize",
        f"train {SEED} shared",
        f"ema {SEED} shared",
        f"gptq {SEED} shared",
    } <= finished
    jobs = resume(folder)
    assert {f"slot_eval {SEED} shared", f"audit {SEED} shared", "report"} <= jobs
    assert not jobs & finished
    assert (folder / RESULTS / "report/report.html").exists()


def finished_jobs(output: str) -> set[str]:
    """The jobs that Snakemake itself saw the end of: one killed at its last write is redone."""
    finished = set(re.findall(r"^Finished jobid: (\d+)", output, re.MULTILINE))
    started = re.findall(r"^(Job (\d+): .*)$", output, re.MULTILINE)
    return parse_jobs("\n".join(line for line, number in started if number in finished))
