"""Atomic writes, hashes and the few file formats that every stage shares."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fairway.claims import TEMPORARY, before_change, check_claims, delete, remove
from fairway.errors import UserError, shortage

if TYPE_CHECKING:  # loading pandas takes a third of a second, and few stages need it
    import pandas as pd


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` once the block succeeds.

    The file is synced before the rename, so a reader sees the old file or the whole new one.
    Raises UserError where the folder cannot be written or the disk is full, and where another
    process has taken over a folder that this one had claimed.
    """
    with _put_in_place(Path(path), _new_file) as temporary:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """As `atomic_path`, for a folder; one that is there already is removed as a whole."""
    with _put_in_place(Path(path), tempfile.mkdtemp) as temporary:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        remove(path)


@contextmanager
def _put_in_place(path: Path, make: Callable[[str, str, Path], str]) -> Iterator[Path]:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(make(TEMPORARY, f".{path.name}.", path.parent))
        yield temporary
        before_change(path)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        check_claims()  # whoever took over has deleted what was temporary
        if shortage(error) == "memory":
            raise
        # safetensors wraps the operating system's error in one of its own.
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} could not be written ({reason}): "
            "free disk space or choose another `results` folder"
        ) from error
    finally:
        if temporary is not None:
            delete(temporary)


def _new_file(suffix: str, prefix: str, folder: Path) -> str:
    descriptor, name = tempfile.mkstemp(suffix, prefix, folder)
    os.close(descriptor)
    return name


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def require_file(path: str | Path, made_by: str) -> Path:
    """Return `path`, or raise UserError that names what makes it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing: expected a file made by {made_by}")
    return path


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically; NaN is refused."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON; UserError where the file is missing or is not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: rerun the stage that makes it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}): remove it and rerun its stage") from error


def write_table(path: str | Path, table: "pd.DataFrame") -> None:
    """Write a table as zstd-compressed parquet, atomically."""
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
