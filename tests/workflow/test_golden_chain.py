"""The tiny chain's numbers are those of golden.json, bit for bit.

That is promised for one kind of processor and one version of PyTorch: elsewhere sums are taken in
another order. After a change that is meant to change numbers, write the file anew from a finished
run of the tiny configuration:

    python tests/workflow/test_golden_chain.py results/tiny/seed-7
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file

from fairway.quantization.artifact import read_artifact

GOLDEN = Path(__file__).with_name("golden.json")


def machine() -> dict[str, str]:
    """What the last bits depend on, besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    vendors = {line.partition(": ")[2] for line in lines if line.startswith("vendor_id")}
    return {
        "processor": ", ".join(sorted(vendors)) or "unknown",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__.partition("+")[0],
        "sentencepiece": version("sentencepiece"),
    }


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the decoded tensors and the columns of every such file under a seed's folder."""
    readers = {
        "weights.safetensors": load_file,
        "averages.safetensors": load_file,
        "artifact.bin": lambda path: {k: v.numpy() for k, v in read_artifact(path)[1].items()},
        "tokens.parquet": lambda path: dict(pd.read_parquet(path).items()),
    }
    return {
        str(path.relative_to(folder)): digest(readers[path.name](path).items())
        for path in sorted(folder.glob("*/*/*"))
        if path.name in readers
    }


def digest(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    found = hashlib.sha256()
    for name, values in sorted(arrays):
        array = np.ascontiguousarray(values)
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def test_every_decoded_tensor_and_every_scored_target_is_as_promised(finished):
    golden = json.loads(GOLDEN.read_text())
    if golden["machine"] != machine():
        pytest.skip(f"bits are promised for {golden['machine']}, here is {machine()}")
    assert digests(next((finished / "results/tiny").glob("seed-*"))) == golden["digests"]


if __name__ == "__main__":
    found = {"machine": machine(), "digests": digests(Path(sys.argv[1]))}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
