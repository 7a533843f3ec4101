"""By-hand reruns: provenance.json goes before products change, and comes after the last."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from fairway.claims import remove
from fairway.data.verified import RECORD
from fairway.errors import UserError
from fairway.files import sha256_of
from fairway.stages import STAGES, stages_of_a_run
from runs import run_stages, tokenize
from trainings import run_here


def stage_folder(path: Path) -> Path:
    """The folder of the stage that writes `path`: figures lie one level further down."""
    return path.parent.parent if path.parent.name == "figures" else path.parent


@pytest.fixture
def copied(tiny_run, tiny_dataset, tmp_path):
    """A finished run and its dataset, to be worked on: folder of the run, manifest, config."""
    run, data = tmp_path / "results/tiny", tmp_path / "results/data/tiny"
    shutil.copytree(tiny_run, run)
    shutil.copytree(tiny_dataset.parent, data)
    return run, data / "manifest.json", tiny_run.parents[1] / "tiny.yaml"


@pytest.mark.slow
def test_a_rerun_never_leaves_the_old_provenance_beside_new_files(copied, monkeypatch):
    run, manifest, config = copied
    for path in run.glob("*/*/train/metrics.json"):
        path.unlink()  # or train would say that it is finished
    written: dict[Path, list[str]] = {}
    replace = os.replace

    def watched(source, target):
        if Path(target).name == RECORD:  # no product: whoever hashed the shards writes it
            return replace(source, target)
        folder = stage_folder(Path(target))
        if (folder / "metrics.json").exists() or (folder / "provenance.json").exists():
            assert not (folder / "provenance.json").exists(), target
        replace(source, target)
        written.setdefault(folder, []).append(Path(target).name)

    monkeypatch.setattr(os, "replace", watched)
    tokenize(config, manifest.parent)
    run_stages(config, manifest, run)
    written = {
        folder: names
        for folder, names in written.items()
        if ".checkpoints" not in folder.parts and folder.name in STAGES  # not a kept report
    }
    assert {folder.name for folder in written} >= {stage.name for stage in stages_of_a_run()} - {
        "tokenize"
    }
    for names in written.values():
        assert names[-2:] == ["metrics.json", "provenance.json"]
        assert names.count("provenance.json") == 1


@pytest.mark.slow
def test_a_refused_rerun_loses_nothing(copied, capsys):
    run, manifest, config = copied
    shared = run / "seed-7/shared"
    weights = shared / "ttt/weights.safetensors"
    weights.write_bytes(bytes([*weights.read_bytes()[:-1], weights.read_bytes()[-1] ^ 1]))
    files = [path for path in (shared / "gptq").iterdir() if path.is_file()]
    before = {path: sha256_of(path) for path in files}
    with pytest.raises(SystemExit):
        run_here(
            "gptq.py", "--config", config, "--variant", "causal", "--seed", 7,
            "--tokenize", manifest.parent, "--ttt", shared / "ttt", "--output", shared / "gptq",
        )  # fmt: skip
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {weights} has changed since it was made: found SHA-256 ")
    assert "--forcerun ttt" in line
    assert {path: sha256_of(path) for path in files} == before


@pytest.mark.slow
def test_an_artifact_that_does_not_fit_leaves_the_one_that_did(copied, tmp_path, capsys):
    run, manifest, config = copied
    shared = run / "seed-7/shared"
    smaller = tmp_path / "smaller.yaml"
    smaller.write_text('{"budgets": {"artifact_bytes": 1}}')
    before = {path: sha256_of(path) for path in (shared / "gptq").iterdir()}
    with pytest.raises(SystemExit):
        run_here(
            "gptq.py", "--config", config, smaller, "--variant", "causal", "--seed", 7,
            "--tokenize", manifest.parent, "--ttt", shared / "ttt", "--output", shared / "gptq",
        )  # fmt: skip
    assert "are left of budgets.artifact_bytes" in capsys.readouterr().err.splitlines()[-1]
    assert {path: sha256_of(path) for path in (shared / "gptq").iterdir()} == before


@pytest.mark.slow
def test_a_finished_training_is_left_alone(copied, capsys):
    run, manifest, config = copied
    folder = run / "seed-7/shared/train"
    before = {path: sha256_of(path) for path in folder.iterdir()}
    run_here(
        "train.py", "--config", config, "--variant", "causal", "--seed", 7,
        "--tokenize", manifest.parent, "--output", folder, "--checkpoints", run / "checkpoints",
    )  # fmt: skip
    assert "holds this very run already" in capsys.readouterr().err
    assert {path: sha256_of(path) for path in folder.iterdir()} == before


def test_a_provenance_that_cannot_be_removed_is_told_in_one_line(tmp_path, monkeypatch):
    def rename(source, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    remove(tmp_path / "not there/provenance.json")
    (tmp_path / "provenance.json").write_text("{}")
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UserError, match=r"provenance.json could not be removed \(Permission"):
        remove(tmp_path / "provenance.json")
    assert [path.name for path in tmp_path.iterdir()] == ["provenance.json"]
