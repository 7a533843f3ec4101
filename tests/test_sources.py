"""The fingerprint that decides which stages an edit reruns."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fairway.code_hash import PACKAGE, fingerprint, import_closure
from tiny import ROOT, SCRIPTS

STAGE_SCRIPTS = sorted(path.name for path in SCRIPTS.glob("*.py"))

# fingerprint() remembers what it read, as it may within one Snakemake run: ask in a new process.
FINGERPRINT = (
    "import sys; from fairway.code_hash import fingerprint; print(fingerprint(sys.argv[1]))"
)


LOADED_FILES = """
import json, runpy, sys

loaded = {}
for script in sys.argv[1:]:
    runpy.run_path(script, run_name="imported")
    names = [name for name in sys.modules if name.split(".")[0] == "fairway"]
    loaded[script] = [sys.modules.pop(name).__file__ for name in names]
print(json.dumps(loaded))
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources: the fingerprint of its train.py, and where to edit."""
    for name in ("src", "workflow"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def fingerprint_in(checkout: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", FINGERPRINT, str(checkout / "workflow/scripts/train.py")],
        env={"PYTHONPATH": str(checkout / "src")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def names(script: str) -> set[str]:
    closure = import_closure(SCRIPTS / script)
    return {str(path.relative_to(PACKAGE)) for path in closure if PACKAGE in path.parents}


def test_the_closure_is_what_python_imports():
    """Whatever of Fairway is loaded by importing a script is in its closure; packages are empty."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED_FILES, *(str(SCRIPTS / name) for name in STAGE_SCRIPTS)],
        env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded_by_script = json.loads(done.stdout)
    assert len(loaded_by_script) == 8
    for script, files in loaded_by_script.items():
        loaded = {Path(file) for file in files}
        packages = {path for path in loaded if path.name == "__init__.py"}
        assert not any(path.read_text() for path in packages if path.parent != PACKAGE)
        assert loaded - packages <= set(import_closure(script))


def test_stages_do_not_share_what_they_need_not():
    assert "model/gpt.py" in names("train.py") and "model/gpt.py" not in names("tokenize_text.py")
    assert "quantization/gptq.py" not in names("train.py") | names("slot_eval.py")
    assert "training/trainer.py" not in names("ema.py") | names("ttt.py") | names("gptq.py")
    adapters = {"adaptation/slot.py", "adaptation/lora.py"}
    assert not adapters & (names("train.py") | names("ttt.py") | names("gptq.py"))
    assert not any(name.startswith("audit/") for name in names("slot_eval.py"))


def test_the_fingerprint_is_that_of_the_meaning_not_of_the_place(checkout):
    before = fingerprint_in(checkout)
    assert before.strip() == fingerprint(SCRIPTS / "train.py")
    for path in checkout.rglob("*.py"):
        path.write_text(path.read_text() + "\n\n# A comment.\n")
    assert fingerprint_in(checkout) == before
    path = checkout / "src/fairway/quantization/gptq.py"  # not imported by train
    path.write_text(path.read_text() + "\nADDED = 1\n")
    assert fingerprint_in(checkout) == before
    path = checkout / "src/fairway/training/muon.py"
    path.write_text(path.read_text() + "\nADDED = 1\n")
    assert fingerprint_in(checkout) != before
