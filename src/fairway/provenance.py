"""metrics.json and provenance.json: what a stage measured, and what it was made from."""

import platform
import resource
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fairway.distributed import World
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


def runtime_metrics(model: Any, world: World) -> dict[str, Any]:
    """The keys of metrics.json that say how a stage computed.

    model: anything with `kernels`, `attention_backend` and `compute_dtype`, as GPT has.
    """
    return {
        "device": device_name(world.device),
        "processes": world.size,
        "kernels": model.kernels,
        "attention_backend": model.attention_backend,
        "precision": str(model.compute_dtype).removeprefix("torch."),
        "peak_memory_bytes": peak_memory_bytes(world.device),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory: of the GPU's allocator on CUDA, else of this process (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    """The GPU's marketing name, or the processor's architecture and thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
