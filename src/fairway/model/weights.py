"""Model files: safetensors with the model's configuration in the metadata, never pickle."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fairway.errors import UserError
from fairway.files import atomic_path, require_file
from fairway.model.gpt import GPT, GPTConfig, parameter_shapes


def save_weights(path: str | Path, config: GPTConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Write parameters and `config` atomically; tensors are moved to the CPU."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"config": json.dumps(asdict(config))})


def save_model(path: str | Path, model: GPT) -> None:
    """`save_weights` of a model's current parameters."""
    save_weights(path, model.config, model.state_dict())


def load_weights(path: str | Path) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    """Read what `save_weights` wrote; UserError where it is missing, damaged or not a model."""
    require_file(path, "an earlier stage")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): rerun the stage that makes it") from error
    if "config" not in metadata:
        raise UserError(f"{path} holds no model configuration: expected a Fairway weights file")
    return GPTConfig(**json.loads(metadata["config"])), state


def load_model(path: str | Path, device: torch.device | str = "cpu") -> GPT:
    """A GPT with the weights in `path`, on `device`."""
    return build_model(*load_weights(path), device)


def build_model(
    config: GPTConfig, state: Mapping[str, torch.Tensor], device: torch.device | str
) -> GPT:
    """A GPT with the given float32 parameters; UserError where a name or shape does not match."""
    for name, shape in parameter_shapes(config).items():
        if name not in state or tuple(state[name].shape) != shape:
            found = tuple(state[name].shape) if name in state else "nothing"
            raise UserError(f"weights for {name}: found {found}, the model's config needs {shape}")
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model.to(device)
