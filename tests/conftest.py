"""Fixtures: tiny settings, a tiny dataset, a tiny run."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from runs import run_stages, tokenize
from tiny import TINY_CONFIG, synthetic_documents, write_jsonl

# Triton reads this when it is imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine is no fault.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

LONGEST = ("test_resume.py", "test_resume_command.py", "test_killed_workflow.py")
# It makes the project that both of pytest-xdist's workers would else wait for.
PROJECT = "test_check.py"


def pytest_collection_modifyitems(items):
    """Files that take minutes come first, or one process would end with them alone."""
    items.sort(key=lambda item: item.path.name not in (*LONGEST, PROJECT))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """One thread, as in the workflow: sums in another order are other bytes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk():
    """No test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _fast_interpreter():
    """Where a collected test runs kernels in it."""
    if "triton.runtime.interpreter" in sys.modules and os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.hasten()


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> dict:
    """TINY_CONFIG with its text on disk."""
    folder = tmp_path_factory.mktemp("text")
    path = write_jsonl(folder / "documents.jsonl", synthetic_documents(60))
    return {**TINY_CONFIG, "data": {**TINY_CONFIG["data"], "paths": [str(path)]}}


@pytest.fixture(scope="session")
def tiny_config_file(tiny_config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(json.dumps(tiny_config), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_dataset(tiny_config_file, tmp_path_factory) -> Path:
    """The manifest of the tiny dataset."""
    return tokenize(tiny_config_file, tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def tiny_run(tiny_config, tiny_dataset, tmp_path_factory) -> Path:
    """The folder of a finished run of one seed and one variant."""
    audit = {"flips": 2, "stream_tokens": 64, "null_tokens": 64}
    config = {**tiny_config, "variants": {"causal": {}}, "audit": audit}
    folder = tmp_path_factory.mktemp("run")
    file = folder / "tiny.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    return run_stages(file, tiny_dataset, folder / "results/tiny")
