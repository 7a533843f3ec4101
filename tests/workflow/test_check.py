"""`fairway check`: each file of a finished run that is missing, unfinished or changed is named."""

import re
import shutil
from pathlib import Path

import pytest

from checkouts import RESULTS, SEED, TEXT
from fairway.cli import main

UNDECLARED = {"README.md", "tiny.manifest.json", "plan.json"}
"""No stage's product, or one that Snakemake sees."""
SHARED = f"{RESULTS}/seed-{SEED}/shared"


@pytest.fixture
def check(project, monkeypatch, capsys):
    """Runs the command in a copy of the finished project; returns exit status and lines."""
    monkeypatch.chdir(project)

    def call(*arguments: str) -> tuple[int, list[str]]:
        status = main(["check", *arguments])
        printed = capsys.readouterr()
        return status, (printed.out + printed.err).splitlines()

    return call


def products() -> list[Path]:
    return [
        path
        for path in Path("results").rglob("*")
        if path.is_file()
        and not {"logs", "benchmarks", ".checkpoints"} & set(path.parts)
        and not path.name.startswith(".")
        and path.name not in UNDECLARED
    ]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, flip])
def test_every_file_of_a_run_is_watched(check, damage):
    assert check() == (0, ["results: every file is as it was made"])
    assert len(products()) > 40
    for path in products():
        kept = path.read_bytes()
        damage(path)
        status, lines = check()
        assert status == 1 and lines[-1].startswith("faults: ")
        told = [line for line in lines if str(path) in line]
        assert told and "`snakemake --cores 2 --force " in told[0], (path, lines)
        path.write_bytes(kept)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda: shutil.rmtree(f"{SHARED}/audit"),
            f"{RESULTS}/report was made from it; run `snakemake --cores 2 --force {SHARED}/audit/",
        ),
        (
            lambda: shutil.copytree(
                f"{RESULTS}/seed-{SEED}/leaky/gptq", f"{SHARED}/gptq", dirs_exist_ok=True
            ),
            f"{SHARED}/gptq/provenance.json has changed, and {SHARED}/slot_eval was made from it; "
            f"run `snakemake --cores 2 --force {SHARED}/slot_eval/provenance.json`",
        ),
        (
            lambda: Path(TEXT).unlink(),
            f"{TEXT} is missing, and results/data/tiny was made from it; "
            "run `snakemake --cores 2 --force results/data/tiny`",
        ),
    ],
    ids=["a lost stage", "another variant's", "lost text"],
)
def test_what_a_stage_was_made_from_counts(check, spoil, told):
    spoil()
    status, lines = check()
    assert status == 1 and any(told in line for line in lines)


@pytest.mark.parametrize("folder", ["nowhere", "config"])
def test_a_folder_without_results(check, folder):
    told = f"fairway: {folder} holds no stage's files: name a run's, such as results/quickstart"
    assert check(folder) == (2, [told])


def test_a_finished_workflow_is_shown_as_such(finished, monkeypatch, capsys):
    """By the plan that it left, `fairway watch` knows every seed and variant."""
    monkeypatch.chdir(finished)
    assert main(["watch"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{RESULTS} at ")
    assert "stages 11 finished; report finished" in text
    for variant in ("causal", "leaky"):
        assert re.search(rf"^ +{SEED} +{variant} +7/7 +finished ", text, re.MULTILINE)
