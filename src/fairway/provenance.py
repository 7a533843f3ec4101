"""provenance.json: what a stage's products were made from."""

import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from fairway.claims import remove
from fairway.errors import UserError
from fairway.files import read_json, require_file, sha256_of, write_json

PROVENANCE = "provenance.json"
"""Its name in a stage's folder; it goes before the first product
changes and comes after the last, so what it lists is whole."""

PACKAGES = ("fairway", "torch", "numpy", "sentencepiece", "safetensors", "pandas", "scipy")


def git_commit() -> str | None:
    """The checkout's commit, with `-dirty` where files differ; None outside a checkout."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def check_product(path: Path, made_by: str) -> str:
    """Hold a product against the provenance.json beside it; return its SHA-256.

    made_by: what makes the product. Raises UserError where the provenance is missing, which
    means that the product is not finished, or where it lists another hash or none.
    """
    provenance = require_file(path.parent / PROVENANCE, made_by)
    entry, found = read_json(provenance), sha256_of(path)
    outputs = entry.get("outputs") if isinstance(entry, dict) else None
    listed = outputs.get(path.name) if isinstance(outputs, dict) else None
    if found != listed:
        expected = listed[:12] if isinstance(listed, str) else "no such file"
        raise UserError(
            f"{path} has changed since it was made: found SHA-256 {found[:12]}, {provenance} lists "
            f"{expected}; expected the file made by {made_by}"
        )
    return found


def remove_provenance(folder: str | Path) -> None:
    """Remove an older provenance.json, before the first of the files that it lists changes."""
    remove(Path(folder) / PROVENANCE)


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
    outputs: files; their SHA-256 are recorded under their last names.
    splits_read: data splits (`train`, `val`) whose tokens this stage itself used to make its
    product; scoring a finished product on `val` does not count.
    parents: provenance.json files of the stages this one builds on. The recorded `splits` is the
    union of theirs and `splits_read`: the product's ancestry.
    """
    parents = [Path(parent) for parent in parents]
    ancestry = set(splits_read)
    for parent in parents:
        ancestry |= set(read_json(parent)["splits"])
    write_json(
        Path(folder) / PROVENANCE,
        {
            "stage": stage,
            "seed": seed,
            "settings": dict(settings),
            "splits": sorted(ancestry),
            "splits_read": sorted(set(splits_read)),
            "inputs": {
                **{str(path): digest for path, digest in inputs.items()},
                **{str(path): sha256_of(path) for path in parents},
            },
            "outputs": {Path(path).name: sha256_of(path) for path in outputs},
            "parents": [str(parent) for parent in parents],
            "git_commit": git_commit(),
            "versions": package_versions(),
        },
    )
