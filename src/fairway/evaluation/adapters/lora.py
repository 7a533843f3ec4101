"""Score-first test-time training: low-rank additions to a frozen model, one set for each lane.

Each lane, a row of the batch, has its own factors, its own optimiser state and its own loss: a
batched matrix product applies them, and nothing that one row holds reaches another. The base
weights stay as they are. A chunk of targets is learned from once it has been scored, and what was
learned of a document is dropped where the next one begins.

Shape suffixes: B rows, T places, P adapted parameters of a row, r rank.
Sources: Hu et al., "LoRA" (2021); Sun et al., "Test-Time Training" (2020); Kingma & Ba, "Adam"
(2015); Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.errors import UserError
from fairway.evaluation.stream import Rows
from fairway.model.gpt import GPT, PROJECTIONS

SCALES = ("attention_scale", "mlp_scale")

LEARNING_TOKENS = 32768
"""Of the rows that learn in one backward pass: what a pass keeps is many times its tokens."""


@dataclass(frozen=True)
class LoraSettings:
    """The config section `lora`."""

    rank: int
    projections: Sequence[str]
    """Which matrices of every block, out of PROJECTIONS."""
    scales: bool
    """Whether the blocks' per-channel scales are adapted too."""
    learning_rate: float
    betas: Sequence[float]
    weight_decay: float
    """Pulls a row's values back to where they began, decoupled from the gradient."""
    gradient_clip: float
    """Largest norm of a row's gradient."""
    steps: int
    """Optimiser steps on each chunk."""
    chunk_tokens: int
    """Scored tokens that are learned from at a time; a multiple of the stride."""
    context_tokens: int
    """Length of the text that a step reads; the chunk is its end."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.projections) - set(PROJECTIONS))
        if unknown:
            raise UserError(
                f"lora.projections has {', '.join(unknown)}: expected some of "
                f"{', '.join(PROJECTIONS)}"
            )
        for key in (
            "rank",
            "steps",
            "chunk_tokens",
            "context_tokens",
            "learning_rate",
            "gradient_clip",
        ):
            if getattr(self, key) <= 0:
                raise UserError(f"lora.{key} is {getattr(self, key)}: expected more than 0")
        if self.weight_decay < 0:
            raise UserError(f"lora.weight_decay is {self.weight_decay}: expected at least 0")


def lora_kernels(model: GPT, settings: LoraSettings) -> str:
    """Which formulation computes the adapted model, for metrics.json."""
    return "plain" if settings.scales else model.kernels


def adapted_shapes(
    model: GPT, settings: LoraSettings
) -> dict[tuple[str, int], list[tuple[int, ...]]]:
    """The tensors of one row: (bank, matrix) → [r, in] and [out, r]; (scale, block) → [C]."""
    shapes: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    layers, rank = model.config.layers, settings.rank
    for projection in settings.projections:
        bank, half = PROJECTIONS[projection]
        _, out_width, in_width = getattr(model, bank).shape
        for layer in range(layers):
            shapes[bank, half * layers + layer] = [(rank, in_width), (out_width, rank)]
    for name in SCALES if settings.scales else ():
        for layer in range(layers):
            shapes[name, layer] = [(model.config.width,)]
    return shapes


class RowLora:
    """The additions of `rows` rows; `model.adapter` while one of its methods runs the model."""

    def __init__(self, model: GPT, rows: int, settings: LoraSettings, seed: int) -> None:
        self.model, self.settings = model, settings
        self.shapes = adapted_shapes(model, settings)
        initial = self._initial_values(torch.Generator().manual_seed(seed))
        device = model.token_embedding.device
        self.initial = initial.to(device)
        self.values = self.initial.repeat(rows, 1)
        self.mean = torch.zeros_like(self.values)
        self.square = torch.zeros_like(self.mean)
        self.steps = torch.zeros(rows, 1, device=device)
        self.parts: dict[tuple[str, int], tuple[Tensor, ...]] = {}
        self.changes_scales = settings.scales
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def _initial_values(self, generator: torch.Generator) -> Tensor:
        """A row's, [P]. All but first factors are zero, so that the additions begin as nothing."""
        values = [
            torch.randn(math.prod(shape), generator=generator) / math.sqrt(shape[1])
            if len(shapes) == 2 and number == 0
            else torch.zeros(math.prod(shape))
            for shapes in self.shapes.values()
            for number, shape in enumerate(shapes)
        ]
        return torch.cat(values)

    def split(self, values: Tensor) -> dict[tuple[str, int], tuple[Tensor, ...]]:
        """What values [B, P] hold for each adapted matrix or scale, by name and index.

        One split, whose gradient is one concatenation; the gradient of a slice is all of [B, P].
        """
        sizes = [math.prod(shape) for shapes in self.shapes.values() for shape in shapes]
        pieces = iter(values.split(sizes, dim=1))
        return {
            key: tuple(next(pieces).unflatten(1, shape) for shape in shapes)
            for key, shapes in self.shapes.items()
        }

    def product(self, bank: str, index: int, x: Tensor, y: Tensor) -> Tensor:
        """y [B, T, out] plus the row's own low-rank product of x [B, T, in]."""
        if (bank, index) not in self.parts:
            return y
        first, second = self.parts[bank, index]
        return torch.baddbmm(y, torch.bmm(x, first.mT), second.mT)

    def scale(self, name: str, layer: int, value: Tensor) -> Tensor:
        """value [C] plus the row's own addition, [B, 1, C]; value where there is none."""
        if (name, layer) not in self.parts:
            return value
        (addition,) = self.parts[name, layer]
        return value + addition.unsqueeze(1)

    @torch.no_grad()
    def reset(self, rows: Tensor) -> None:
        """Start anew the rows in the mask bool [B]."""
        rows = rows.unsqueeze(1)
        self.values.copy_(torch.where(rows, self.initial, self.values))
        for state in (self.mean, self.square, self.steps):
            state.masked_fill_(rows, 0.0)

    @torch.no_grad()
    def logits(self, tokens: Tensor, first_place: int) -> Tensor:
        """The adapted model's logits float32 [B, T − first_place, V] of int64 tokens [B, T]."""
        return self._run(tokens, first_place, self.values)

    def learn(self, tokens: Tensor, targets: Tensor, counted: Tensor) -> None:
        """`settings.steps` Adam steps of each row on its own mean loss.

        tokens int64 [B, T]; targets int64 [B, m] of the last m places; counted bool [B, m]: those
        that a row learns from. A row without any stays as it is.
        """
        share = counted / counted.sum(1, keepdim=True).clamp(min=1)
        learns = counted.any(1, keepdim=True)
        rows = max(1, LEARNING_TOKENS // tokens.shape[1])
        for _ in range(self.settings.steps):
            parts = (part.split(rows) for part in (self.values, tokens, targets, share))
            gradients = [self._gradient(*slices) for slices in zip(*parts, strict=True)]
            self._update(torch.cat(gradients), learns)

    def _gradient(self, values: Tensor, tokens: Tensor, targets: Tensor, share: Tensor) -> Tensor:
        """Of each row's loss, the targets' weighted by `share`, in its values [rows, P]."""
        values = values.detach().requires_grad_()
        with torch.enable_grad(), deterministic_attention(self.model):
            logits = self._run(tokens, tokens.shape[1] - targets.shape[1], values)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            loss = (losses.view_as(share) * share).sum()
        return torch.autograd.grad(loss, values)[0]

    def _run(self, tokens: Tensor, first_place: int, values: Tensor) -> Tensor:
        self.model.adapter = self
        self.parts = self.split(values.to(self.model.compute_dtype))
        try:
            return self.model(tokens, first_place)
        finally:
            self.model.adapter, self.parts = None, {}

    @torch.no_grad()
    def _update(self, gradient: Tensor, learns: Tensor) -> None:
        beta1, beta2 = self.settings.betas
        norm = gradient.norm(dim=1, keepdim=True)
        gradient = gradient * (self.settings.gradient_clip / (norm + 1e-6)).clamp(max=1.0)
        self.steps += learns
        self.mean.copy_(torch.where(learns, self.mean.lerp(gradient, 1 - beta1), self.mean))
        square = self.square.lerp(gradient.square(), 1 - beta2)
        self.square.copy_(torch.where(learns, square, self.square))
        count = self.steps.clamp(min=1)
        mean = self.mean / (1 - beta1**count)
        root = (self.square / (1 - beta2**count)).sqrt() + 1e-8
        drift = self.settings.weight_decay * (self.values - self.initial)
        self.values -= self.settings.learning_rate * torch.where(learns, mean / root + drift, 0.0)


@contextmanager
def deterministic_attention(model: GPT) -> Iterator[None]:
    """What is learned is part of the score, and an audit that repeats it must find it again."""
    model.deterministic_attention = True
    try:
        yield
    finally:
        model.deterministic_attention = False


class LoraAdapter:
    """LoRA as an adapter of the evaluation: changes what follows a chunk that has been scored."""

    def __init__(self, model: GPT, rows: int, settings: LoraSettings, stride: int, seed: int):
        self.lora = RowLora(model, rows, settings, seed)
        self.settings = settings
        self.steps_per_chunk = settings.chunk_tokens // stride

    def needed_places(self, step: int) -> int:
        """None beside the scored ones."""
        return 0

    def adapt(self, rows: Rows, logits: Tensor, scored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The adapted model's logits for the document that the slice begins in, else as given."""
        if rows.step == 0:
            self.lane_starts = rows.first_scored
        adapted = self.lora.logits(rows.inputs, rows.first_place)
        positions = rows.last_positions(logits.shape[1])
        applies = rows.stream.in_document(positions, rows.slice_documents)
        logits = torch.where(applies.unsqueeze(2), adapted, logits)
        return logits, rows.at_scored(logits), rows.positions.new_zeros(0)

    def learn(self, rows: Rows) -> None:
        """Forget the document that ended; every few steps learn from the last scored chunk."""
        document = rows.stream.documents[rows.ends]
        self.lora.reset((document != rows.slice_documents)[:, 0])
        if (rows.step + 1) % self.steps_per_chunk:
            return
        length = rows.stream.windows.length
        positions = rows.last_positions(min(self.settings.chunk_tokens, length))
        # A lane knows nothing of what another one has scored.
        counted = rows.stream.in_document(positions, document) & (positions >= self.lane_starts)
        inputs = rows.last_inputs(min(self.settings.context_tokens, length))
        self.lora.learn(inputs, rows.stream.tokens[positions], counted & rows.real)
