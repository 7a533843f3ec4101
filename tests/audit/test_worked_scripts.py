"""docs/examples/recorded_scripts.py, audited as docs/guides/audit_a_script.md says."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from fairway.cli import main
from fairway.data.shards import write_shard

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
CAUGHT_BY = {
    "sliding_window": {"flip", "self_influence"},
    "lora": {"flip", "self_influence"},
    "ngram": {"normalization"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The examples, and a text, in a folder of their own."""
    folder = tmp_path_factory.mktemp("scripts")
    for name in ("recorded_scripts.py", "leaking_evaluator.py"):
        shutil.copy(EXAMPLES / name, folder / f"worked_{name}")
    sys.path.insert(0, str(folder))
    import worked_leaking_evaluator

    write_shard(folder / "example.bin", worked_leaking_evaluator.example_text(201).numpy())
    yield folder
    sys.path.remove(str(folder))


def checks(folder: Path, name: str) -> tuple[int, dict[str, str]]:
    options = {
        "--evaluator": f"worked_recorded_scripts:{name}",
        "--tokens": str(folder / "example.bin"),
        "--vocab-size": "64",
        "--window-tokens": "32",
        "--stride-tokens": "8",
        "--flips": "8",
        "--stream-tokens": "100",
        "--null-tokens": "0",
        "--probe-tokens": "24",
        "--output": str(folder / "audit.json"),
    }
    words = [word for pair in options.items() for word in pair]
    status = main(["audit", *words, "--no-fresh"])
    content = json.loads((folder / "audit.json").read_text())
    return status, {check["name"]: check["verdict"] for check in content["checks"]}


@pytest.mark.parametrize("name", CAUGHT_BY)
def test_the_honest_script_is_clean_and_its_faulty_twin_fails(folder, name):
    status, honest = checks(folder, name)
    assert status == 0 and set(honest.values()) <= {"PASS", "NOT APPLICABLE", "NOT RUN"}
    assert honest["flip"] == honest["coverage"] == honest["normalization"] == "PASS"
    status, faulty = checks(folder, f"{name}_faulty")
    failed = {check for check, verdict in faulty.items() if verdict == "FAIL"}
    assert status == 1 and failed >= CAUGHT_BY[name]
