"""Folders that look as if a stage had left them, with products made by hand."""

from collections.abc import Iterable
from pathlib import Path

from fairway.files import sha256_of
from fairway.provenance import write_provenance


def write_record(
    folder: Path,
    splits: Iterable[str] = (),
    *,
    seed: int | None = None,
    inputs: Iterable[Path] = (),
) -> None:
    """The provenance.json that later stages ask for, over all files that lie in `folder`."""
    write_provenance(
        folder,
        stage=folder.name,
        settings={},
        seed=seed,
        inputs={path: sha256_of(path) for path in inputs},
        outputs=[path for path in folder.iterdir() if path.is_file()],
        splits_read=splits,
    )
