"""Training, optimizer and TTT as the reference submission has them, on the baseline model."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from baseline import BaselineGPT, baseline_attention
from torch import Tensor

from fairway.data.dataset import Span
from fairway.model.spec import BANKS
from fairway.training.trainer import TrainSettings
from fairway.training.ttt import TTTSettings

MICRO_BATCHES = 8
"""Of a step on one GPU: 786,432 tokens in eight times 98,304."""

ENOUGH_TOKENS = 50_000_000
"""Of training text kept in memory; a benchmark reads no further."""


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Muon's orthogonalization of a bank [n, out, in], in bfloat16 on CUDA."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    transposed = x.size(-2) > x.size(-1)
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class BaselineOptimizer:
    """Muon bank by bank, fused AdamW for the rest, clipping by PyTorch's own function."""

    def __init__(self, model: BaselineGPT, settings: TrainSettings) -> None:
        self.model, self.settings = model, settings
        self.banks = [getattr(model, name) for name in BANKS]
        self.momenta = [torch.zeros_like(bank) for bank in self.banks]
        embeddings = [
            module.weight
            for module in (model.token_embedding, model.bigram_embedding, model.value_embedding)
        ]
        taken = {id(parameter) for parameter in (*self.banks, *embeddings)}
        scalars = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        self.adam = torch.optim.AdamW(
            [
                {"params": embeddings, "lr": settings.embedding_learning_rate},
                {"params": scalars, "lr": settings.scalar_learning_rate},
            ],
            betas=settings.adam_betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients, which it clears."""
        settings = self.settings
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.gradient_clip)
        for bank, momentum in zip(self.banks, self.momenta, strict=True):
            momentum.mul_(settings.muon_momentum).add_(bank.grad)
            update = bank.grad.add(momentum, alpha=settings.muon_momentum)
            update = newton_schulz(update, settings.newton_schulz_steps)
            scale = max(1.0, bank.size(-2) / bank.size(-1)) ** 0.5
            bank.mul_(1 - settings.matrix_learning_rate * settings.weight_decay)
            bank.add_(update.to(bank.dtype), alpha=-settings.matrix_learning_rate * scale)
        self.adam.step()
        self.model.zero_grad(set_to_none=True)


class BaselineAverages:
    """One moving average per decay, tensor after tensor."""

    def __init__(self, model: BaselineGPT, decays: Sequence[float]) -> None:
        self.model = model
        self.averages = {
            decay: {name: value.detach().clone() for name, value in model.state_dict().items()}
            for decay in decays
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present weights."""
        for decay, average in self.averages.items():
            for name, value in self.model.state_dict().items():
                average[name].mul_(decay).add_(value.float(), alpha=1 - decay)


class SequentialBatches:
    """Reads the training text from its beginning on, one micro-batch after another."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        parts: list[np.ndarray] = []
        for span in spans:
            if sum(map(len, parts)) < ENOUGH_TOKENS:
                parts.append(span.read())
        self.tokens = np.concatenate(parts)
        self.device, self.position = device, 0

    def next(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets int64 [rows, length] on the device."""
        count = rows * length
        if self.position + count + 1 > len(self.tokens):
            self.position = 0
        chunk = self.tokens[self.position : self.position + count + 1].astype(np.int64)
        self.position += count
        stream = torch.from_numpy(chunk)
        if self.device.type == "cuda":
            stream = stream.pin_memory().to(self.device, non_blocking=True)
        return stream[:-1].view(rows, length), stream[1:].view(rows, length)


class BaselineTrainer:
    """The submission's training loop on one GPU."""

    def __init__(
        self,
        model: BaselineGPT,
        settings: TrainSettings,
        spans: Sequence[Span],
        compile_model: bool,
    ) -> None:
        self.model, self.settings = model, settings
        self.device = model.smear_gate.device
        self.optimizer = BaselineOptimizer(model, settings)
        self.averages = BaselineAverages(model, settings.ema_decays[:1])
        self.batches = SequentialBatches(spans, self.device)
        self.loss = compiled(model.loss) if compile_model else model.loss

    def step(self) -> float:
        """One step of `batch_tokens` tokens; returns the mean loss in nats."""
        settings = self.settings
        micro_batches = math.gcd(MICRO_BATCHES, settings.batch_sequences)
        rows = settings.batch_sequences // micro_batches
        total = torch.zeros((), device=self.device)
        for _ in range(micro_batches):
            inputs, targets = self.batches.next(rows, settings.sequence_tokens)
            with baseline_attention(self.device):
                loss = self.loss(inputs, targets)
                (loss / micro_batches).backward()
            total += loss.detach()
        self.optimizer.step()
        self.averages.update()
        return float(total) / micro_batches


def compiled(function: Callable) -> Callable:
    """As the submission compiles: one shape, one graph."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def baseline_ttt(
    model: BaselineGPT,
    loss_function: Callable,
    sequences: tuple[Tensor, Tensor],
    settings: TTTSettings,
    seed: int,
) -> list[float]:
    """The submission's test-time training: each epoch's mean loss in nats.

    sequences: inputs and targets int64 [S, T] on the CPU. Blocks are frozen as in its code, where
    that holds the blocks' own small parameters and not their matrices.
    """
    device = model.smear_gate.device
    for block in model.blocks[: settings.frozen_blocks]:
        block.requires_grad_(False)
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=settings.learning_rate, weight_decay=0.0)
    size, count = settings.batch_sequences, len(sequences[0])
    losses = []
    for epoch in range(settings.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        total = 0.0
        for first in range(0, count, size):
            rows = torch.from_numpy(order[first : first + size])
            inputs, targets = (part[rows].to(device) for part in sequences)
            fall = 0.5 * (1 + math.cos(math.pi * first / count))
            floor = settings.final_learning_rate_fraction
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (floor + (1 - floor) * fall)
            with baseline_attention(device):
                loss = loss_function(inputs, targets)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(moving, settings.gradient_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += float(loss.detach()) * len(rows)
        losses.append(total / count)
    return losses
