"""`fairway resume`: exactly the run that was killed goes on, and none that lives is disturbed."""

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from checkouts import (
    COMMAND,
    ENVIRONMENT,
    RESULTS,
    SEED,
    from_stage,
    make_project,
    parse_jobs,
    snakemake,
)
from fairway import resume
from fairway.cli import main
from fairway.stages import STAGES, stages_of_a_run

RUNS = Path(".snakemake/fairway/runs.json")
EMA = f"{RESULTS}/seed-{SEED}/shared/ema"


# --- what is resumed, with Snakemake's place taken ----------------------------------------------


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Notes a run in a folder that is current then."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(resume.MARK, "")  # to be restored

    def start(*arguments: str, forced: bool = False, finished: bool = False) -> None:
        mark = resume.note_start(arguments, ".", forced=forced, resumed=None)
        if finished:
            resume.note_finish(mark)

    return start


@pytest.fixture
def resumed(monkeypatch, capsys):
    """Resumes; returns the exit status, what was told, and the arguments of Snakemake, if any."""

    class Become(Exception):
        pass

    def execve(program, words, environment):
        raise Become(words[words.index("snakemake") + 1 :])

    monkeypatch.setattr(os, "execve", execve)

    def call(*options: str) -> tuple[int, str, list[str] | None]:
        try:
            status, arguments = main(["resume", *options]), None
        except Become as become:
            status, arguments = 0, become.args[0]
        printed = capsys.readouterr()
        return status, printed.out + printed.err, arguments

    return call


