"""Folders that look as if a stage had left them, with products made by hand."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from fairway.files import sha256_of, write_bytes
from fairway.model.spec import GPTConfig
from fairway.provenance import write_provenance
from fairway.quantization.artifact import Stored, encode_artifact


def write_artifact(path: Path, config: GPTConfig, tensors: Mapping[str, Stored]) -> int:
    """As the gptq stage writes it; returns its size in bytes."""
    data = encode_artifact(config, tensors)
    write_bytes(path, data)
    return len(data)


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
