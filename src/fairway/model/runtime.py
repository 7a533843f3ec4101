"""Settings of the runtime resolved for a device: kernels, attention, precision, compilation."""

import os
import shutil
import time
from importlib.util import find_spec

import torch

from fairway.errors import UserError
from fairway.model.attention import (
    HOPPER,
    key_copies,
    load_ahead,
    load_backend,
    select_backend,
)
from fairway.model.gpt import GPT, Backend
from fairway.model.settings import RuntimeSettings
from fairway.model.spec import GPTConfig
from fairway.phases import CLOCK, phase


def import_ahead(settings: RuntimeSettings, *, brief: bool = False) -> None:
    """Import what `prepare` would on a GPU, in a process that has none yet: CUDA is not used.

    brief: as for `prepare`.
    Raises UserError where a part of a library is missing.
    """
    # Where NVML is missing, as nvidia-smi is then, these libraries count the GPUs by CUDA.
    if settings.device == "cpu" or shutil.which("nvidia-smi") is None:
        return
    if settings.precision != "float32":
        load_ahead(settings.attention, brief)
    if settings.kernels != "plain" and find_spec("triton"):
        fused_twin()


def prepare(model: GPT, settings: RuntimeSettings, *, brief: bool = False) -> GPT:
    """Set the model's compute dtype, kernels and attention backend for the device it is on.

    brief: whether it will compute for a few seconds only, which a backend that takes longer to
    load would not repay.
    Raises UserError where the settings ask for what cannot run here.
    """
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
        "sdpa"
        if precision == "float32"
        else select_backend(settings.attention, device, brief=brief)
    )
    with phase("compile"):
        load_backend(model.attention_backend)
    group = model.config.heads // model.config.kv_heads
    model.key_copies = key_copies(model.attention_backend, group)
    model.backend, model.kernels_reason = select_kernels(settings.kernels, model.config, device)
    if model.kernels == "fused" and settings.compile == "on":
        raise UserError(
            "runtime.compile is 'on' but runtime.kernels is 'fused' here, and only the plain "
            "formulation is compiled: set kernels to 'plain' or compile to 'auto'"
        )
    if settings.cuda_graphs == "on" and not captures_graphs(settings, model):
        raise UserError(
            f"runtime.cuda_graphs is 'on' but runtime.kernels is {model.kernels!r} on device "
            f"{device.type!r} here: it needs fused kernels and CUDA; use 'auto'"
        )
    count_compilation(model, settings)
    return model


def select_kernels(
    wanted: str, config: GPTConfig, device: torch.device
) -> tuple[Backend | None, str | None]:
    """Resolve `runtime.kernels` (auto, plain, fused): auto is fused on Hopper GPUs and newer.

    Returns the fused twin, or None for the plain formulation, and why auto did not take the twin
    on a GPU, else None. Raises UserError where fused is asked for and cannot run.
    """
    if wanted == "plain" or (wanted == "auto" and device.type != "cuda"):
        return None, None
    # Triton's interpreter runs the kernels on the CPU, slowly; tests use it.
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    twin = None
    if find_spec("triton") is None:
        reason = "Triton is not installed"
    elif device.type != "cuda" and not interprets:
        reason = f"the device is {device.type!r}, and they need CUDA"
    elif wanted == "auto" and torch.cuda.get_device_capability(device) < HOPPER:
        reason = "the GPU is older than Hopper"
    else:
        twin = fused_twin()
        reason = twin.supports(config)
    if wanted == "fused" and reason is not None:
        raise UserError(f"runtime.kernels is 'fused' but {reason}: use 'auto'")
    return (None if reason else twin), reason


def fused_twin() -> Backend:
    """The fused formulation; imported late, for an installation for CPUs lacks Triton."""
    from fairway.model.fused import forward_backward

    return forward_backward


def compiles(settings: RuntimeSettings, model: GPT) -> bool:
    """Whether torch.compile is asked for here: the fused kernels have nothing left for it."""
    is_cuda = model.token_embedding.device.type == "cuda"
    plain = model.kernels == "plain"
    return settings.compile == "on" or (settings.compile == "auto" and is_cuda and plain)


def count_compilation(model: GPT, settings: RuntimeSettings) -> None:
    """From now on the time of the compiler that the model needs, if any, counts as such."""
    if compiles(settings, model):
        from torch._dynamo.callback import callback_handler

        started: list[float] = []
        if not callback_handler.start_callbacks:
            callback_handler.register_start_callback(lambda _: started.append(time.perf_counter()))
            callback_handler.register_end_callback(
                lambda _: CLOCK.move(time.perf_counter() - started.pop(), "compile")
            )
    elif model.kernels == "fused":
        from triton import knobs

        knobs.compilation.listener = lambda *, times, **_: CLOCK.move(times.total / 1e6, "compile")


def captures_graphs(settings: RuntimeSettings, model: GPT) -> bool:
    """Whether training and the evaluation replay their kernels as CUDA graphs."""
    is_cuda = model.token_embedding.device.type == "cuda"
    return settings.cuda_graphs != "off" and is_cuda and model.kernels == "fused"


def runtime_metrics(model: GPT) -> dict[str, str | None]:
    """The keys of metrics.json that say how a prepared model computes."""
    return {
        "kernels": model.kernels,
        "kernels_reason": model.kernels_reason,
        "attention_backend": model.attention_backend,
        "precision": str(model.compute_dtype).removeprefix("torch."),
    }