@pytest.mark.parametrize(
    ("arguments", "forced", "expected"),
    [
        (["--cores", "2"], False, ["--cores", "2", "--rerun-incomplete"]),
        (
            ["ttt", "--configfile", "a b.yaml", "--config", "seeds=[1, 2]"],
            False,
            ["ttt", "--configfile", "a b.yaml", "--config", "seeds=[1, 2]", "--rerun-incomplete"],
        ),
        (
            ["--configfile", "mine.yaml", "--", "ttt"],
            False,
            ["--configfile", "mine.yaml", "--rerun-incomplete", "--", "ttt"],
        ),
        (
            ["-F", "ttt", "--force", "-R", "ema"],
            True,
            ["ttt", "-R", "ema", "--rerun-incomplete", "--forcerun"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_the_command_is_given_again_and_forces_nothing(
    started, resumed, arguments, forced, expected
):
    started(*arguments, forced=forced)
    told = f"resuming: {shlex.join(['snakemake', *expected])}\n"
    assert resumed() == (0, told, expected)


def test_a_job_knows_what_was_typed(started, monkeypatch):
    started("--config", "run=a b")
    started("--config", "run=other", finished=True)
    mark = os.environ[resume.MARK]
    assert resume.typed_command() == "snakemake --config run=other"
    started("--config", "run=third")
    assert resume.typed_command() == "snakemake --config run=third"
    for gone in (mark, ""):
        monkeypatch.setenv(resume.MARK, gone)
        assert resume.typed_command() is None


def test_the_last_run_is_resumed_unless_it_finished(started, resumed):
    started("--config", "run=first")
    started("--config", "run=second")
    assert resumed()[2][1] == "run=second"
    started("--config", "run=second", finished=True)
    status, told, arguments = resumed()
    assert (status, arguments) == (0, None)
    assert "`snakemake --config run=second` finished" in told
    assert "`snakemake --config run=first` before it did not" in told


def test_a_resumed_run_stands_for_the_one_that_was_killed(started, monkeypatch):
    started("ttt")
    (run,) = resume.read_runs()
    monkeypatch.setenv(resume.RESUMED, f":{run.mark}")
    mark = resume.note_start(["ttt", "-R"], ".", forced=False, resumed=resume.share_folder())
    assert [run.mark for run in resume.read_runs()] == [mark]


def test_a_run_that_lives_is_left_alone(started, resumed):
    started("ttt")
    locks = Path(".snakemake/locks")
    locks.mkdir()
    resume.share_folder()  # as Snakemake does, until it ends
    status, told, arguments = resumed()
    assert (status, arguments) == (2, None) and locks.exists()
    assert "wait for it or stop it" in told and told.count("\n") == 1


def test_a_run_of_another_machine_is_resumed_only_on_the_users_word(started, resumed, monkeypatch):
    started("ttt")
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    status, told, arguments = resumed()
    assert (status, arguments) == (2, None)
    assert f"process {os.getpid()} on " in told and "`fairway resume --not-running`" in told
    assert resumed("--not-running")[2] == ["ttt", "--rerun-incomplete"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no job of a run has started in"), ('[{"arguments": 3}]', "runs.json is damaged")],
)
def test_where_nothing_can_be_resumed_that_is_said(started, resumed, content, message):
    if content is not None:
        RUNS.parent.mkdir(parents=True)
        RUNS.write_text(content)
    status, told, arguments = resumed()
    assert (status, arguments) == (2, None) and message in told and told.count("\n") == 1


# --- what is noted ------------------------------------------------------------------------------


def test_a_dry_run_notes_nothing(empty, dry_runs):
    assert dry_runs.jobs(empty, "ttt")
    assert not (empty / RUNS).exists()


@pytest.mark.slow
def test_a_failed_stages_line_and_how_to_go_on_come_last(tmp_path):
    project = make_project(tmp_path / "project", data={"vocab_size": 5000})
    shell = {**ENVIRONMENT, "PATH": "/usr/bin:/bin"}  # where there is no `fairway`
    done = subprocess.run(
        [*COMMAND, "tokenize"], cwd=project, env=shell, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    error, command = last_lines(done.stderr)
    assert "data.vocab_size" in error
    (run,) = json.loads((project / RUNS).read_text())
    assert run["arguments"][-1] == "tokenize" and not run["finished"]
    # What is told can be typed.
    again = subprocess.run(
        command, shell=True, cwd=project, env=shell, capture_output=True, text=True, check=False
    )
    assert again.stdout.startswith("resuming: snakemake ")
    assert last_lines(again.stderr) == (error, command)
    (tmp_path / "fairway").symlink_to(Path(sys.executable).with_name("fairway"))
    done = snakemake(project, "tokenize", check=False, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert last_lines(done.stderr) == (error, "fairway resume")


def last_lines(output: str) -> tuple[str, str]:
    """The stage's error, and the command that goes on."""
    end = "\n".join(output.splitlines()[-8:])
    error = re.search("tokenize_tiny.log: error: .*", end)
    return error[0], re.search("To go on with what is left: (.*)", end)[1]


# --- for real -----------------------------------------------------------------------------------

SAME_BYTES = (
    "*.bin", "*.model", "*.safetensors", "layers.parquet", "tokens.parquet", "reach.parquet"
)  # fmt: skip
"""Products without seconds in them."""


def start(folder: Path, *command: str) -> subprocess.Popen:
    """A command in a session of its own, as in a terminal.

    Tests that a shell started in the background ignore SIGINT, and so would what they start.
    """
    return subprocess.Popen(
        command, cwd=folder, start_new_session=True, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def await_stage(run: subprocess.Popen, stage: str) -> None:
    """Return once the script of `stage` works under `run`."""
    script = f"/workflow/scripts/{STAGES[stage].script}"
    while run.poll() is None:
        for child in psutil.Process(run.pid).children(recursive=True):
            with suppress(psutil.Error):
                if any(word.endswith(script) for word in child.cmdline()):
                    return
        time.sleep(0.01)
    pytest.fail(f"the run ended before {stage}: {run.stdout.read()}")


def products(folder: Path) -> dict[str, bytes]:
    results = folder / "results"
    return {
        str(path.relative_to(results)): path.read_bytes()
        for pattern in SAME_BYTES
        for path in results.rglob(pattern)
        if ".checkpoints" not in path.parts
    }


def set_ahead(folder: Path) -> None:
    """As if all that is there had been written while the clock was a day ahead."""
    later = time.time() + 86_400
    for path in folder.rglob("*"):
        if ".snakemake" not in path.parts:
            os.utime(path, (later, later), follow_symlinks=False)


@pytest.fixture
def environment(project) -> Path:
    """The project with the environment that `make` takes, ready."""
    (project / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != "ready":
            (project / ".venv" / path.name).symlink_to(path)
    (project / ".venv/ready").touch()
    return project


@pytest.mark.slow
def test_make_resume_goes_on_after_a_kill_and_a_clock_that_was_ahead(environment, finished):
    """In a folder with a space, a quote and letters that are not Latin."""
    shutil.rmtree(environment / EMA)
    run = start(environment, *COMMAND, f"{EMA}/weights.safetensors")
    await_stage(run, "ema")
    run.kill()
    set_ahead(environment)
    done = start(environment, "make", "resume")
    output = done.communicate()[0]
    assert done.returncode == 0, output
    assert "stopped what the killed run had left running: processes" in output
    assert "had times in the future" in output
    assert parse_jobs(output) == {f"ema {SEED} shared"}
    assert products(environment) == products(finished)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_that_is_stopped_in_every_stage_ends_in_the_same_bytes(finished, tmp_path):
    """By Ctrl-C and by a kill in turn."""
    project = make_project(tmp_path / "project", variants={"leaky": None})
    command, jobs = COMMAND, []
    stages = [stage.name for stage in stages_of_a_run()]
    for number, stage in enumerate(stages):
        run = start(project, *command)
        await_stage(run, stage)
        if number % 2:
            run.kill()
        else:  # as Ctrl-C and a closed terminal send it
            os.killpg(run.pid, signal.SIGINT)
        output = run.communicate()[0]
        assert run.returncode != 0
        jobs.append(parse_jobs(output))
        command = (sys.executable, "-m", "fairway.cli", "resume")
    run = start(project, *command)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    expected = products(finished)
    assert products(project) == {name: expected[name] for name in expected if "leaky" not in name}
    # Each start did what was left, from the stage on that the one before was stopped in.
    for stage, done in zip(stages, [*jobs[1:], parse_jobs(output)], strict=True):
        assert {job.split()[0] for job in done} <= set(from_stage(stage).split())
