"""Model files: safetensors with the model's configuration in the metadata, never pickle."""

from collections.abc import Mapping
from pathlib import Path

import torch

from fairway.errors import UserError
from fairway.files import parse_json, read_tensors, write_tensors
from fairway.model.gpt import GPT
from fairway.model.spec import GPTConfig, parameters
from fairway.phases import phase
from fairway.settings import validated

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MADE_BY = "train, ema or ttt: rerun that stage"


def save_model(path: str | Path, model: GPT) -> None:
    """Write a model's parameters and its configuration atomically."""
    write_tensors(path, model.state_dict(), {"config": model.config.model_dump_json()})


@phase("read")
def load_model(path: str | Path, device: torch.device | str = "cpu") -> GPT:
    """The GPT that `save_model` wrote, on `device`; UserError where the file is missing, damaged or
    not a model.

    A key that the file's config lacks has its default.
    """
    state, metadata = read_tensors(path, MADE_BY)
    if "config" not in metadata:
        raise UserError(f"{path} holds no model configuration: expected a Fairway weights file")
    try:
        config = validated(GPTConfig, parse_json(metadata["config"]), "model")
        return build_model(config, state, device)
    except ValueError as error:  # a UserError too
        raise UserError(f"{path}: {error}; expected a file made by {MADE_BY}") from error


def build_model(
    config: GPTConfig, state: Mapping[str, torch.Tensor], device: torch.device | str
) -> GPT:
    """A GPT with the given parameters as float32; UserError where they are not the config's."""
    check_state(config, state)
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model.to(device)


def check_state(config: GPTConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError where tensors are not the parameters of a model of `config`."""
    table = parameters(config)
    for name, parameter in table.items():
        found = state.get(name)
        if found is None or found.shape != parameter.shape or found.dtype not in DTYPES:
            told = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise UserError(
                f"weights for {name}: found {told}, the model's config needs {parameter.shape}"
            )
    unknown = sorted(set(state) - set(table))
    if unknown:
        named = ", ".join(map(repr, unknown[:3]))
        raise UserError(f"weights for {named}: the model's config has no such thing")
