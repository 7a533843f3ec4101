"""Real scripts that are frozen, or lack memory or disk: one line, and nothing of others is lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from checkouts import COMMAND, RESULTS, SEED, make_project
from fairway.stages import STAGES, stages_of_a_run
from runs import Call, calls
from tiny import ROOT, SCRIPTS
from trainings import run_here
from warm_python import warm_python

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

NAMES = [stage.name for stage in stages_of_a_run()]

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
# Lets no file grow beyond 400 bytes.
FULL = """
import resource, runpy, sys

resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Says which process it is, and stops itself right before it renames a file to this name.
FREEZE = """
import os, runpy, signal, sys

def watch(event, arguments):
    if event == "os.rename" and os.path.basename(arguments[1]) == wanted:
        os.kill(os.getpid(), signal.SIGSTOP)

wanted, sys.argv = sys.argv[1], sys.argv[2:]
print(os.getpid(), flush=True)
sys.addaudithook(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Gives itself no more address space than it has after its imports, and a little.
LIMIT = """
import resource, runpy, sys

spare, sys.argv = int(sys.argv[1]), sys.argv[2:]
runpy.run_path(sys.argv[0])
from fairway.recipe import load_config
load_config([sys.argv[sys.argv.index("--config") + 1]])
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + spare
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def scripts(tiny_run, tiny_dataset, tmp_path) -> dict[str, Call]:
    """The calls of all stages of a finished run, to be worked on."""
    config = tiny_run.parents[1] / "tiny.yaml"
    run, data = tmp_path / "results/tiny", tmp_path / "results/data/tiny"
    shutil.copytree(tiny_run, run)
    shutil.copytree(tiny_dataset.parent, data)
    tokenize = Call(STAGES["tokenize"], ("--config", str(config)), (), data)
    return {call.stage.name: call for call in (tokenize, *calls(config, data, run))}


def start(python: str, code: str, first: object, call: Call) -> subprocess.Popen:
    command = [python, "-c", code, str(first), str(SCRIPTS / call.stage.script), *call.arguments]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, **output)


def files(call: Call) -> dict[Path, tuple[int, bytes]]:
    """Everything beside and in the stage's folder: when it was written, and its content."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in call.output.parent.rglob("*")
    }


def one_line(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "Traceback" not in output, output
    assert sum(line.startswith("error: ") for line in output.splitlines()) == 1, output
    return output.splitlines()[-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_script_that_was_taken_over_writes_nothing(name, scripts, capsys):
    call = scripts[name]
    (call.output / "metrics.json").unlink()  # or train would say that it is finished
    started = start(warm_python(), FREEZE, call.stage.products[-1], call)
    frozen = psutil.Process(int(started.stdout.readline()))
    while frozen.status() != psutil.STATUS_STOPPED:
        assert started.poll() is None
        time.sleep(0.01)
    run_here(call.stage.script, *call.arguments)
    assert f"process {frozen.pid} is stopped and is taken over" in capsys.readouterr().err
    written = files(call)
    assert not [path for path in written if path.name.startswith(".") and path.is_file()]
    frozen.resume()
    assert one_line(started).startswith("error: another process has taken over ")
    assert files(call) == written


@pytest.mark.parametrize("name", NAMES)
def test_too_little_memory_is_one_line(name, scripts):
    call = scripts[name]
    (call.output / "metrics.json").unlink()
    process = start(sys.executable, LIMIT, 8 << 20, call)
    output = process.communicate(timeout=120)[1]
    assert "Traceback" not in output, output
    if process.returncode == 1:
        last = output.splitlines()[-1]
        assert last.startswith("error: there is too little memory or no thread to be had (")
        assert all(key in last for key in call.stage.memory)
    else:  # a library in Rust or C++ ends the process itself
        assert process.returncode in (0, 127, -signal.SIGABRT, -signal.SIGSEGV), output


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_line(name, scripts):
    call = scripts[name]
    (call.output / "metrics.json").unlink()
    line = one_line(start(warm_python(), FULL, "", call))
    assert "could not be written (" in line and "File too large" in line


@pytest.mark.parametrize("name", ["train", "ttt"])
def test_the_loss_of_a_process_is_one_line(name, scripts, tmp_path):
    long = tmp_path / "long.json"
    long.write_text('{"train": {"max_steps": 100000}, "ttt": {"epochs": 100000}}')
    call = scripts[name]
    (call.output / "metrics.json").unlink()
    options = list(call.arguments)
    options.insert(options.index("--config") + 2, str(long))
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             str(SCRIPTS / call.stage.script), *options],
            env=ENVIRONMENT, stdout=file, stderr=file,
        )  # fmt: skip
    while f"{name}: 2" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert process.wait(timeout=120) == 1
    errors = [line for line in log.read_text().splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "another process of this stage is gone (" in errors[0]
    assert all(key in errors[0] for key in call.stage.memory)


def test_a_stage_that_the_system_kills_has_its_line_in_the_log(tmp_path):
    folder = make_project(tmp_path / "project", train={"max_steps": 100_000})
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [*COMMAND, "train"], cwd=folder, env=ENVIRONMENT, stdout=output, stderr=output
        )
    log = folder / RESULTS / f"logs/seed-{SEED}/shared/train.log"
    while not log.exists() or "train: " not in log.read_text():
        assert process.poll() is None
        time.sleep(0.1)
    (lock,) = (folder / RESULTS).glob(f"seed-{SEED}/shared/.train.lock")
    os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    line = log.read_text().splitlines()[-1]
    assert line.startswith("error: train was killed, most likely by the system for its memory: ")
    assert "lower train.micro_batch_sequences or model.width, or " in line
    assert line in (folder / "output.txt").read_text()  # --show-failed-logs
