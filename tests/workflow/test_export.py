"""The export stage: a folder that evaluates itself where Fairway is not installed."""

import io
import json
import lzma
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pandas as pd
import pytest

from checkouts import CONFIG_FILE, FOLDERS, RESULTS, SEED
from fairway.cli import main
from fairway.evaluation.token_table import table_metrics
from fairway.packing import NEEDED, evaluation_program, read_plan
from tiny import SCRIPTS
from warm_python import warm_python

VAL = "results/data/tiny/val_000000.bin"


def export(project: Path, variant: str, output: Path) -> Path:
    """Run the stage's script for a variant of a finished run."""
    run = project / RESULTS / f"seed-{SEED}" / {"causal": "shared"}.get(variant, variant)
    inputs = {name: run / name for name in ("gptq", "slot_eval", "audit")}
    inputs |= {"tokenize": project / "results/data/tiny", "output": output}
    options = [word for name, path in inputs.items() for word in (f"--{name}", str(path))]
    log = project / RESULTS / f"logs/seed-{SEED}/shared/train.log"
    subprocess.run(
        [warm_python(), str(SCRIPTS / "export.py"), "--config", CONFIG_FILE, "--variant", variant,
         "--seed", str(SEED), *options, "--logs", str(log), "no.log"],
        cwd=project, check=True,
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory) -> Path:
    return export(finished, "causal", tmp_path_factory.mktemp("export") / "shared/export")


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder with what the README says is needed, and what that needs itself; no Fairway."""
    folder, waiting, seen = tmp_path_factory.mktemp("packages"), list(NEEDED), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # for another platform
            continue
        needed = [one for one in found.requires or [] if "extra ==" not in one]
        waiting += [re.match(r"[\w.-]+", one)[0] for one in needed]
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
    return folder


def evaluate(program: Path, *arguments, packages: str = "", folder: Path):
    """Run it by a Python that knows no other packages, in a folder of its own."""
    return subprocess.run(
        [sys.executable, "-S", "-P", str(program), *map(str, arguments)],
        env={"PYTHONPATH": packages, "PATH": os.environ["PATH"]},
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_it_runs_on_request_only(finished, dry_runs):
    assert dry_runs.jobs(finished) == set()
    assert dry_runs.jobs(finished, "export") == {f"export {SEED} {name}" for name in FOLDERS}


@pytest.mark.slow  # a process that imports torch
def test_the_program_gives_the_tables_score_to_the_last_digit(
    finished, exported, packages, tmp_path
):
    done = evaluate(
        exported / "evaluate.pyz", finished / VAL, packages=str(packages), folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    table = pd.read_parquet(finished / RESULTS / f"seed-{SEED}/shared/slot_eval/tokens.parquet")
    for name, value in table_metrics(table).items():
        assert value is None or found[name] == value, name
    submitted = read(exported / "submission.json")
    assert (submitted["val_loss"], submitted["val_bpb"]) == (found["val_loss"], found["val_bpb"])
    assert os.listdir(tmp_path) == []


def test_what_is_missing_is_told_in_one_line(exported, tmp_path):
    done = evaluate(exported / "evaluate.pyz", "val.bin", folder=tmp_path)
    names = " ".join(NEEDED)
    assert done.stderr == f"error: evaluate.pyz needs {names}: pip install {names}\n"
    assert done.returncode == 1


@pytest.mark.slow  # a process that imports torch
def test_a_missing_shard_is_told_in_one_line(exported, packages, tmp_path):
    done = evaluate(exported / "evaluate.pyz", "no.bin", packages=str(packages), folder=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"error: no.bin is missing: .*\n", done.stderr)


def test_the_folder_says_what_it_is(exported, finished):
    submitted = read(exported / "submission.json")
    sizes = {name: (exported / name).stat().st_size for name in ("artifact.bin", "evaluate.pyz")}
    assert submitted["bytes_code"] == sizes["evaluate.pyz"]
    assert submitted["bytes_total"] == sum(sizes.values())
    audit = read(finished / RESULTS / f"seed-{SEED}/shared/audit/audit.json")
    budgets = next(one for one in audit["checks"] if one["name"] == "budgets")
    assert str(sum(sizes.values())) in json.dumps(budgets["evidence"]).replace(".0", "")
    assert {"name", "author", "github_id", "blurb", "date", "audit"} <= set(submitted)
    readme = (exported / "README.md").read_text()
    assert f"| {SEED} | {submitted['val_bpb']:.5f} |" in readme
    assert "python evaluate.pyz val_000000.bin" in readme and "Audit: PASS." in readme
    requirements = (exported / "requirements.txt").read_text().splitlines()
    assert [line.partition("==")[0] for line in requirements] == list(NEEDED)
    assert (exported / "log.txt").read_text().startswith("== train ==\n")


def test_it_is_the_same_bytes_again_and_a_failed_audit_is_told(finished, exported, tmp_path):
    again = export(finished, "causal", tmp_path / "shared/export")
    for path in exported.iterdir():
        if path.name not in ("metrics.json", "provenance.json"):
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    leaky = (export(finished, "leaky", tmp_path / "leaky/export") / "README.md").read_text()
    assert "Audit: FAIL. This score has not been shown to be valid." in leaky


def test_what_a_program_holds(tmp_path, monkeypatch):
    """The adapters that its settings name, a user's own among them, and what these import."""
    (tmp_path / "own_cache.py").write_text('"""Mine."""\nimport beside_it\nclass Cache: pass\n')
    (tmp_path / "beside_it.py").write_text("BITS = 6  # a comment\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"evaluation": {"adapters": [{"own_cache:Cache": {}}]}, "runtime": {}}
    metrics = {"gptq": {"codecs": {"int6": "range"}}, "slot_eval": {"device": "cpu (x, 3 threads)"}}
    program = tmp_path / "evaluate.pyz"
    program.write_bytes(evaluation_program(settings, 7, metrics))
    expected = {**settings, "seed": 7, "threads": 3, "packages": [*NEEDED, "constriction"]}
    assert read_plan(program) == expected
    inner = io.BytesIO(lzma.decompress(zipfile.ZipFile(program).read("code.zip.xz")))
    with zipfile.ZipFile(inner) as code:
        assert code.read("beside_it.py") == b"BITS = 6"
        assert b"Mine" not in code.read("own_cache.py")
        names = set(code.namelist())
    assert {"own_cache.py", "fairway/__init__.py", "fairway/evaluation/__init__.py"} <= names
    assert not {"fairway/evaluation/adapters/lora.py", "fairway/stage.py"} & names


@pytest.mark.slow  # a process that imports torch for each call of the evaluator
def test_the_audit_takes_such_a_folder(finished, exported, tmp_path, capsys):
    options = ["--flips", "2", "--stream-tokens", "64", "--output", str(tmp_path / "audit.json")]
    call = ["audit", "--submission", str(exported), "--tokens", str(finished / VAL), *options]
    assert main(call) == 0, capsys.readouterr().out
    checks = {one["name"]: one for one in read(tmp_path / "audit.json")["checks"]}
    passed = {"flip", "self_influence", "state", "normalization", "coverage", "budgets", "program"}
    assert passed <= {name for name, one in checks.items() if one["verdict"] == "PASS"}
    submitted = read(exported / "submission.json")
    assert checks["program"]["evidence"]["val_bpb"] == submitted["val_bpb"]
