"""`fairway watch`: how far a run is, whatever state it is in, and curves handed on to trackers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fairway.claims import claimed
from fairway.cli import main
from fairway.files import write_json
from fairway.recipe import load_config
from fairway.runs import PLAN, plan_of
from fairway.training.curve import CurveFile, read_curve_file
from fairway.watch import look_at, shown
from synthetic_run import QUICKSTART, make_run

SEEDS = (42, 1337)
SETTINGS = {
    "train": {
        "max_steps": 400,
        "max_seconds": 100.0,
        "batch_tokens": 1000,
        "held_out_seconds": 10.0,
    }
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the results of a run whose every stage is finished."""
    root = make_run(tmp_path_factory.mktemp("finished"), SEEDS)
    report = root / "results/quickstart/report"
    report.mkdir()
    (report / "provenance.json").touch()
    return root


@pytest.fixture
def project(finished, tmp_path, monkeypatch):
    """A copy of it, in which the command is given; its plan asks for one more seed."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    write_plan(tmp_path / "results/quickstart", [*SEEDS, 7])
    return tmp_path


def write_plan(run, seeds, folders=QUICKSTART):
    limits = {"artifact_bytes": 600_000, "training_seconds": 600, "evaluation_seconds": 600}
    plan = {
        "seeds": seeds,
        "folders": folders,
        "datasets": dict.fromkeys(folders, "embedded"),
        "budgets": dict.fromkeys(folders, limits),
    }
    write_json(run / PLAN, plan)


@pytest.fixture
def watch(capsys):
    """Gives the command; its exit status and what it printed."""

    def call(*arguments: str) -> tuple[int, str]:
        status = main(["watch", *arguments])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


def row(text: str, *begins: str) -> list[str]:
    """The cells of the one row of a table that begins with these."""
    begin = r"\s+".join(map(re.escape, begins))
    (line,) = re.findall(rf"^ *{begin}  .*$", text, re.MULTILINE)
    return re.split(r"\s{2,}", line.strip())


def curve(seconds, bpb=()):
    """Rows of 10 steps each, at these seconds; the last of them have these held-out bpb."""
    rows = [
        {"step": 10 * n, "loss": 3.0 - n / 10, "lr_scale": 1.0, "seconds": s, "tokens": 10_000 * n}
        for n, s in enumerate(seconds, 1)
    ]
    for one, value in zip(rows[-len(bpb) :], bpb, strict=False):
        one["held_out_bpb"] = value
    return rows


def write_live(stage: Path, rows) -> Path:
    """metrics.jsonl of a training that lies in the folder `stage`."""
    file = CurveFile(stage.parent / ".checkpoints/train/abc/metrics.jsonl", SETTINGS)
    with file.appending(rows):
        pass
    return file.path


def contents(root: Path) -> dict[Path, tuple]:
    return {
        path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in root.rglob("*")
    }


# The table


def test_a_finished_run_is_shown_and_ends_the_watch(project, watch):
    write_plan(project / "results/quickstart", list(SEEDS))
    before = contents(project)
    status, text = watch("quickstart")
    assert status == 0
    assert text.startswith("results/quickstart at ")
    assert "stages 21 finished; report finished" in text
    assert row(text, "seed-42/shared", "finished")[2] == "298/298"
    assert row(text, "42", "leaky")[2:6] == ["7/7", "finished", "34/600", "19/600"]
    assert re.fullmatch(r"63\d,\d{3}/600,000 over", row(text, "42", "leaky")[6])
    held_out = row(text[text.index("Held-out") :], "seed-1337/shared")[1:]
    assert len(held_out) == 3 and all(re.fullmatch(r"\d\.\d{4}", one) for one in held_out)
    assert contents(project) == before


def test_a_run_that_has_not_begun_waits_for_every_seed_and_variant(
    tiny_config_file, tmp_path, monkeypatch, watch
):
    monkeypatch.chdir(tmp_path)
    config = load_config([tiny_config_file])
    write_json(Path("results/tiny") / PLAN, plan_of(config).model_dump(mode="json"))
    text = watch("--once")[1]
    assert "results/tiny at " in text and "stages 11 waiting; report waiting" in text
    for variant in ("causal", "leaky"):
        assert row(text, "7", variant)[2:] == ["0/7", "tokenize waiting", "–", "–", "–"]


def test_a_running_training_tells_speed_time_left_and_held_out_bpb(project, watch):
    stage = project / "results/quickstart/seed-7/shared/train"
    rows = curve([5.0, 10.5, 15.0, 20.25], bpb=[1.5, 1.6])
    path = write_live(stage, rows)
    with path.open("a") as file:
        file.write('{"step": 50, "lo')  # as it is while it is written
    with claimed(stage):
        text = watch("quickstart", "--once")[1]
    # 10,000 tokens take 5.0625 s; the clock has 79.75 s left, the steps 182.
    assert row(text, "seed-7/shared", "running")[2:] == [
        "40/400", "2.6000", "1,975", "01:19", "1.6000",
    ]  # fmt: skip
    held_out = text[text.index("Held-out") :]
    assert row(held_out, "training") == ["training", "0 s", "10 s", "20 s"]
    assert row(held_out, "seed-7/shared") == ["seed-7/shared", "–", "1.5000", "↑ 1.6000"]
    assert row(text, "7", "causal")[2:] == ["1/7", "train running", "20/600", "–", "–"]
    assert row(text, "42", "causal")[3] == "finished"
    assert len(read_curve_file(path, "train").rows) == 4


def test_a_training_by_steps_ends_with_them(project, watch):
    stage = project / "results/quickstart/seed-7/shared/train"
    path = write_live(stage, curve([1.0, 2.0]))
    path.write_text(path.read_text().replace("100.0", "null"))
    text = watch("quickstart", "--once")[1]
    assert row(text, "seed-7/shared", "waiting")[2:] == [
        "20/400", "2.8000", "10,000", "00:38", "–",
    ]  # fmt: skip


def killed_with_a_claim(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    script = f"from fairway.claims import claimed\nwith claimed({str(folder)!r}): print(flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{script}; input()"], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    with process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)


def test_failed_and_killed_stages_are_told_apart(project, watch):
    run = project / "results/quickstart"
    (run / "seed-42/shared/gptq/provenance.json").unlink()
    log = run / "logs/seed-42/shared/gptq.log"
    log.parent.mkdir(parents=True)
    log.write_text("gptq: 3/11\nerror: the artifact does not fit [at all]\n")
    killed_with_a_claim(run / "seed-7/shared/train")
    text = watch("quickstart", "--once")[1]
    assert row(text, "42", "causal")[3] == "gptq failed"
    assert "seed-42/shared/gptq: error: the artifact does not fit [at all]" in text
    assert row(text, "7", "leaky")[3] == "train stopped"
    assert row(text, "1337", "causal")[3] == "finished"
    log.write_text('Traceback (most recent call last):\n  File "x"\nKeyError: 3\n')
    assert "seed-42/shared/gptq: KeyError: 3" in watch("quickstart", "--once")[1]
    log.write_text("gptq: 3/11\n")
    assert row(watch("quickstart", "--once")[1], "42", "causal")[3] == "gptq stopped"


def test_what_builds_on_a_stage_that_runs_again_waits(project, watch):
    with claimed(project / "results/quickstart/seed-42/shared/train"):
        text = watch("quickstart", "--once")[1]
    assert row(text, "42", "leaky")[2:4] == ["1/7", "train running"]
    assert row(text, "1337", "leaky")[2] == "7/7"


def test_a_stage_whose_log_is_new_and_empty_is_starting(project, watch):
    log = project / "results/quickstart/logs/seed-7/shared/train.log"
    log.parent.mkdir(parents=True)
    log.touch()
    assert row(watch("--once")[1], "7", "causal")[3] == "train running"
    os.utime(log, (0, 0))
    assert row(watch("--once")[1], "7", "causal")[3] == "train stopped"


def test_without_a_plan_the_folders_are_shown(project, watch):
    (project / "results/quickstart" / PLAN).unlink()
    text = watch("results/quickstart", "--once")[1]
    assert row(text, "42", "shared")[2:5] == ["6/6", "finished", "34"]
    assert row(text, "42", "leaky")[2:4] == ["4/4", "finished"]


def test_damaged_files_are_told_and_do_not_end_the_watch(project, watch):
    stages = project / "results/quickstart/seed-42/shared"
    (stages / "gptq/metrics.json").write_text("{")
    (stages / "train/metrics.parquet").write_text("no table")
    path = write_live(project / "results/quickstart/seed-7/shared/train", curve([1.0]))
    path.write_text(path.read_text() + "nonsense\n{}\n")
    status, text = watch("quickstart", "--once")
    assert status == 0
    for name in ("gptq/metrics.json", "train/metrics.parquet", "abc/metrics.jsonl"):
        assert f"{name} is damaged" in " ".join(text.split())
    assert row(text, "1337", "causal")[3] == "finished"


def test_of_a_sweep_the_rows_that_matter_fit_the_terminal(project):
    run = project / "results/quickstart"
    own = ("gptq", "slot_eval", "audit")
    folders = {
        f"fraction-{n}": {
            stage: f"fraction-{n}" if stage in own else "shared" for stage in QUICKSTART["causal"]
        }
        for n in range(300)
    }
    write_plan(run, list(SEEDS), folders)
    log = run / "logs/seed-42/fraction-287/gptq.log"
    log.parent.mkdir(parents=True)
    log.write_text("error: no\n")
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with claimed(run / "seed-1337/fraction-211/gptq"), console.file:
        console.print(shown(look_at(run), room=8))
    text = console.export_text()
    assert len(text.splitlines()) < 40
    assert row(text, "1337", "fraction-211")[3] == "gptq running"
    assert row(text, "42", "fraction-287")[3] == "gptq failed"
    assert "and 592 waiting more" in text


def test_a_run_that_is_not_there_is_refused_with_the_nearest_name(project, watch):
    status, text = watch("quikstart", "--once")
    assert status == 2
    assert text == (
        "fairway: no run 'quikstart': expected a folder such as results/quickstart, or its name "
        "under results, which has quickstart; did you mean quickstart?\n"
    )
    shutil.rmtree("results")
    assert "no run under results: start one with `snakemake" in watch("--once")[1]


def test_the_run_that_was_started_last_is_the_default(project, watch):
    shutil.copytree("results/quickstart", "results/other")
    for name, time in (("quickstart", 2e9), ("other", 1e9)):
        os.utime(Path("results") / name / PLAN, (time, time))
    assert watch("--once")[1].startswith("results/quickstart at ")
    os.utime(f"results/other/{PLAN}", (3e9, 3e9))
    assert watch("--once")[1].startswith("results/other at ")


def test_rows_of_a_process_that_was_taken_over_go_nowhere(tmp_path):
    """One that was frozen has the file still open that the other has begun anew."""
    path = tmp_path / "metrics.jsonl"
    frozen, other = CurveFile(path, SETTINGS), CurveFile(path, SETTINGS)
    first, second = curve([1.0, 2.0])
    with frozen.appending([first]), other.appending([]):
        frozen.append(second)
        other.append(first)
    assert [one.step for one in read_curve_file(path, "train").rows] == [10]


# Trackers

OWN_TRACKER = """
import json
from fairway.trackers.base import Tracker

