"""Where a process's seconds go: every second in one phase."""

import json
import subprocess
import sys
import threading
import time

import pytest

from fairway.allot import JOB_STARTED
from fairway.phases import PhaseClock


@pytest.fixture
def clock(monkeypatch) -> PhaseClock:
    """One whose time passes only when `time.perf_counter` is told so, by `clock.wait`."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = PhaseClock(seconds_before=3.0)

    def wait(seconds):
        now[0] += seconds

    clock.wait = wait
    return clock


def test_all_is_start_until_the_work_begins(clock):
    clock.wait(2)
    clock.begin_work()
    clock.wait(5)
    assert clock.seconds() == {
        "start": 5, "wait": 0, "read": 0, "compile": 0, "work": 5, "write": 0
    }  # fmt: skip


def test_a_phase_within_another_has_its_seconds_alone(clock):
    @clock.phase("read")
    def read():
        clock.wait(1)

    clock.begin_work()
    with clock.phase("compile"):
        clock.wait(2)
        read()
        clock.wait(4)
    read()
    seconds = clock.seconds()
    assert (seconds["compile"], seconds["read"], seconds["work"]) == (6, 2, 0)


def test_a_phase_ends_where_its_block_fails(clock):
    clock.begin_work()
    with pytest.raises(ZeroDivisionError), clock.phase("write"):
        clock.wait(1)
        _ = 1 / 0
    clock.wait(2)
    assert (clock.seconds()["write"], clock.seconds()["work"]) == (1, 0)


def test_seconds_are_moved_out_of_the_phase_that_runs(clock):
    clock.begin_work()
    clock.wait(5)
    clock.move(2, "compile")
    seconds = clock.seconds()
    assert (seconds["work"], seconds["compile"]) == (3, 2)


def test_threads_that_overlap_lose_no_second(clock):
    clock.begin_work()
    inside, go_on = threading.Event(), threading.Event()

    def write():
        with clock.phase("write"):
            inside.set()
            go_on.wait()

    writer = threading.Thread(target=write)
    with clock.phase("read"):
        clock.wait(1)
        writer.start()
        inside.wait()
        clock.wait(2)
    clock.wait(4)
    go_on.set()
    writer.join()
    clock.wait(8)
    seconds = clock.seconds()
    assert seconds["read"] == 1 and seconds["write"] == 6 and seconds["work"] == 8


def test_the_next_stage_of_a_process_starts_anew(clock):
    clock.begin_work()
    clock.wait(5)
    clock.seconds()
    clock.wait(1)
    clock.begin_work()
    clock.wait(2)
    seconds = clock.seconds()
    assert (seconds["start"], seconds["work"]) == (1, 2)


@pytest.mark.parametrize("ago", [0.0, 1000.0])
def test_a_job_starts_when_its_gpus_were_there_or_with_its_process(ago):
    code = "import json; from fairway.phases import CLOCK; print(json.dumps(CLOCK.seconds()))"
    environment = {JOB_STARTED: str(time.time() - ago)} if ago else {}
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", f"import time; time.sleep(0.2); {code}"],
        env=environment | {"PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    start = json.loads(done.stdout)["start"]
    assert 0.2 <= start - ago <= time.time() - began + 0.1
