"""Mid-run checkpoints: the two newest complete ones are kept, by one process at a time.

They lie beside the stage's declared outputs, never inside, because a workflow deletes the outputs
of a failed job. A checkpoint is a folder `step-<n>`, written under another name and renamed when it
is whole, and one checksum covers its tensors and its state. `identity` (a hash of settings, data,
seed and code) names the folder above it and is part of the checksum, so a checkpoint from other
settings, data, seed or code is never resumed.
"""

import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fairway.errors import UserError
from fairway.files import read_json, sha256_of, sha256_of_json, write_json

KEPT = 2
WAIT_MESSAGE_SECONDS = 10.0
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
        partial = self.folder / f".partial-{step:08d}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(on_cpu, partial / TENSORS)
            write_json(partial / STATE, {**state, "step": step})
            (partial / CHECKSUM).write_text(self._checksum(partial), encoding="ascii")
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"checkpoint {target} could not be written ({error}): free disk space and start "
                f"again; {self.describe_latest()}"
            ) from error
        complete = self._complete()
        newest = complete.index(target) + 1
        for other in (*complete[: max(0, newest - KEPT)], *complete[newest:]):
            shutil.rmtree(other)
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

    def describe_latest(self) -> str:
        """Half a sentence for error messages."""
        newest = next(filter(self._is_intact, reversed(self._complete())), None)
        return f"the last good checkpoint is {newest}" if newest else "no checkpoint yet"

    def remove(self) -> None:
        """Delete them all: the stage's products are on disk."""
        shutil.rmtree(self.folder, ignore_errors=True)

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


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Hold the lock of a checkpoint folder; wait, and say so, while another process holds it.

    The other is usually an orphan of a killed workflow. It goes on until it is stopped or done, and
    this process then resumes from its last checkpoint.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} could not be made ({error.strerror}): choose another `results` folder"
        ) from error
    lock = FileLock(folder / "lock")
    started, patience = time.monotonic(), 0.0
    while True:
        try:
            lock.acquire(timeout=patience)
            break
        except Timeout:
            patience = WAIT_MESSAGE_SECONDS
            print(
                f"waiting for the process that holds {folder / 'lock'} "
                f"({time.monotonic() - started:.0f} s so far): let it finish, or stop it with "
                "SIGTERM and its checkpoint is taken up here",
                file=sys.stderr,
                flush=True,
            )
    try:
        yield
    finally:
        lock.release()
