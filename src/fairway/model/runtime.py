"""How a model computes: device, kernels, attention backend, precision, compilation."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from fairway.errors import UserError
from fairway.model.attention import HOPPER, select_backend
from fairway.model.gpt import GPT


@dataclass(frozen=True)
class RuntimeSettings:
    """The config section `runtime`; `auto` is resolved by `prepare`."""

    device: str
    kernels: str
    attention: str
    precision: str
    compile: str
    cuda_graphs: str


def prepare(model: GPT, settings: RuntimeSettings) -> GPT:
    """Set the model's compute dtype, kernels and attention backend for the device it is on."""
    device = model.token_embedding.device
    precision = settings.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    if precision == "float32" and settings.attention in ("cudnn", "flash_attn"):
        raise UserError(
            f"runtime.attention {settings.attention!r} takes half precisions only, but "
            "runtime.precision is float32 here: use 'auto' or 'sdpa', or precision bfloat16"
        )
    model.compute_dtype = getattr(torch, precision)
    model.attention_backend = (
        "sdpa" if precision == "float32" else select_backend(settings.attention, device)
    )
    model.kernels = select_kernels(settings.kernels, device)
    if model.kernels == "fused" and settings.compile == "on":
        raise UserError(
            "runtime.compile is 'on' but runtime.kernels is 'fused' here, and only the plain "
            "formulation is compiled: set kernels to 'plain' or compile to 'auto'"
        )
    if settings.cuda_graphs == "on" and not records_graphs(settings, model):
        raise UserError(
            f"runtime.cuda_graphs is 'on' but runtime.kernels is {model.kernels!r} on device "
            f"{device.type!r} here: it needs fused kernels and CUDA; use 'auto'"
        )
    return model


def select_kernels(wanted: str, device: torch.device) -> str:
    """Resolve `runtime.kernels` (auto, plain, fused): auto is fused on Hopper GPUs and newer.

    Raises UserError where fused is asked for and cannot run.
    """
    has_triton = find_spec("triton") is not None
    if wanted == "auto":
        is_cuda = device.type == "cuda"
        is_recent = is_cuda and torch.cuda.get_device_capability(device) >= HOPPER
        return "fused" if has_triton and is_recent else "plain"
    # Triton's interpreter runs the kernels on the CPU, slowly; tests use it.
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if wanted == "fused" and not (has_triton and (device.type == "cuda" or interprets)):
        raise UserError(
            f"runtime.kernels is 'fused' but the device is {device.type!r} and Triton is "
            f"{'' if has_triton else 'not '}installed: it needs both CUDA and Triton; use 'auto'"
        )
    return wanted


def compiles(settings: RuntimeSettings, model: GPT) -> bool:
    """Whether torch.compile is asked for here: the fused kernels have nothing left for it."""
    is_cuda = model.token_embedding.device.type == "cuda"
    plain = model.kernels == "plain"
    return settings.compile == "on" or (settings.compile == "auto" and is_cuda and plain)


def records_graphs(settings: RuntimeSettings, model: GPT) -> bool:
    """Whether training and the evaluation replay their kernels as CUDA graphs."""
    is_cuda = model.token_embedding.device.type == "cuda"
    return settings.cuda_graphs != "off" and is_cuda and model.kernels == "fused"


def record_graph(
    compute: Callable[[], torch.Tensor], pool: tuple[int, int]
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A CUDA graph of what `compute` launches, and its result, which every replay fills anew.

    pool: of `torch.cuda.graph_pool_handle`, whose memory it computes in. `compute` must have run
    before: what is compiled or allocated at first use must not be part of the recording.
    """
    graph = torch.cuda.CUDAGraph()
    # Of this thread alone: NCCL's own may query their events in the meantime.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = compute()
    return graph, result
