"""The profile for Slurm, on a cluster of real daemons; skipped where they are not installed."""

import re
import signal
import subprocess
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest

from checkouts import COMMAND, ENVIRONMENT, RESULTS, SEED, change_config, make_project, snakemake
from slurm_cluster import PACKAGES, ask, missing_programs, slurm_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.skipif(bool(missing_programs()), reason=f"no Slurm here: {PACKAGES}"),
    pytest.mark.skipif(
        find_spec("snakemake_executor_plugin_slurm") is None, reason="needs the `slurm` extra"
    ),
]

TRAIN = f"{RESULTS}/logs/seed-{SEED}/shared/train.log"
# This cluster keeps no accounts; the first look at a job's state follows soon.
ON_THE_CLUSTER = (
    "--workflow-profile", "slurm",
    "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "1",
)  # fmt: skip
GROUPED = ("--groups", "run_ema=small", "run_ttt=small")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which Slurm's programs find the cluster."""
    with ExitStack() as started:
        folder = tmp_path_factory.mktemp("slurm")
        try:
            yield started.enter_context(slurm_cluster(folder, environment=ENVIRONMENT))
        except TimeoutError as error:
            pytest.skip(f"Slurm's daemons do not start here: {error}")


@pytest.fixture
def project(tmp_path) -> Path:
    """A project with its dataset."""
    folder = make_project(tmp_path / "project")
    snakemake(folder, "tokenize")
    return folder


@pytest.fixture
def start(cluster, project):
    """Starts Snakemake; its output goes to a file."""
    running = []

    def call(*arguments: str):
        log = project / "output.txt"
        with log.open("w") as output:
            running.append(
                subprocess.Popen(
                    [*COMMAND[:3], *arguments, *COMMAND[-3:], *ON_THE_CLUSTER],
                    cwd=project, env=cluster, stdout=output, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        return running[-1]

    yield call
    for process in running:
        process.kill()
        process.wait()
    print((project / "output.txt").read_text())


def jobs(cluster) -> dict[str, dict[str, str]]:
    """Number → what Slurm says of each job that it remembers."""
    shown = ask(cluster, "scontrol", "--oneliner", "show", "job")
    found = (dict(re.findall(r"(\S+?)=(\S*)", line)) for line in shown.splitlines())
    return {job["JobId"]: job for job in found if "JobId" in job}


def wait_until(holds, seconds: float, process=None):
    """What `holds` returns once that is true."""
    until = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < until, "nothing came of it"
        assert process is None or process.poll() is None, "Snakemake has ended"
        time.sleep(0.5)
    return found


def steps(project) -> int:
    """The training's last step in its log."""
    log = project / TRAIN
    return max(map(int, re.findall(r"(\d+)/20000 step", log.read_text())), default=0)


def resumed(project) -> int:
    """The step after which the training goes on; 0 where it has begun anew."""
    found = re.search(r"resumed after step (\d+)", (project / TRAIN).read_text())
    return int(found[1]) if found else 0


def test_a_training_over_its_time_and_a_cancelled_one_go_on_from_their_checkpoints(
    cluster, project, start
):
    change_config(project, {"train": {"max_steps": 20_000, "max_seconds": 60}})
    (project / TRAIN).parent.mkdir(parents=True)
    (project / TRAIN).touch()
    run = start("ttt", *GROUPED)

    wait_until(lambda: steps(project), 240, run)
    (first,) = jobs(cluster)
    ask(cluster, "scontrol", "update", f"JobId={first}", "EndTime=now+100")
    wait_until(lambda: resumed(project), 240, run)
    assert jobs(cluster)[first]["JobState"] == "FAILED"  # by itself: it is no TIMEOUT

    after = resumed(project)
    wait_until(lambda: steps(project) > after, 120, run)
    (second,) = jobs(cluster).keys() - {first}
    ask(cluster, "scancel", second)
    wait_until(lambda: resumed(project) > after, 240, run)
    assert jobs(cluster)[second]["JobState"] == "CANCELLED"
    (third,) = jobs(cluster).keys() - {first, second}
    asked = [megabytes(jobs(cluster)[number]) for number in (first, second, third)]
    assert asked == pytest.approx([asked[0], 2 * asked[0], 3 * asked[0]], abs=2)

    assert run.wait(600) == 0
    for folder in ("shared", "leaky"):
        assert (project / f"{RESULTS}/seed-{SEED}/{folder}/ttt/provenance.json").exists()
    (grouped,) = (jobs(cluster)[number] for number in jobs(cluster).keys() - {first, second, third})
    assert grouped["NumNodes"] == "1" and megabytes(grouped) == asked[0]  # one at a time


def megabytes(job: dict[str, str]) -> int:
    return int(job["MinMemoryNode"].removesuffix("M"))


def test_sigterm_ends_snakemake_and_takes_its_jobs_out_of_the_queue(cluster, project, start):
    change_config(project, {"runtime": {"device": "cuda"}, "gpus": {"machine": 2}})
    node, before = ask(cluster, "sinfo", "-h", "-o", "%n"), jobs(cluster).keys()
    ask(cluster, "scontrol", "update", f"NodeName={node}", "State=drain", "Reason=test")
    try:
        run = start("train")
        (number,) = wait_until(lambda: jobs(cluster).keys() - before, 120, run)
        waiting = jobs(cluster)[number]
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 1
    finally:
        ask(cluster, "scontrol", "update", f"NodeName={node}", "State=resume")
    assert jobs(cluster)[number]["JobState"] == "CANCELLED"
    assert "fairway resume" in (project / "output.txt").read_text()
    # What a training on two GPUs had asked for.
    assert (waiting["JobState"], waiting["TresPerJob"]) == ("PENDING", "gres:gpu:2")
    assert (waiting["NumNodes"], waiting["CPUs/Task"]) == ("1-1", "8")
    assert megabytes(waiting) > 16_000
