"""Which shards were hashed already and have not been written to since.

Beside the manifest lies a record: each shard's SHA-256, and what the file system said of the file
before it was hashed. A file of which it says the same today is not read again. Every write changes
its ctime, which programs cannot set; what a failing disk changes unnoticed is left to the audit,
which hashes every file. The record is no product: without it, or in a copied dataset, whose files
have other inodes, each shard is hashed once more.
"""

import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fairway.errors import UserError
from fairway.files import sha256_of, write_json
from fairway.progress import progress
from fairway.provenance import Digest, Line
from fairway.records import read_record

RECORD = ".verified.json"

SETTLED_NS = 2_000_000_000
"""A younger file is not recorded: another write in the same tick of the file system's clock would
not show. The coarsest such clocks tick once in two seconds."""

BYTES_WITH_PROGRESS = 1 << 30


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Digest
    bytes: int
    inode: int
    mtime_ns: int
    ctime_ns: int


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: dict[Line, _File]


def shard_hashes(
    folder: Path, listed: Mapping[str, str | None], threads: int | None = None
) -> dict[str, str]:
    """SHA-256 of shards by their names in `folder`, or their absolute paths.

    listed: what each is expected to be. Only where the record says that the file is unchanged since
    it was just that, it is not hashed; None stands for no expectation.
    Processes that do this at the same time write the same facts, and the last one's stay.
    """
    record = _read(folder / RECORD)
    before = {name: (folder / name).stat() for name in listed}
    known = {
        name: record[name]
        for name, sha256 in listed.items()
        if sha256 and name in record and record[name] == _file(sha256, before[name])
    }
    unknown = [name for name in listed if name not in known]
    total = sum(before[name].st_size for name in unknown)
    paths = [folder / name for name in unknown]
    started = time.time_ns()
    with (
        ThreadPoolExecutor(threads) as pool,
        progress(total, "verify", "byte", show=total > BYTES_WITH_PROGRESS) as bar,
    ):
        hashed = {}
        for name, sha256 in zip(unknown, pool.map(sha256_of, paths), strict=True):
            hashed[name] = _file(sha256, before[name])
            bar.update(before[name].st_size)
    settled = {name: file for name, file in hashed.items() if file.ctime_ns < started - SETTLED_NS}
    if settled:
        _write(folder / RECORD, record | settled)
    return {name: (known | hashed)[name].sha256 for name in listed}


def _file(sha256: str, found: os.stat_result) -> _File:
    return _File(
        sha256=sha256,
        bytes=found.st_size,
        inode=found.st_ino,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
    )


def _read(path: Path) -> dict[str, _File]:
    """A record that is missing or damaged knows no shard."""
    try:
        return read_record(_Record, path, "the stage that hashed the shards").shards
    except UserError:
        return {}


def _write(path: Path, shards: Mapping[str, _File]) -> None:
    if not os.access(path.parent, os.W_OK):
        print(
            f"warning: {path.parent} cannot be written, so every stage hashes its shards again: "
            "make it writable, or copy the dataset",
            file=sys.stderr,
            flush=True,
        )
        return
    files = {name: file.model_dump() for name, file in sorted(shards.items())}
    write_json(path, {"shards": files})
