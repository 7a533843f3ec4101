"""provenance.json: what a stage's products were made from."""

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fairway.errors import UserError
from fairway.files import reading, require_file, sha256_of, sha256_of_json, write_json
from fairway.records import read_record
from fairway.settings import Fault

PROVENANCE = "provenance.json"
"""Its name in a stage's folder; it goes before the first product
changes and comes after the last, so what it lists is whole."""

PACKAGES = ("fairway", "torch", "numpy", "sentencepiece", "safetensors", "pandas", "scipy")

SPLITS = ("train", "val")
"""What may be in a product's ancestry."""

Line = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""A name or a path."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Provenance(BaseModel):
    """provenance.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: Line
    seed: int | None = None
    settings: dict[str, Any]
    splits: list[Line]
    """Data splits in the product's ancestry."""
    splits_read: list[Line]
    """Of them, those that the stage itself read to make its product."""
    inputs: dict[Line, Digest]
    """SHA-256 of files that were read, by the paths they were given as."""
    outputs: dict[Line, Digest]
    """SHA-256 of the products, by their paths in the folder."""
    parents: list[Line]
    """provenance.json files of the stages that this one builds on."""
    git_commit: Line | None = None
    versions: dict[Line, Line] = {}
    sha256: Digest
    """Of all the other keys, as canonical JSON."""

    @model_validator(mode="after")
    def _as_it_was_written(self) -> Self:
        if self.sha256 != _checksum(self.model_dump(exclude_unset=True)):
            raise Fault("it has changed since it was written")
        return self


def _checksum(values: Mapping[str, Any]) -> str:
    return sha256_of_json({key: value for key, value in values.items() if key != "sha256"})


def read_provenance(path: str | Path, made_by: str) -> Provenance:
    """Read a provenance.json. made_by: what makes the stage's products.

    Raises UserError where it is damaged, or missing: then the products are not finished.
    """
    return read_record(Provenance, path, made_by)


@cache
def git_commit() -> str | None:
    """The checkout's commit, with `-dirty` where files differ; None outside a checkout.

    As at the first call: what the process has imported stays as it was.
    """
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


@cache
def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def check_product(path: Path, made_by: str, record: Provenance | None = None) -> str:
    """Hold a product against the provenance.json beside it; return its SHA-256.

    made_by: what makes the product. record: that provenance, where it was read already. Raises
    UserError where the provenance is missing, which means that the product is not finished, or
    where it lists another hash or none.
    """
    provenance = path.parent / PROVENANCE
    record = record or read_provenance(provenance, made_by)
    with reading(require_file(path, made_by), "readable", made_by):
        found = sha256_of(path)
    listed = record.outputs.get(path.name)
    if found != listed:
        expected = listed[:12] if listed else "no such file"
        raise UserError(
            f"{path} has changed since it was made: found SHA-256 {found[:12]}, {provenance} lists "
            f"{expected}; expected the file made by {made_by}"
        )
    return found


def write_provenance(
    folder: str | Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[Path, str],
    outputs: Iterable[str | Path],
    splits_read: Iterable[str],
    seed: int | None = None,
    parents: Iterable[str | Path] = (),
) -> None:
    """Write `folder`/provenance.json.

    inputs: SHA-256 of the files that were read, recorded under their names as given.
    outputs: files in the folder; their SHA-256 are recorded under their paths there.
    splits_read: data splits (`train`, `val`) whose tokens this stage itself used to make its
    product; scoring a finished product on `val` does not count.
    parents: provenance.json files of the stages this one builds on. The recorded `splits` is the
    union of theirs and `splits_read`: the product's ancestry.
    """
    parents = [Path(parent) for parent in parents]
    values = {
        "stage": stage,
        "seed": seed,
        "settings": dict(settings),
        "splits": sorted(set(splits_read).union(*map(_splits_of, parents))),
        "splits_read": sorted(set(splits_read)),
        "inputs": {
            **{str(path): digest for path, digest in inputs.items()},
            **{str(path): sha256_of(path) for path in parents if os.path.isfile(path)},
        },
        "outputs": {Path(path).relative_to(folder).as_posix(): sha256_of(path) for path in outputs},
        "parents": [str(parent) for parent in parents],
        "git_commit": git_commit(),
        "versions": package_versions(),
    }
    write_json(Path(folder) / PROVENANCE, {**values, "sha256": _checksum(values)})


def _splits_of(parent: Path) -> Iterable[str]:
    """The splits in a parent's ancestry; those of a damaged one, which only the audit goes on from
    (and fails), may be any."""
    try:
        return read_provenance(parent, "an earlier stage").splits
    except UserError:
        return SPLITS
