"""Atomic writes, hashes and the few file formats that every stage shares."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING, Any

from fairway.claims import TEMPORARY, before_change, check_claims, delete, remove
from fairway.errors import UserError, out_of_memory
from fairway.phases import phase

if TYPE_CHECKING:  # these take a third of a second and more to load, and few stages need them
    import pandas as pd
    from pyarrow.parquet import ParquetFile
    from torch import Tensor

MAXIMUM_JSON_BYTES = 1 << 26
MAXIMUM_JSON_DEPTH = 100
"""What a stage writes has a thousandth of the bytes and a tenth of the depth."""
MAXIMUM_TABLE_NUMBERS = 1 << 28
"""A whole table in memory has at most so many; longer ones are read in batches."""
BATCH_ROWS = 1 << 20
"""Rows of a table in memory at once."""
TENSORS_CHECKSUM = "sha256"
TENSORS_RECORD = "fairway"
"""The one key in the metadata of safetensors, which would be written in any order if more."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` once the block succeeds.

    The file is synced before the rename, so a reader sees the old file or the whole new one.
    Raises UserError where the folder cannot be written or the disk is full, and where another
    process has taken over a folder that this one had claimed.
    """
    with phase("write"), _put_in_place(Path(path), _new_file) as temporary:
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
    check_claims()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(make(TEMPORARY, f".{path.name}.", path.parent))
        yield temporary
        before_change(path)
        os.replace(temporary, path)
    except OSError as error:
        check_claims()  # whoever took over has deleted what was temporary
        if out_of_memory(error):
            raise
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
    """Return `path`, or raise UserError that names what makes it; a device or pipe is no file."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if S_ISREG(mode) and os.access(path, os.R_OK):
            return path
        found = "a folder" if S_ISDIR(mode) else "no file" if not S_ISREG(mode) else "not readable"
    except (FileNotFoundError, NotADirectoryError):
        found = "missing"
    except (OSError, ValueError) as error:  # a loop of links, a name that no file can have
        found = f"no file ({error})"
    raise UserError(f"{path} is {found}: expected a file made by {made_by}")


@contextmanager
def reading(path: Path, form: str, made_by: str, *errors: type[Exception]) -> Iterator[None]:
    """Tell what a library raises while it reads `path` as a UserError of one line.

    form: the file's, such as `JSON`. errors: besides OSError.
    """
    try:
        yield
    except (OSError, *errors) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is damaged or not {form} ({reason}): expected the file made by {made_by}"
        ) from error


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically; NaN is refused."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path, made_by: str = "the stage whose folder holds it") -> Any:
    """The JSON in a file. made_by: what makes the file, for the UserError where it is missing,
    longer than MAXIMUM_JSON_BYTES or not what `parse_json` takes.
    """
    path = require_file(path, made_by)
    with reading(path, "JSON", made_by, ValueError):
        if path.stat().st_size > MAXIMUM_JSON_BYTES:
            raise ValueError(f"it has more than {MAXIMUM_JSON_BYTES} bytes")
        return parse_json(path.read_bytes())


def parse_json(text: str | bytes) -> Any:
    """The value of JSON that a stranger may have written.

    Raises ValueError where it is not JSON in UTF-8 whose objects have each key once, whose numbers
    are finite as float64 and whose depth is at most MAXIMUM_JSON_DEPTH.
    """
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            object_pairs_hook=_each_key_once,
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value)
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # no half of a surrogate pair
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, one in pairs:
        if key in value:
            raise ValueError(f"it has the key {key[:40]!r} twice")
        value[key] = one
    return value


def _finite(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise ValueError(f"it has the number {digits[:40]}")
    return float(digits)


def _whole(digits: str) -> int:
    _finite(digits)
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAXIMUM_JSON_DEPTH):
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one)
            if isinstance(child, dict | list)
        ]
    if level:
        raise ValueError("it is nested too deeply")


def write_table(path: str | Path, table: "pd.DataFrame") -> None:
    """Write a table as zstd-compressed parquet, atomically."""
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")


