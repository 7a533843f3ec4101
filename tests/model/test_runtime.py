"""What a model computes with: settings resolved for a device, and what cannot run refused."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from fairway.errors import UserError
from fairway.model import spec
from fairway.model.gpt import GPT
from fairway.model.runtime import captures_graphs, compiles, prepare, select_kernels
from fairway.model.settings import RuntimeSettings
from trainings import SMALL

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def runtime(**settings) -> RuntimeSettings:
    return RuntimeSettings(device="cpu", precision="float32", **settings)


class GatedConfig(spec.GPTConfig):
    """A model with a feature that the fused kernels have never heard of."""

    gate: float = 0.0


def test_on_a_cpu_auto_is_plain_float32_and_launched():
    model = prepare(GPT(SMALL), RuntimeSettings())
    assert model.kernels == "plain" and model.kernels_reason is None
    assert model.compute_dtype == torch.float32 and model.attention_backend == "sdpa"
    assert not compiles(RuntimeSettings(), model) and not captures_graphs(RuntimeSettings(), model)


def test_half_precision_attention_needs_half_precision():
    with pytest.raises(UserError, match="half precisions"):
        prepare(GPT(SMALL), runtime(attention="flash_attn"))


def test_fused_kernels_cannot_be_forced_where_they_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="runtime.kernels is 'fused' but"):
        select_kernels("fused", SMALL, CPU)
    assert select_kernels("auto", SMALL, CPU) == (None, None)
    assert select_kernels("plain", SMALL, CPU) == (None, None)


def test_cuda_graphs_cannot_be_forced_where_there_is_no_gpu():
    with pytest.raises(UserError, match="runtime.cuda_graphs is 'on'"):
        prepare(GPT(SMALL), runtime(cuda_graphs="on"))


@needs_triton
def test_fused_kernels_are_the_models_backend_and_are_not_compiled():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = prepare(GPT(SMALL).to(device), runtime(kernels="fused"))
    assert model.kernels == "fused" and model.kernels_reason is None
    assert not compiles(RuntimeSettings(), model)
    with pytest.raises(UserError, match="runtime.compile is 'on'"):
        prepare(model, runtime(kernels="fused", compile="on"))


@needs_triton
def test_what_the_fused_kernels_do_not_know_runs_plain_and_says_why(monkeypatch):
    """As on a Hopper GPU, which this machine need not have."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    off, on = (GatedConfig(**dict(SMALL), gate=gate) for gate in (0.0, 0.5))
    backend, reason = select_kernels("auto", off, gpu)
    assert backend is not None and reason is None
    backend, reason = select_kernels("auto", on, gpu)
    assert backend is None
    assert reason == "model.gate is 0.5, and the fused kernels know 0.0 only"
    with pytest.raises(UserError, match="runtime.kernels is 'fused' but model.gate is 0.5"):
        select_kernels("fused", on, gpu)
    backend, reason = select_kernels("auto", SMALL.changed(mlp_width=44), gpu)
    assert backend is None and reason.startswith("model.mlp_width is 44")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert select_kernels("auto", off, gpu) == (None, "the GPU is older than Hopper")


@pytest.mark.slow  # a process that imports torch
def test_a_model_runs_where_triton_is_not_installed():
    code = """
import sys
sys.modules["triton"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import torch
from fairway.errors import UserError
from fairway.model.gpt import GPT
from fairway.model.runtime import prepare
from fairway.model.settings import RuntimeSettings
from fairway.model.spec import GPTConfig
model = GPT(GPTConfig(layers=1, width=16, heads=2, kv_heads=1, rotary_dimensions=2,
                      value_layers=(), vocab_size=8))
assert prepare(model, RuntimeSettings(device="cpu")).kernels == "plain"
try:
    prepare(model, RuntimeSettings(kernels="fused"))
except UserError as error:
    assert "Triton is not installed" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
