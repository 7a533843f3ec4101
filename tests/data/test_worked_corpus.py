"""docs/examples/text_folder.py: a corpus from outside the package, named in the config."""

import shutil
import sys

import numpy as np
import pytest

from fairway.data.build import make_dataset
from fairway.data.dataset import load_dataset, read_split
from fairway.data.settings import DataSettings
from fairway.data.tokenizer import load_tokenizer
from fairway.errors import UserError
from fairway.plugins import search_beside
from fairway.settings import validated
from tiny import ROOT, synthetic_documents

TEXTS = synthetic_documents(40)
DATA = {
    "name": "letters",
    "vocab_size": 320,
    "val_docs": 3,
    "selection_tokens": 300,
    "adaptation_tokens": 400,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Text files, and beside them the example, as a user has it beside the config."""
    texts = tmp_path / "letters"
    texts.mkdir()
    for number, text in enumerate(TEXTS):
        (texts / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    (texts / "notes.md").write_text("no document")
    shutil.copy(ROOT / "docs/examples/text_folder.py", tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    search_beside([tmp_path])
    yield texts
    sys.modules.pop("text_folder", None)


def section(folder, **data) -> DataSettings:
    source = {"text_folder:TextFolder": {"folder": str(folder)}}
    return validated(DataSettings, {**DATA, "source": source, **data}, "data")


def test_a_dataset_is_made_of_a_folder_of_text_files(folder, tmp_path):
    settings = section(folder)
    metrics, inputs = make_dataset(settings, tmp_path / "made", threads=1)
    assert metrics["documents"] == len(TEXTS) and metrics["splits"]["val"]["documents"] == 3
    assert inputs == sorted(folder.glob("*.txt"))
    dataset = load_dataset(tmp_path / "made/manifest.json")
    tokenizer, val = load_tokenizer(dataset.tokenizer_path), read_split(dataset, "val")
    documents = np.split(val, np.flatnonzero(val == dataset.bos_id))[1:]
    assert [tokenizer.decode(ids[1:].tolist()) for ids in documents] == TEXTS[:3]


def test_its_files_are_declared_so_that_one_more_makes_another_dataset(folder):
    settings = section(folder)
    before = settings.files()
    (folder / "999.txt").write_text("one more")
    assert settings.files() == (*before, folder / "999.txt")


def test_its_settings_survive_being_written_and_read(folder):
    settings = section(folder)
    assert validated(DataSettings, settings.model_dump(mode="json")) == settings


def test_faults_are_told_with_their_path(folder):
    unknown = {"text_folder:TextFolder": {"foldr": "x"}}
    with pytest.raises(UserError, match=r"data\.source\.text_folder.*foldr.*mean folder\?"):
        section(folder, source=unknown)
    with pytest.raises(UserError, match="data.paths is set, but data.source 'text_folder:Text"):
        section(folder, paths=["x"])