def open_table(
    path: str | Path, made_by: str, columns: Mapping[str, str] | Iterable[str] = ()
) -> "ParquetFile":
    """A parquet file of which only the schema was read.

    columns: names, or names and numpy dtypes, of columns that it must have; a dtype stands for all
    of its kind (whole numbers, floating-point numbers, booleans). Raises UserError otherwise.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    path = require_file(path, made_by)
    with reading(path, "parquet", made_by, ArrowException):
        file = ParquetFile(path)
        schema = file.schema_arrow
    lacking = sorted(name for name in columns if schema.names.count(name) != 1)
    if lacking:
        raise UserError(
            f"{path} lacks the columns {', '.join(lacking)}: expected the table made by {made_by}"
        )
    for name, kind in columns.items() if isinstance(columns, Mapping) else ():
        found = str(schema.field(name).type)
        if _kind_of(found) != _kind_of(kind):
            raise UserError(
                f"{path} has {found} in its column {name}, expected {kind} as made by {made_by}"
            )
    return file


def _kind_of(dtype: str) -> str:
    """Of the names that numpy and Arrow give to dtypes: `int`, `float` or `bool`, else itself."""
    kind = dtype.rstrip("0123456789").removeprefix("u").removeprefix("half")
    return "float" if kind == "double" else kind


def read_batches(
    path: str | Path, made_by: str, columns: Mapping[str, str], batch_rows: int = BATCH_ROWS
) -> Iterator["pd.DataFrame"]:
    """The named columns of a parquet file, as their dtypes, `batch_rows` rows at a time.

    Raises UserError as `open_table` does, and where the file is damaged or holds a null.
    """
    from pyarrow import ArrowException

    path = Path(path)
    file, rows = open_table(path, made_by, columns), 0
    with reading(path, "parquet", made_by, ArrowException):
        for batch in file.iter_batches(batch_rows, columns=list(columns)):
            if any(column.null_count for column in batch.columns):
                raise OSError("it holds a null")
            if batch.num_rows:
                yield batch.to_pandas(ignore_metadata=True).astype(dict(columns))
            rows += batch.num_rows
        if rows != file.metadata.num_rows:
            raise OSError(f"{rows} rows, {file.metadata.num_rows} according to its metadata")


@phase("read")
def read_table(
    path: str | Path, made_by: str, columns: Mapping[str, str] | Iterable[str] = ()
) -> "pd.DataFrame":
    """All columns of a parquet file, of at most MAXIMUM_TABLE_NUMBERS numbers.

    columns: those that it must have, as in `open_table`. Raises UserError as that does, and where
    the file is damaged or longer.
    """
    from pyarrow import ArrowException

    path = Path(path)
    file = open_table(path, made_by, columns)
    with reading(path, "parquet", made_by, ArrowException):
        if file.metadata.num_rows * file.metadata.num_columns > MAXIMUM_TABLE_NUMBERS:
            raise OSError(f"it has {file.metadata.num_rows} rows")
        return file.read().to_pandas(ignore_metadata=True)


def write_tensors(
    path: str | Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]
) -> None:
    """Write safetensors atomically, with a SHA-256 of all that is in it; tensors go to the CPU."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksum = _tensors_sha256(on_cpu, metadata)
    record = json.dumps({**metadata, TENSORS_CHECKSUM: checksum}, sort_keys=True)
    with atomic_path(path) as temporary:
        save_tensors(temporary, on_cpu, {TENSORS_RECORD: record})


def save_tensors(
    path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None
) -> None:
    """Write safetensors to a temporary path; tensors go to the CPU. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(on_cpu, path, metadata=metadata)
    except SafetensorError as error:  # it wraps the operating system's error in one of its own
        raise OSError(str(error)) from error


@phase("read")
def read_tensors(path: str | Path, made_by: str) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Tensors, on the CPU, and metadata of what `write_tensors` wrote.

    Raises UserError where the file is missing or no safetensors file, and where it has another
    content than it was written with.
    """
    from safetensors import SafetensorError, safe_open

    path = require_file(path, made_by)
    # PyTorch has errors of its own for shapes that no tensor can have.
    with (
        reading(path, "safetensors", made_by, SafetensorError, TypeError, ValueError, RuntimeError),
        safe_open(path, framework="pt") as file,
    ):
        metadata = dict(parse_json((file.metadata() or {}).get(TENSORS_RECORD, "{}")))
        if not all(isinstance(text, str) for text in metadata.values()):
            raise TypeError("its metadata is not text")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.pop(TENSORS_CHECKSUM, None) != _tensors_sha256(tensors, metadata):
            raise SafetensorError("its checksum is missing or does not match")
    return tensors, metadata


def _tensors_sha256(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> str:
    import torch

    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
