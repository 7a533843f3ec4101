"""Sliding windows, SLOT and sampling as the reference submission has them, on the baseline model.

Shapes: B windows of a batch, T tokens of a window, V vocabulary.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from baseline import BaselineGPT, baseline_attention
from torch import Tensor

from fairway.evaluation.adapters.slot import SlotSettings
from fairway.evaluation.settings import EvaluationSettings
from fairway.evaluation.windows import Windows, sliding_windows

Logits = Callable[[Tensor], Tensor]
"""tokens int64 [B, T] → logits float32 [B, T, V]."""


def baseline_logits(model: BaselineGPT, compile_model: bool) -> Logits:
    """The forward pass of the submission's evaluation: compiled, logits of every position."""
    forward = torch.compile(model, dynamic=False, fullgraph=True) if compile_model else model
    device = model.smear_gate.device

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        with baseline_attention(device):
            return forward(tokens)

    return logits


def cut_windows(stream: Tensor, settings: EvaluationSettings) -> Windows:
    """Those that score `stream` int64 [n + 1]."""
    return sliding_windows(len(stream) - 1, settings.window_tokens, settings.stride_tokens)


def slot_of(settings: EvaluationSettings) -> SlotSettings:
    """SLOT's own settings in an evaluation that lists it."""
    return next(choice.settings for choice in settings.adapters if choice.name == "slot")


def focal_positions(settings: EvaluationSettings) -> int:
    """The last positions of a window that a delta may be fitted to."""
    focal = slot_of(settings).focal_tokens
    return settings.window_tokens if focal == "all" else int(focal)


def batches_of(windows: Windows, size: int) -> list[range]:
    """Indices of `size` consecutive windows at a time."""
    edges = [*range(0, len(windows), size), len(windows)]
    return [range(first, last) for first, last in pairwise(edges)]


def window_rows(stream: Tensor, windows: Windows, batch: range) -> tuple[Tensor, Tensor]:
    """Inputs and targets int64 [B, T]."""
    starts = [int(windows.starts[index]) for index in batch]
    inputs = torch.stack([stream[start : start + windows.length] for start in starts])
    targets = torch.stack([stream[start + 1 : start + windows.length + 1] for start in starts])
    return inputs, targets


def all_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of every position, float32 [B, T]."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view_as(targets)


def scored_slices(losses: Tensor, windows: Windows, batch: range) -> list[Tensor]:
    """Of each window the losses that it scores."""
    return [
        row[windows.length - int(windows.scored[index]) :]
        for row, index in zip(losses, batch, strict=True)
    ]


@torch.no_grad()
def baseline_sliding(logits: Logits, stream: Tensor, settings: EvaluationSettings) -> Tensor:
    """Nats of every target of `stream` int64 [n + 1], float32 [n].

    settings: list SLOT, whose batches of windows the forward passes take.
    """
    windows = cut_windows(stream, settings)
    parts: list[Tensor] = []
    for batch in batches_of(windows, slot_of(settings).batch_windows):
        inputs, targets = window_rows(stream, windows, batch)
        parts += scored_slices(all_losses(logits(inputs), targets), windows, batch)
    return torch.cat(parts)


def baseline_slot(logits: Logits, stream: Tensor, settings: EvaluationSettings) -> Tensor:
    """Nats of every target with one delta fitted to each batch of windows, float32 [n].

    The delta of a batch is where the next one's fit begins.
    """
    windows = cut_windows(stream, settings)
    delta, parts = None, []
    for batch in batches_of(windows, slot_of(settings).batch_windows):
        inputs, targets = window_rows(stream, windows, batch)
        base = logits(inputs)
        if delta is None:
            delta = torch.zeros(1, 1, base.size(-1), device=base.device)
        mask = context_mask(windows, batch, settings, base.device)
        delta = baseline_fit(base, targets, mask, delta, slot_of(settings))
        with torch.no_grad():
            parts += scored_slices(all_losses(base + delta, targets), windows, batch)
    return torch.cat(parts)


def context_mask(
    windows: Windows, batch: range, settings: EvaluationSettings, device: torch.device
) -> Tensor:
    """float32 [B, T]: one where a focal position precedes its window's scored slice."""
    focal = focal_positions(settings)
    mask = torch.zeros(len(batch), windows.length, device=device)
    for row, index in enumerate(batch):
        last = windows.length - int(windows.scored[index])
        mask[row, max(0, windows.length - focal) : last] = 1.0
    return mask


def baseline_fit(
    logits: Tensor, targets: Tensor, mask: Tensor, initial: Tensor, settings: SlotSettings
) -> Tensor:
    """The submission's fit: every closure call runs over all positions of all windows."""
    delta = initial.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [delta],
        lr=1.0,
        max_iter=settings.iterations,
        history_size=settings.history,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = all_losses(logits + delta, targets)
        loss = (losses * mask).sum() / mask.sum()
        if settings.l2:  # the submission has none
            loss = loss + settings.l2 / 2 * delta.square().sum() / mask.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return delta.detach().clamp(-settings.clamp, settings.clamp)


@torch.no_grad()
def baseline_next_tokens(
    model: BaselineGPT, prefix: Tensor, temperature: float, generator: torch.Generator
) -> Tensor:
    """Without a cache: the whole prefix int64 [B, n] again for one new token each, int64 [B]."""
    with baseline_attention(prefix.device):
        logits = model(prefix)[:, -1]
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