class Mine(Tracker):
    def log(self, step, values):
        if values["loss"] < 0:
            raise RuntimeError("no\\nroom")
        self.say(["log", step, values])

    def finish(self):
        self.say("finish")

    def say(self, what):
        with open("said.jsonl", "a") as file:
            print(json.dumps([self.run, self.training, self.settings, what]), file=file)
"""


def test_a_tracker_of_ones_own_gets_every_row_once(project, watch):
    write_plan(project / "results/quickstart", [7])
    path = write_live(
        project / "results/quickstart/seed-7/shared/train", curve([5.0, 11.0], bpb=[1.25])
    )
    (project / "mine_for_watch.py").write_text(OWN_TRACKER)
    assert watch("quickstart", "--once", "--tracker", "mine_for_watch:Mine")[0] == 0
    said = [json.loads(line) for line in Path("said.jsonl").read_text().splitlines()]
    assert all(one[:3] == ["quickstart", "seed-7/shared", SETTINGS] for one in said)
    values = {"loss": 2.9, "lr_scale": 1.0, "seconds": 5.0, "tokens": 10_000}
    assert said[0][3] == ["log", 10, values]
    assert said[1][3][1] == 20 and said[1][3][2]["held_out_bpb"] == 1.25
    assert [one[3] for one in said[2:]] == ["finish"]
    path.write_text(path.read_text().replace("2.9", "-2.9"))
    status, text = watch("quickstart", "--once", "--tracker", "mine_for_watch:Mine")
    assert status == 2
    line = r"fairway: --tracker mine_for_watch:Mine ended with RuntimeError: no room \(.*, line 8\)"
    assert re.fullmatch(line, text.splitlines()[-1])


def test_only_new_rows_are_handed_on_while_a_training_goes(project, watch, monkeypatch):
    """As the watch goes on: two looks, between which a row is added, and the third ends it."""
    run = project / "results/quickstart"
    write_plan(run, [7])
    stage = run / "seed-7/shared/train"
    write_live(stage, curve([5.0]))
    (project / "mine_for_watch.py").write_text(OWN_TRACKER)

    looks = [curve([5.0, 6.0, 7.0]), curve([5.0, 6.0])]

    def wait(seconds):
        if not looks:
            raise KeyboardInterrupt
        write_live(stage, looks.pop())

    monkeypatch.setattr("time.sleep", wait)
    status, text = watch("quickstart", "--tracker", "mine_for_watch:Mine")
    assert status == 0 and row(text, "seed-7/shared", "waiting")[2] == "30/400"
    said = [json.loads(line)[3] for line in Path("said.jsonl").read_text().splitlines()]
    assert [one if one == "finish" else one[1] for one in said] == [10, 20, 30, "finish"]


class Package(SimpleNamespace):
    """What stands for trackio or wandb: notes the calls, as the real ones take them."""

    def __init__(self, **more) -> None:
        super().__init__(calls=[], **more)

    def init(self, **options):
        self.calls.append(options)
        run = SimpleNamespace(rows=[], finished=False)
        run.log = lambda values, step: run.rows.append((step, values))
        run.finish = lambda: setattr(run, "finished", True)
        options["run"] = run
        return run


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_built_in_trackers_make_a_run_for_each_training(project, watch, monkeypatch, name):
    package = Package(login=lambda prompt: False)
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.delitem(sys.modules, f"fairway.trackers.{name}", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert watch("quickstart", "--once", "--tracker", name)[0] == 0
    monkeypatch.delitem(sys.modules, f"fairway.trackers.{name}")
    names = [f"quickstart/seed-{seed}/shared" for seed in SEEDS]
    assert [call["name"] for call in package.calls] == names
    for call in package.calls:
        assert (call["project"], call["group"]) == ("fairway", "quickstart")
        assert call["config"]["train"]["max_steps"] == 298
        assert len(call["run"].rows) == 150 and call["run"].finished
        assert call["run"].rows[0][1].keys() == {
            "loss", "lr_scale", "seconds", "tokens", "held_out_bpb",
        }  # fmt: skip
        assert call.get("mode") == ("offline" if name == "wandb" else None)


@pytest.mark.parametrize(
    ("login", "variables", "mode"),
    [(True, {}, None), (False, {}, "offline"), (False, {"WANDB_MODE": "online"}, None)],
)
def test_wandb_is_offline_unless_one_is_logged_in_or_says(
    project, watch, monkeypatch, login, variables, mode
):
    package = Package(login=lambda prompt: login)
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delitem(sys.modules, "fairway.trackers.wandb", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    watch("quickstart", "--once", "--tracker", "wandb")
    monkeypatch.delitem(sys.modules, "fairway.trackers.wandb")
    assert package.calls[0]["mode"] == mode


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("wandb", "No module named 'wandb'; install it with `pip install wandb`"),
        ("wanbd", "found 'wanbd', expected one of trackio, wandb, or module:Name of your own; did"),
        ("json:JSONDecoder", "--tracker json:JSONDecoder: found no subclass of fairway.trackers"),
        ("no_such:Tracker", "'no_such:Tracker' could not be imported: No module named 'no_such'"),
    ],
)
def test_a_tracker_that_cannot_be_is_refused_in_one_line(project, watch, monkeypatch, name, line):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "fairway.trackers.wandb", raising=False)
    status, text = watch("quickstart", "--once", "--tracker", name)
    assert status == 2 and line in text and text.count("\n") == 1
