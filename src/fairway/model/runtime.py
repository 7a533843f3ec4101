"""How a model computes: device, attention backend, precision, compilation."""

from dataclasses import dataclass

import torch

from fairway.errors import UserError
from fairway.model.attention import select_backend
from fairway.model.gpt import GPT


@dataclass(frozen=True)
class RuntimeSettings:
    """The config section `runtime`; `auto` is resolved by `prepare`."""

    device: str
    attention: str
    precision: str
    compile: str


def prepare(model: GPT, settings: RuntimeSettings) -> GPT:
    """Set the model's compute dtype and attention backend for the device it is on."""
    device = model.token_embedding.device
    precision = settings.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    if precision == "float32" and settings.attention == "flash_attn":
        raise UserError(
            "runtime.attention 'flash_attn' takes half precisions only, but runtime.precision is "
            "float32 here: use 'auto' or 'sdpa', or precision bfloat16"
        )
    model.compute_dtype = getattr(torch, precision)
    model.attention_backend = (
        "sdpa" if precision == "float32" else select_backend(settings.attention, device)
    )
    return model


def compiles(settings: RuntimeSettings, device: torch.device) -> bool:
    """Whether `runtime.compile` asks for torch.compile on this device."""
    return settings.compile == "on" or (settings.compile == "auto" and device.type == "cuda")
