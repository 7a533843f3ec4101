"""Jobs get GPUs of their own: no GPU serves two of them, and one that dies frees its own."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fairway.allot import WANTED
from fairway.errors import UserError
from fairway.gpus import GpuSettings
from fairway.stage import take_gpus
from tiny import ROOT

JOB = """
import os, sys, time
from pathlib import Path
from fairway.allot import take_wanted
Path(sys.argv[1] + "loaded").touch()
take_wanted()
rank = os.environ.get("RANK", "0")
Path(sys.argv[1] + rank).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
while sys.argv[2:] and not Path(sys.argv[2]).exists():
    time.sleep(0.02)
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine on which nvidia-smi shows two GPUs; starts jobs on it."""
    show = tmp_path / "nvidia-smi"
    show.write_text("#!/bin/sh\necho '0, GPU-aa'\necho '1, GPU-bb'\n", encoding="utf-8")
    show.chmod(0o755)
    (tmp_path / "job.py").write_text(JOB, encoding="utf-8")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    running = []

    def start(count, *arguments):
        command = [sys.executable, "-m", "fairway.allot", count, "job.py", *arguments]
        running.append(
            subprocess.Popen(list(map(str, command)), cwd=tmp_path, stderr=subprocess.PIPE)
        )
        return running[-1]

    yield tmp_path, start
    for job in running:
        job.kill()
        job.communicate()


def seen(path, seconds=30):
    """What a job wrote."""
    until = time.monotonic() + seconds
    while not (path.exists() and path.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    return path.read_text()


def test_two_jobs_have_different_gpus_and_a_third_waits_for_one_that_was_killed(machine):
    folder, start = machine
    first = start(1, "a", "never")
    assert seen(folder / "a0") == "0"
    start(1, "b", "never")
    assert seen(folder / "b0") == "1"
    third = start(1, "c")
    assert b"waiting for 1 of the GPUs 0, 1" in third.stderr.readline()
    assert (folder / "cloaded").exists() and not (folder / "c0").exists()
    first.send_signal(signal.SIGKILL)
    assert seen(folder / "c0") == "0"
    assert third.wait() == 0


def test_the_users_choice_counts_and_a_gpu_is_one_by_whatever_name(machine, monkeypatch):
    folder, start = machine
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    start(1, "a", "never")
    assert seen(folder / "a0") == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb,0")
    start(1, "b", "never")
    assert seen(folder / "b0") == "0"


@pytest.mark.slow  # torchrun imports torch, as do its two processes
def test_with_several_every_process_of_torchrun_sees_them_all(machine):
    folder, start = machine
    assert start(2, "a").wait() == 0
    assert [seen(folder / "a0"), seen(folder / "a1")] == ["0,1", "0,1"]


def test_a_job_on_the_cpu_takes_none(machine):
    folder, start = machine
    assert start(0, "a").wait() == 0
    assert seen(folder / "a0") == "unset"
    assert not list(folder.glob("*.lock"))


def test_too_few_are_one_line(machine):
    _, start = machine
    job = start(3, "a")
    assert job.wait() == 1
    (line,) = job.stderr.readlines()
    assert line.startswith(b"error: this job needs 3 of the machine's GPUs, found 2 (0, 1): lower")


def test_a_stage_gets_what_the_section_says():
    settings = GpuSettings(train=4, slot_eval=None)
    counts = {stage: settings.of(stage, 8) for stage in ("train", "ttt", "slot_eval", "gptq")}
    assert counts == {"train": 4, "ttt": 1, "slot_eval": 8, "gptq": 1}
    assert GpuSettings().of("train", 0) == 1
    with pytest.raises(UserError, match=r"gpus\.train: found 4, but a machine has 2"):
        settings.of("train", 2)


def test_cuda_must_not_be_used_before_the_job_has_one_gpu_of_several(monkeypatch):
    monkeypatch.setattr("fairway.stage.cuda_is_running", lambda: True)
    take_gpus()
    monkeypatch.setenv(WANTED, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,8")
    with pytest.raises(UserError, match="among 7, 8: let plugins use it in their functions only"):
        take_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "8")  # the driver has seen what the job will have
    monkeypatch.setattr("fairway.allot.take", lambda count: ["8"])
    take_gpus()
    assert WANTED not in os.environ


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("brief", [False, True])
def test_what_a_stage_imports_ahead_leaves_the_choice_of_gpus_open(machine, brief):
    folder, start = machine
    (folder / "job.py").write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from fairway.model.runtime import import_ahead\n"
        "from fairway.model.settings import RuntimeSettings\n"
        "from fairway.stage import cuda_is_running\n"
        f"import_ahead(RuntimeSettings(device='cuda'), brief={brief})\n"
        "before = torch.cuda.is_available(), cuda_is_running()\n"
        "torch.cuda.init()\n"
        "Path('a0').write_text(repr((*before, cuda_is_running())))\n",
        encoding="utf-8",
    )
    assert start(1).wait() == 0
    assert seen(folder / "a0") == "(True, False, True)"
