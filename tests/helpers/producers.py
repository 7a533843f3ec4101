"""Folders that look as if a stage had left them, with products made by hand."""

from collections.abc import Iterable
from pathlib import Path

from fairway.files import sha256_of, write_json


def write_record(folder: Path, splits: Iterable[str] = ()) -> None:
    """The provenance.json that later stages ask for, over all files that lie in `folder`."""
    outputs = {path.name: sha256_of(path) for path in folder.iterdir()}
    record = {"stage": folder.name, "splits": sorted(splits), "outputs": outputs}
    write_json(folder / "provenance.json", record)
