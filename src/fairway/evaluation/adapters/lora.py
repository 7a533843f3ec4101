"""Score-first test-time training: low-rank additions to a frozen model, one set for each lane.

Each lane, a row of the batch, has its own factors, its own optimizer state and its own loss: a
batched matrix product applies them, and nothing that one row holds reaches another. The base
weights stay as they are. A chunk of targets is learned from once it has been scored, and what was
learned of a document is dropped where the next one begins.

Shape suffixes: B rows, T positions, P adapted parameters of a row, r rank.
Sources: Hu et al., "LoRA" (2021); Sun et al., "Test-Time Training" (2020); Kingma & Ba, "Adam"
(2015); Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019).
"""

import math
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from fairway.errors import UserError
from fairway.evaluation.adapters.base import Adapted, Adapter, Context
from fairway.evaluation.forward import deterministic_attention
from fairway.evaluation.text import WindowBatch
from fairway.evaluation.windows import WindowSettings
from fairway.model.gpt import GPT
from fairway.model.spec import PROJECTIONS

SCALES = ("attention_scale", "mlp_scale")
"""The blocks' per-channel scales."""

LEARNING_TOKENS = 32768
"""The rows that learn in one backward pass read so many tokens: a pass keeps many times that."""

Projection = Literal[tuple(PROJECTIONS)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class LoraSettings(Adapter.Settings):
    """How much of the model each lane adapts, and how it learns."""

    rank: int = Field(32, ge=1)
    """The rank of every addition."""
    projections: tuple[Projection, ...] = ("up",)
    """Matrices of every block that get a low-rank addition."""
    scales: bool = False
    """Adapt the blocks' attention_scale and mlp_scale too."""
    learning_rate: float = Field(0.0006, gt=0)
    """The step size of Adam."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of Adam's two running means."""
    weight_decay: float = Field(3.0, ge=0)
    """Decoupled; pulls towards the values that a document's additions began with."""
    gradient_clip: float = Field(1.0, gt=0)
    """The largest norm of a lane's gradient."""
    steps: int = Field(1, ge=1)
    """Optimizer steps on each chunk."""
    chunk_tokens: int = Field(64, ge=1)
    """Scored tokens learned from at a time; a multiple of evaluation.stride_tokens."""
    context_tokens: int = Field(1024, ge=1)
    """Length of the text that a step reads; the chunk is its end."""

    @model_validator(mode="after")
    def _adapts_something_once(self) -> Self:
        if len(set(self.projections)) < len(self.projections):
            raise UserError(
                f"evaluation.adapters.lora.projections is {list(self.projections)}: expected each "
                "once"
            )
        if not self.projections and not self.scales:
            raise UserError(
                "evaluation.adapters.lora adapts nothing: name projections or set scales"
            )
        return self

    def check_fits(self, windows: WindowSettings) -> None:
        """A chunk is whole strides, and lies in a context that lies in a window."""
        chunk, stride = self.chunk_tokens, windows.stride_tokens
        if chunk % stride:
            raise UserError(
                f"evaluation.adapters.lora.chunk_tokens {chunk} is not a multiple of "
                f"evaluation.stride_tokens {stride}: a chunk is learned from when it has been "
                "scored"
            )
        if not chunk <= self.context_tokens <= windows.window_tokens:
            raise UserError(
                f"evaluation.adapters.lora.context_tokens is {self.context_tokens}: expected "
                f"chunk_tokens ({chunk}) to evaluation.window_tokens ({windows.window_tokens})"
            )


def adapted_shapes(
    model: GPT, settings: LoraSettings
) -> dict[tuple[str, int], list[tuple[int, ...]]]:
    """The tensors of one row: (bank, matrix) → A [r, in] and B [out, r]; (scale, block) → [C]."""
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


class BatchedLora:
    """The additions of `rows` rows; `model.adapter` while one of its methods runs the model."""

    def __init__(
        self,
        model: GPT,
        rows: int,
        settings: LoraSettings,
        seed: int,
        learning_tokens: int = LEARNING_TOKENS,
    ) -> None:
        """seed: of the values that every row begins with.

        learning_tokens: how many tokens the rows of one backward pass may read together.
        """
        self.model, self.settings = model, settings
        self.learning_tokens = learning_tokens
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
        """A row's values [P]. All but the factors A are zero, so the additions begin as nothing."""
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
        """y [B, T, out] plus x·Aᵀ·Bᵀ of x [B, T, in], with the factors of each row."""
        if (bank, index) not in self.parts:
            return y
        A, B = self.parts[bank, index]
        return torch.baddbmm(y, torch.bmm(x, A.mT), B.mT)

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
    def logits(self, tokens: Tensor, first_position: int) -> Tensor:
        """The adapted model's logits float32 [B, T − first_position, V] of int64 tokens [B, T]."""
        return self._run(tokens, first_position, self.values)

    def learn(self, tokens: Tensor, targets: Tensor, counted: Tensor) -> None:
        """`settings.steps` Adam steps of each row on its own mean loss.

        tokens int64 [B, T]; targets int64 [B, m], those of the last m positions; counted
        bool [B, m], the targets that a row learns from. A row without any stays as it is.
        """
        share = counted / counted.sum(1, keepdim=True).clamp(min=1)
        learns = counted.any(1, keepdim=True)
        rows = max(1, self.learning_tokens // tokens.shape[1])
        for _ in range(self.settings.steps):
            parts = (part.split(rows) for part in (self.values, tokens, targets, share))
            gradients = [self.gradient(*slices) for slices in zip(*parts, strict=True)]
            self.update(torch.cat(gradients), learns)

    def gradient(self, values: Tensor, tokens: Tensor, targets: Tensor, share: Tensor) -> Tensor:
        """Of each row's loss, its targets weighted by `share`, in the row's values [rows, P]."""
        values = values.detach().requires_grad_()
        with torch.enable_grad(), deterministic_attention(self.model):
            logits = self._run(tokens, tokens.shape[1] - targets.shape[1], values)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            loss = (losses.view_as(share) * share).sum()
        return torch.autograd.grad(loss, values)[0]

    def _run(self, tokens: Tensor, first_position: int, values: Tensor) -> Tensor:
        self.model.adapter = self
        self.parts = self.split(values.to(self.model.compute_dtype))
        try:
            return self.model(tokens, first_position)
        finally:
            self.model.adapter, self.parts = None, {}

    @torch.no_grad()
    def update(self, gradient: Tensor, learns: Tensor) -> None:
        """One step of Adam with decoupled decay, of the rows in the mask bool [B, 1] alone.

        gradient: [B, P]. Each row's is clipped by its own norm.
        """
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


class Lora(Adapter):
    """LoRA as an adapter of the evaluation: changes what follows a chunk that has been scored."""

    title = "LoRA"
    replaces_logits = True
    Settings = LoraSettings
    additions_type = BatchedLora
    """What holds the rows' additions and learns."""

    def __init__(self, settings: LoraSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.lora = self.additions_type(context.model, context.rows, settings, context.seed)
        self.steps_per_chunk = settings.chunk_tokens // context.text.stride_tokens

    @classmethod
    def kernels(cls, settings: LoraSettings, model_kernels: str) -> str:
        """The fused kernels know no adapted scales."""
        return "plain" if settings.scales else model_kernels

    def adapt(self, batch: WindowBatch, logits: Tensor, scored: Tensor) -> Adapted:
        """The adapted model's logits for the document that the slice begins in, else as given."""
        if batch.step == 0:
            self.lane_starts = batch.first_scored
        adapted = self.lora.logits(batch.inputs, batch.first_position)
        positions = batch.last_positions(logits.shape[1])
        applies = batch.text.in_document(positions, batch.slice_documents)
        logits = torch.where(applies.unsqueeze(2), adapted, logits)
        return Adapted(logits, batch.at_scored(logits))

    def learn(self, batch: WindowBatch) -> None:
        """Forget the document that ended; every few steps learn from the last scored chunk."""
        text = batch.text
        document = text.documents[batch.ends]
        self.lora.reset((document != batch.slice_documents)[:, 0])
        if (batch.step + 1) % self.steps_per_chunk:
            return
        length = text.windows.length
        positions = batch.last_positions(min(self.settings.chunk_tokens, length))
        # A lane knows nothing of what another one has scored.
        counted = text.in_document(positions, document) & (positions >= self.lane_starts)
        inputs = batch.last_inputs(min(self.settings.context_tokens, length))
        self.lora.learn(inputs, text.tokens[positions], counted & batch.real)
