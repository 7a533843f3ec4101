"""Mid-run checkpoints: the two newest complete ones are kept.

They lie beside the stage's declared outputs, never inside, because a workflow deletes the outputs
of a failed job. A checkpoint is a folder `step-<n>`, written under another name and renamed when it
is whole, and one checksum covers its tensors and its state. `identity` (a hash of settings, data,
seed and code) names the folder above it and is part of the checksum, so a checkpoint from other
settings, data, seed or code is never resumed.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fairway.claims import remove
from fairway.files import (
    atomic_folder,
    read_json,
    save_tensors,
    sha256_of,
    sha256_of_json,
    write_json,
)

KEPT = 2
TENSORS, STATE, CHECKSUM = "tensors.safetensors", "state.json", "checksum"


class Checkpoints:
    """The checkpoints of one run of one stage, under `folder`/`identity`."""

    def __init__(self, folder: str | Path, identity: str) -> None:
        self.folder, self.identity = Path(folder) / identity[:16], identity

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint, keep it and the one before it, drop all others. Returns its folder.

        Training goes on from the newest intact one, so those of later steps are damaged.
        """
        target = self.folder / f"step-{step:08d}"
        with atomic_folder(target) as folder:
            save_tensors(folder / TENSORS, tensors)
            write_json(folder / STATE, {**state, "step": step})
            (folder / CHECKSUM).write_text(self._checksum(folder), encoding="ascii")
        complete = self._complete()
        kept = [one for one in complete if one <= target][-KEPT:]
        for other in complete:
            if other not in kept:
                remove(other)
        return target

    def load_latest(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors (CPU) and state of the newest intact checkpoint; None where there is none."""
        for folder in reversed(self._complete()):
            if self._is_intact(folder):
                return load_file(folder / TENSORS), read_json(folder / STATE)
            print(
                f"checkpoint {folder} is damaged (its checksum is another) and is passed over",
                file=sys.stderr,
                flush=True,
            )
        return None

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Errors that leave the block carry a note that names the newest intact checkpoint."""
        try:
            yield
        except Exception as error:
            newest = next(filter(self._is_intact, reversed(self._complete())), None)
            if newest:
                error.add_note(f"the last good checkpoint is {newest}")
            raise

    def remove(self) -> None:
        """Delete them all: the stage's products are on disk."""
        remove(self.folder)

    def _complete(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(
            path
            for path in self.folder.iterdir()
            if re.fullmatch(r"step-\d+", path.name) and path.is_dir()
        )

    def _is_intact(self, folder: Path) -> bool:
        try:
            return (folder / CHECKSUM).read_text("ascii") == self._checksum(folder)
        except (OSError, UnicodeDecodeError):  # a file is missing, or is none
            return False

    def _checksum(self, folder: Path) -> str:
        """One SHA-256 of whose run the checkpoint is, its tensors and its state."""
        return sha256_of_json(
            [self.identity, sha256_of(folder / TENSORS), sha256_of(folder / STATE)]
        )


def with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` with names `<prefix>.<name>`; `tensors_under` is the inverse."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def tensors_under(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names begin with `<prefix>.`, by the rest of their names."""
    return {
        name.removeprefix(f"{prefix}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}.")
    }
