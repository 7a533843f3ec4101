"""The worked example of a feature of the model, docs/examples/mlp_gain.patch, as a user makes it:
a change of two files of a copy of the library, which runs in a process of its own."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fairway.data.dataset import Dataset
from fairway.model.weights import save_model
from fairway.quantization.artifact import load_artifact
from fairway.quantization.quantize import quantize_to_file
from fairway.quantization.settings import QuantizationSettings
from scattered import scattered_model
from tiny import ROOT
from warm_python import warm_python

PATCH = ROOT / "docs/examples/mlp_gain.patch"
TOKENS = torch.arange(24).view(2, 12)
PATHS = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]

BEGIN = """
import sys
from pathlib import Path
import torch
from fairway.model.gpt import GPT
from fairway.model.weights import load_model, save_model

folder, tokens = Path(sys.argv[1]), torch.arange(24).view(2, 12)

def model_with_gain():
    older = load_model(folder / "older.safetensors")
    model = GPT(older.config.changed(mlp_gain=True))
    model.load_state_dict(older.state_dict(), strict=False)
    with torch.no_grad():
        model.mlp_gain.normal_(1.0, generator=torch.Generator().manual_seed(0))
    return model
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the library with the patch, and files that the library has written without it."""
    folder = tmp_path_factory.mktemp("feature")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    # Outside of any repository, or git would ignore paths that are not below its root.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", str(PATCH)], cwd=folder, env=environment, check=True)
    model = scattered_model()
    save_model(folder / "older.safetensors", model)
    quantize_to_file(
        folder / "older.bin",
        model,
        QuantizationSettings(calibration_sequences=2, calibration_tokens=8, block_columns=8),
        Dataset(model.config.vocab_size, 1, None, {}),
        seed=0,
        limit_bytes=16_000_000,
    )
    with torch.no_grad():
        logits = model(TOKENS), load_artifact(folder / "older.bin")(TOKENS)
    torch.save(logits, folder / "logits.pt")
    return folder


def run(folder: Path, script: str) -> None:
    """Run a script against the patched library."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder / "src"), *PATHS))}
    command = [warm_python(), "-c", BEGIN + script, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_patch_changes_the_spec_and_the_plain_model_alone():
    changed = re.findall(r"^\+\+\+ b/(\S+)", PATCH.read_text(encoding="utf-8"), re.MULTILINE)
    assert changed == ["src/fairway/model/spec.py", "src/fairway/model/gpt.py"]


def test_off_it_changes_no_logit_and_older_files_load(folder):
    run(
        folder,
        """
from fairway.quantization.artifact import load_artifact
with torch.no_grad():
    for older, logits in zip(
        (load_model(folder / "older.safetensors"), load_artifact(folder / "older.bin")),
        torch.load(folder / "logits.pt"),
    ):
        assert older.config.mlp_gain is False and "mlp_gain" not in older.state_dict()
        assert torch.equal(older(tokens), logits)
""",
    )


def test_on_it_begins_as_nothing_and_learns(folder):
    run(
        folder,
        """
from fairway.model.spec import block_of_rows
from fairway.training.optimizers import GROUPS, Optimizer
older = load_model(folder / "older.safetensors")
model = model_with_gain()
assert not torch.equal(model(tokens), older(tokens))
with torch.no_grad():
    model.mlp_gain.fill_(1.0)
assert torch.equal(model(tokens), older(tokens))
optimizer = Optimizer(
    model, learning_rates=dict.fromkeys(GROUPS, 0.01), weight_decays=dict.fromkeys(GROUPS, 0.0),
    betas=(0.9, 0.95), newton_schulz_steps=5, gradient_clip=1.0,
)
model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
assert (model.mlp_gain.grad.abs().sum(1) > 0).all()
optimizer.step(1.0, 0.9)
assert (model.mlp_gain != 1).any()
assert block_of_rows("mlp_gain", model.config) == list(range(model.config.layers))
""",
    )


def test_on_it_is_stored_and_decodes_with_a_cache(folder):
    run(
        folder,
        """
from fairway.quantization.artifact import load_artifact
from fairway.quantization.quantize import quantize_to_file
from fairway.quantization.settings import QuantizationSettings
from fairway.data.dataset import Dataset
model = model_with_gain()
with torch.no_grad():
    cache = model.new_cache(2, 12)
    steps = [model.decode_step(tokens[:, t], cache) for t in range(12)]
    torch.testing.assert_close(torch.stack(steps, 1), model(tokens), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens, 7), model(tokens)[:, 7:], rtol=1e-5, atol=1e-5)
    save_model(folder / "gained.safetensors", model)
    assert torch.equal(load_model(folder / "gained.safetensors")(tokens), model(tokens))
quantize_to_file(
    folder / "gained.bin", model,
    QuantizationSettings(calibration_sequences=2, calibration_tokens=8, block_columns=8),
    Dataset(model.config.vocab_size, 1, None, {}), seed=0, limit_bytes=16_000_000,
)
loaded = load_artifact(folder / "gained.bin")
assert loaded.config.mlp_gain and torch.equal(loaded.mlp_gain, model.mlp_gain)
""",
    )


def test_the_fused_kernels_refuse_it_by_themselves(folder):
    pytest.importorskip("triton")
    run(
        folder,
        """
from unittest.mock import patch
from fairway.errors import UserError
from fairway.model.fused import forward_backward as fused
from fairway.model.runtime import prepare, select_kernels
from fairway.model.settings import RuntimeSettings
model, reason = model_with_gain(), "model.mlp_gain is True, and the fused kernels know False only"
assert fused.supports(load_model(folder / "older.safetensors").config) is None
assert fused.supports(model.config) == reason
assert prepare(model, RuntimeSettings(device="cpu")).kernels == "plain"
with patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)):
    gpu = torch.device("cuda")
    assert select_kernels("auto", model.config, gpu) == (None, reason)
    try:
        select_kernels("fused", model.config, gpu)
    except UserError as error:
        assert reason in str(error)
    else:
        raise AssertionError("forcing must be refused")
""",
    )
