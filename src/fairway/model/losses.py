"""The loss of every target of a text, without adaptation."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from fairway.model.gpt import GPT

BATCH_TOKENS = {"cuda": 65536, "cpu": 4096}
"""A GPU wants large passes. On a CPU the logits of a small one stay in its caches, where those of a
large one spend a second on memory that the process has never touched."""


def target_losses(model: GPT, tokens: np.ndarray) -> np.ndarray:
    """Nats of tokens[1:], float64 [n], from an integer array [n+1]."""
    return np.concatenate(list(losses_by_pass(model, tokens)))


@torch.no_grad()
def losses_by_pass(
    model: GPT,
    tokens: np.ndarray,
    batch_tokens: int | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[np.ndarray]:
    """What `target_losses` joins: the nats of each forward pass, float64, or of this rank's.

    Sequences of the model's training length follow each other without overlap; the rest at the
    end is one shorter sequence. A pass takes about `batch_tokens`, by default what suits the
    device.
    """
    length = model.config.sequence_tokens
    text = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
    targets = len(text) - 1
    batch_tokens = batch_tokens or BATCH_TOKENS[model.token_embedding.device.type]
    rows = max(1, batch_tokens // length)
    for start in range(rank * rows * length, targets, world_size * rows * length):
        stop = min(start + rows * length, targets)
        whole = start + (stop - start) // length * length
        for first, last, width in ((start, whole, length), (whole, stop, stop - whole)):
            if last > first:
                inputs = text[first:last].view(-1, width)
                wanted = text[first + 1 : last + 1].view(-1, width)
                yield _losses(model, inputs, wanted)


def _losses(model: GPT, inputs: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    device = model.token_embedding.device
    logits = model(inputs.to(device)).flatten(0, 1)
    losses = F.cross_entropy(logits, targets.to(device).flatten(), reduction="none")
    return losses.double().cpu().numpy()
