"""Mid-run checkpoints: the two newest complete ones are kept, by one process at a time.

They lie beside the stage's declared outputs, never inside, because a workflow deletes the outputs
of a failed job. A checkpoint is a folder `step-<n>`, written under another name and renamed when it
is whole. `identity` (a hash of settings, data, seed and code) names the folder above it, so a
checkpoint from other settings, data, seed or code is never resumed.
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
from fairway.files import read_json, sha256_of, write_json

KEPT = 2
WAIT_MESSAGE_SECONDS = 10.0


class Checkpoints:
    """The checkpoints of one run of one stage, under `folder`/`identity`."""

    def __init__(self, folder: str | Path, identity: str) -> None:
        self.folder = Path(folder) / identity[:16]

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint, then drop all but the newest two. Returns its folder."""
        target = self.folder / f"step-{step:08d}"
        partial = self.folder / f".partial-{step:08d}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(on_cpu, partial / "tensors.safetensors")
            digest = sha256_of(partial / "tensors.safetensors")
            write_json(partial / "state.json", {**state, "step": step, "tensors_sha256": digest})
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"checkpoint {target} could not be written ({error}): free disk space and start "
                f"again; {self.describe_latest()}"
            ) from error
        for old in self._complete()[:-KEPT]:
            shutil.rmtree(old)
        return target

    def load_latest(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors (CPU) and state of the newest intact checkpoint; None where there is none."""
        for folder in reversed(self._complete()):
            state = read_json(folder / "state.json")
            if sha256_of(folder / "tensors.safetensors") == state["tensors_sha256"]:
                return load_file(folder / "tensors.safetensors"), state
            print(f"{folder} is damaged and is not used", file=sys.stderr)
        return None

    def describe_latest(self) -> str:
        """Half a sentence for error messages."""
        complete = self._complete()
        return f"the last good checkpoint is {complete[-1]}" if complete else "no checkpoint yet"

    def remove(self) -> None:
        """Delete them all: the stage's products are on disk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _complete(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if re.match(r"step-\d+$", path.name))


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
