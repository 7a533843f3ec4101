"""Fixtures: a tiny dataset and tiny settings."""

import json
import os
from pathlib import Path

import pytest
import torch

from tiny import TINY_CONFIG, run_script, synthetic_documents, write_jsonl

# Triton reads this when it is imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """One thread, as in the workflow: sums in another order are other bytes."""
    torch.set_num_threads(1)


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
    folder = tmp_path_factory.mktemp("data") / "tiny"
    run_script("tokenize_text.py", "--config", tiny_config_file, "--output", folder)
    return folder / "manifest.json"
