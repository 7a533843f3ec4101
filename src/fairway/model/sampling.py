"""Text drawn from the model itself, with a key/value cache.

Shapes: B sequences, T positions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from fairway.model.gpt import GPT
from fairway.model.graphs import capture
from fairway.progress import progress

WARM_UP_RUNS = 3
"""A step runs this often before it is captured, so that libraries have allocated their memory."""


@torch.no_grad()
def sample(
    model: GPT,
    uniforms: Tensor,
    temperature: float,
    bos_id: int,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> tuple[Tensor, Tensor]:
    """Draw B sequences side by side, each from BOS on.

    uniforms: float64 [B, T] in [0, 1); the token at position t of a row comes from the number
    there, so it does not depend on the other rows or on the device's generator. The number at
    position 0, where BOS stands, is not used.
    on_tokens: called with the number of tokens drawn, B, after each step.

    Returns tokens int64 [B, T] and float64 [B, T], the log-probability in nats of each token under
    softmax(logits / temperature), from which it was drawn; NaN at position 0. Both on the CPU.
    """
    batch, length = uniforms.shape
    device = model.token_embedding.device
    uniforms = uniforms.to(device)
    cache = model.new_cache(batch, length)
    tokens = torch.full((batch,), bos_id, dtype=torch.int64, device=device)
    log_probs = torch.full((batch,), torch.nan, dtype=torch.float64, device=device)

    def step() -> None:
        logits = model.decode_step(tokens, cache).double() / temperature
        thresholds = uniforms.gather(1, cache.length.expand(batch, 1)).squeeze(1)
        tokens.copy_(drawn_tokens(logits, thresholds))
        log_probs.copy_(logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1))

    if device.type == "cuda":
        parts = [getattr(cache, field.name) for field in fields(cache)]
        changes = [tokens, log_probs, *(part for part in parts if isinstance(part, Tensor))]
        step = capture(step, warm_up_runs=WARM_UP_RUNS, changes=changes)
    steps = [(tokens.clone(), log_probs.clone())]
    for _ in range(length - 1):
        step()
        steps.append((tokens.clone(), log_probs.clone()))
        on_tokens(batch)
    all_tokens, all_log_probs = (
        torch.stack(part, dim=1).cpu() for part in zip(*steps, strict=True)
    )
    return all_tokens, all_log_probs


def self_generated_tokens(
    model: GPT,
    sequences: int,
    tokens: int,
    temperature: float,
    batch_sequences: int,
    seed: int,
    bos_id: int,
) -> Tensor:
    """Sample from the model: int64 [sequences, tokens] on the CPU, BOS first in each.

    The uniform numbers are drawn on the CPU before the first step, so that the sample does not
    depend on `batch_sequences`, the number of sequences that are drawn side by side.
    """
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(sequences, tokens, dtype=torch.float64, generator=generator)
    with progress(sequences * (tokens - 1), "sampling", "token") as bar:
        samples = [
            sample(model, batch, temperature, bos_id, bar.update)[0]
            for batch in uniforms.split(batch_sequences)
        ]
    return torch.cat(samples)


def sample_documents(
    model: GPT, num_targets: int, document_tokens: int, bos_id: int, seed: int
) -> tuple[Tensor, np.ndarray]:
    """Documents of the model's own, drawn side by side and joined into one text.

    Side by side because a step of the model takes as long for many documents as for one.
    Returns int64 [num_targets + 1] on the model's device, and float64 [num_targets]: the
    log-probability in nats of each target under the distribution that it was drawn from, NaN where
    a document begins.
    """
    length = min(document_tokens, num_targets + 1)
    count = -(-(num_targets + 1) // length)
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(count, length, dtype=torch.float64, generator=generator)
    with progress(count * (length - 1), "null text", "token") as bar:
        tokens, log_probs = sample(model, uniforms, 1.0, bos_id, bar.update)
    text = tokens.flatten()[: num_targets + 1].to(model.token_embedding.device)
    return text, log_probs.flatten()[1 : num_targets + 1].numpy()


def drawn_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw int64 [B] from softmax(logits [B, V]) by inverting its distribution function.

    logits, uniforms: float64 [B, V] and [B], the latter in [0, 1).
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    thresholds = uniforms.unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, thresholds, right=True).squeeze(1)
    # u · total can round up to the total itself.
    return drawn.clamp(max=logits.shape[1] - 1)
