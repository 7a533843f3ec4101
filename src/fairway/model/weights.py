"""Model files: safetensors with the model's configuration in the metadata, never pickle."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fairway.errors import UserError
from fairway.files import atomic_path, require_file
from fairway.model.gpt import GPT
from fairway.model.spec import GPTConfig, parameters
from fairway.settings import validated


def save_weights(path: str | Path, config: GPTConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Write parameters and `config` atomically; tensors are moved to the CPU."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"config": config.model_dump_json()})


def save_model(path: str | Path, model: GPT) -> None:
    """`save_weights` of a model's current parameters."""
    save_weights(path, model.config, model.state_dict())


def load_weights(path: str | Path) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    """Read what `save_weights` wrote; UserError where it is missing, damaged or not a model.

    A key that the file's config lacks has its default.
    """
    require_file(path, "an earlier stage")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): rerun the stage that makes it") from error
    if "config" not in metadata:
        raise UserError(f"{path} holds no model configuration: expected a Fairway weights file")
    try:
        config = json.loads(metadata["config"])
    except ValueError as error:
        raise UserError(f"{path}: its model configuration is not JSON ({error})") from error
    return validated(GPTConfig, config, f"model configuration of {path}"), state


def load_model(path: str | Path, device: torch.device | str = "cpu") -> GPT:
    """A GPT with the weights in `path`, on `device`."""
    return build_model(*load_weights(path), device)


def build_model(
    config: GPTConfig, state: Mapping[str, torch.Tensor], device: torch.device | str
) -> GPT:
    """A GPT with the given parameters as float32; UserError where they are not the config's."""
    table = parameters(config)
    for name, parameter in table.items():
        if name not in state or tuple(state[name].shape) != parameter.shape:
            found = tuple(state[name].shape) if name in state else "nothing"
            raise UserError(
                f"weights for {name}: found {found}, the model's config needs {parameter.shape}"
            )
    unknown = sorted(set(state) - set(table))
    if unknown:
        raise UserError(f"weights for {', '.join(unknown)}: the model's config has no such thing")
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model.to(device)
