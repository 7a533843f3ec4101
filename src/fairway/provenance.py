"""provenance.json: what a stage's products were made from."""

import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from fairway.files import read_json, sha256_of, write_json

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


def write_provenance(
    folder: str | Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Iterable[str | Path],
    outputs: Iterable[str | Path],
    splits_read: Iterable[str],
    seed: int | None = None,
    parents: Iterable[str | Path] = (),
) -> None:
    """Write `folder`/provenance.json.

    inputs, outputs: files; their SHA-256 are recorded under their names as given.
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
        Path(folder) / "provenance.json",
        {
            "stage": stage,
            "seed": seed,
            "settings": dict(settings),
            "splits": sorted(ancestry),
            "splits_read": sorted(set(splits_read)),
            "inputs": {str(path): sha256_of(path) for path in [*inputs, *parents]},
            "outputs": {Path(path).name: sha256_of(path) for path in outputs},
            "parents": [str(parent) for parent in parents],
            "git_commit": git_commit(),
            "versions": package_versions(),
        },
    )
