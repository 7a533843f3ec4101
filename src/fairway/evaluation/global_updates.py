"""The model itself trained, in phases, on the text that has been scored so far.

The windows are cut, in the order of the text, into contiguous segments. A segment is scored, in
lanes, with weights that were trained on earlier segments only; then all parameters take a pass of
training over its targets. So one order, that of the text, serves these updates and every adapter:
what LoRA adds is added to the updated weights, and an n-gram cache goes on over all earlier text.

Every rank trains on the same chunks in the same order, whatever it scored itself. On a CPU all then
hold the same weights, bit for bit; GPUs may round differently, and rank 0's weights count.

Source: "phased score-first TTT" of openai/parameter-golf PR #1610 and #1626, which also sorts
documents by length.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Self

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor

from fairway.errors import UserError
from fairway.evaluation.forward import deterministic_attention
from fairway.evaluation.text import Text
from fairway.model.gpt import GPT
from fairway.settings import Settings


class GlobalUpdateSettings(Settings):
    """Training of the model on scored text, for all lanes at once."""

    after: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Shares of the text after which the model is trained on what was scored since the share
    before; [] leaves the model as it is."""
    learning_rate: float = Field(0.001, gt=0)
    """SGD's, at the beginning of each update; a cosine takes it to zero at the end."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's; it starts anew at each update."""
    chunk_tokens: int = Field(32768, ge=1)
    """Tokens of a step, cut in windows; at least one window."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient of all parameters together."""

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if list(self.after) != sorted(set(self.after)):
            raise UserError(
                f"evaluation.global_updates.after is {list(self.after)}: expected shares of the "
                "text in ascending order, each once"
            )
        return self


@contextmanager
def undone_afterwards(model: GPT) -> Iterator[None]:
    """The model's parameters are in the end what they were in the beginning."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), before, strict=True):
                parameter.copy_(value)


def scored_tokens(text: Text, segment: range) -> Tensor:
    """The targets of a contiguous run of windows, and the token before them, int64 [n + 1]."""
    windows = text.windows
    first = int(windows.first_scored[segment[0]])
    return text.tokens[first - 1 : int(windows.starts[segment[-1]]) + windows.length + 1]


def train_on(
    model: GPT,
    tokens: Tensor,
    length: int,
    settings: GlobalUpdateSettings,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """One pass of training over tokens int64 [n + 1], in their order, in sequences of `length`.

    A shorter text is one sequence; what remains behind the last whole one is left out. Gradients
    are switched on for the pass and dropped at its end. loss: the model's, perhaps compiled.
    """
    length = min(length, len(tokens) - 1)
    whole = (len(tokens) - 1) // length * length
    rows = max(1, settings.chunk_tokens // length)
    inputs = tokens[:whole].view(-1, length).split(rows)
    targets = tokens[1 : whole + 1].view(-1, length).split(rows)
    with _trainable(model) as parameters, deterministic_attention(model), torch.enable_grad():
        optimizer = torch.optim.SGD(
            parameters, lr=settings.learning_rate, momentum=settings.momentum
        )
        for step, chunk in enumerate(zip(inputs, targets, strict=True)):
            cosine = 0.5 * (1 + math.cos(math.pi * step / len(inputs)))
            optimizer.param_groups[0]["lr"] = settings.learning_rate * cosine
            loss(*chunk).backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()


def take_from_first_rank(model: GPT) -> None:
    """Rank 0's parameters on every rank, where several processes score a text together."""
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)


@contextmanager
def _trainable(model: GPT) -> Iterator[list[torch.nn.Parameter]]:
    """All parameters with gradients switched on; LoRA, for one, keeps them off."""
    parameters = list(model.parameters())
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
            parameter.grad = None
