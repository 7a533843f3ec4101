"""Test-time training as the reference submission has it: epochs of AdamW before quantization.

On held-out *training* text it is simply more training. The code of the reference submission
(openai/parameter-golf PR #1350) takes validation text: its artifact has seen what it is scored on,
which the audit's lineage check tells.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field

from fairway.distributed import World
from fairway.errors import UserError
from fairway.model.gpt import GPT
from fairway.model.spec import block_of_rows
from fairway.progress import progress
from fairway.settings import Settings
from fairway.training.adamw import AdamW
from fairway.training.gradients import fill_missing_gradients


class TTTSettings(Settings):
    """Test-time training: more epochs on the averaged weights, before quantization."""

    data: Literal["train", "val", "none"] = "train"
    """The text: a tail of the training text, the validation text (which taints the artifact), or
    none, which leaves the weights as they are."""
    epochs: int = Field(1, ge=1)
    """Passes over the text. The reference submission has 6."""
    learning_rate: float = Field(0.00003, gt=0)
    """AdamW's, at the beginning of each epoch. The reference submission has 0.0005, which spoils a
    model that has been trained well."""
    final_learning_rate_fraction: float = Field(0.1, ge=0, le=1)
    """Of learning_rate, where the cosine of each epoch ends."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled, times the learning rate."""
    batch_sequences: int = Field(32, ge=1)
    """Sequences of a step, over all processes."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient of all parameters together."""
    frozen_blocks: int = Field(2, ge=0)
    """The first blocks, which stay as they are."""

    def check_with(self, sections: Mapping[str, Settings]) -> None:
        """Raise UserError where more blocks would be frozen than the model has."""
        check_frozen_blocks(self.frozen_blocks, sections["model"].layers)


def check_frozen_blocks(frozen_blocks: int, layers: int) -> None:
    """UserError where more blocks would be frozen than there are."""
    if frozen_blocks > layers:
        raise UserError(f"ttt.frozen_blocks {frozen_blocks} exceeds model.layers {layers}")


def adapt(
    model: GPT,
    tokens: np.ndarray,
    settings: TTTSettings,
    *,
    seed: int,
    world: World,
    compile_model: bool = False,
) -> list[float]:
    """Train `model` in place on integer `tokens` [n+1]; returns each epoch's mean loss in nats.

    Sequences have the model's training length and do not overlap; each epoch visits them in a new
    seeded order. The learning rate falls by a cosine over each epoch, from learning_rate to
    final_learning_rate_fraction of it. Raises UserError where the text is shorter than one
    sequence, where processes do not divide the batch, and where the loss is not finite.
    """
    inputs, targets = _sequences(tokens, model.config.sequence_tokens)
    if settings.batch_sequences % world.size:
        raise UserError(
            f"ttt.batch_sequences {settings.batch_sequences} is not divisible by the "
            f"{world.size} processes: change one of them"
        )
    check_frozen_blocks(settings.frozen_blocks, model.config.layers)
    masks = trainable_masks(model, settings.frozen_blocks)
    optimizer = AdamW(dict(model.named_parameters()))
    loss_function = torch.compile(model.loss) if compile_model else model.loss
    steps = math.ceil(len(inputs) / settings.batch_sequences)
    losses = []
    with progress(settings.epochs * steps, "ttt", "step", show=world.is_main) as bar:
        for epoch in range(settings.epochs):
            total = 0.0
            for step, rows in enumerate(_batches(len(inputs), settings, seed, epoch)):
                loss = _backward(model, loss_function, inputs, targets, rows, world)
                _update(optimizer, cosine_rate(step / steps, settings), masks, settings)
                if not math.isfinite(loss):
                    raise UserError(
                        f"ttt loss is {loss} in epoch {epoch + 1}: lower ttt.learning_rate"
                    )
                total += loss * len(rows)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update(1)
            losses.append(total / len(inputs))
    return losses


def cosine_rate(fraction: float, settings: TTTSettings) -> float:
    """Learning rate at `fraction` (0 to 1) of an epoch."""
    floor = settings.final_learning_rate_fraction
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * fraction)))


def trainable_masks(model: GPT, frozen_blocks: int) -> dict[str, torch.Tensor]:
    """For each parameter with rows in blocks: a float mask, 0 for the rows of a frozen block.

    A parameter holds rows of many blocks, so blocks are frozen row by row.
    """
    if frozen_blocks == 0:
        return {}
    masks = {}
    for name, parameter in model.named_parameters():
        blocks = block_of_rows(name, model.config)
        if blocks is not None:
            trainable = (torch.tensor(blocks) >= frozen_blocks).float()
            shape = (-1, *[1] * (parameter.ndim - 1))
            masks[name] = trainable.view(shape).to(parameter.device)
    return masks


def _sequences(tokens: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    count = (len(tokens) - 1) // length
    if count == 0:
        raise UserError(
            f"the text for ttt has {len(tokens)} tokens, fewer than one sequence of {length}: "
            "raise data.adaptation_tokens"
        )
    text = torch.from_numpy(np.asarray(tokens[: count * length + 1], dtype=np.int64))
    return text[:-1].view(count, length), text[1:].view(count, length)


def _batches(count: int, settings: TTTSettings, seed: int, epoch: int) -> Iterator[np.ndarray]:
    order = np.random.default_rng([seed, epoch]).permutation(count)
    for first in range(0, count, settings.batch_sequences):
        yield order[first : first + settings.batch_sequences]


def _backward(model, loss_function, inputs, targets, rows, world: World) -> float:
    """Gradients of the mean loss of the sequences `rows`, over all processes; returns the loss."""
    mine = torch.from_numpy(rows[world.rank :: world.size])
    if len(mine):
        x, y = inputs[mine].to(world.device), targets[mine].to(world.device)
        loss = loss_function(x, y) * (len(mine) / len(rows))
    else:
        # Every process must have gradients to average, also one without a sequence.
        loss = sum(parameter.sum() for parameter in model.parameters()) * 0.0
    loss.backward()
    fill_missing_gradients(model.parameters())
    loss = loss.detach()
    if world.size > 1:
        dist.all_reduce(loss)
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
    return float(loss)


@torch.no_grad()
def _update(
    optimizer: AdamW, learning_rate: float, masks: dict[str, torch.Tensor], settings: TTTSettings
) -> None:
    parameters = optimizer.parameters
    for name, mask in masks.items():
        parameters[name].grad.mul_(mask)
    torch.nn.utils.clip_grad_norm_(parameters.values(), settings.gradient_clip)
    optimizer.step(learning_rate)
    # AdamW's own decay would move frozen rows too, so it is off; this one heeds the masks.
    decay = learning_rate * settings.weight_decay
    for name, parameter in parameters.items():
        parameter.grad = None
        if decay:
            parameter.mul_(1 - decay * masks.get(name, 1.0))
