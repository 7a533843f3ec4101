"""The model's configuration, and the one table of its parameters.

A config is checked without PyTorch, which takes seconds to load. From the table follow initial
values, the optimizer's groups, storage in an artifact, the slices that test-time training freezes,
and the check of a weights file.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fairway.errors import UserError
from fairway.settings import Settings


class ModelSettings(Settings):
    """The model's sizes and constants. Every default of a feature changes no number."""

    layers: int = Field(11, ge=1)
    """Blocks."""
    width: int = Field(512, ge=1)
    """Channels of the residual stream."""
    heads: int = Field(8, ge=1)
    """Query heads; they divide the width."""
    kv_heads: int = Field(4, ge=1)
    """Key and value heads; each serves heads / kv_heads query heads."""
    mlp_width: int = Field(1536, ge=1)
    """Channels inside the MLP."""
    rotary_dimensions: int = Field(16, ge=2)
    """The first dimensions of each head, which the rotary embedding turns."""
    rope_base: float = Field(10000.0, gt=0)
    """Base of the rotary embedding's frequencies."""
    rope_trained_tokens: int = Field(1024, ge=1)
    """Longer sequences rescale the base."""
    bigram_buckets: int = Field(2048, ge=2)
    """Rows of the table of hashed bigrams."""
    bigram_width: int = Field(128, ge=1)
    """Columns of the table of hashed bigrams."""
    value_width: int = Field(128, ge=1)
    """Columns of the value embedding."""
    value_layers: tuple[Annotated[int, Field(ge=0)], ...] = (9, 10)
    """Blocks that receive the value embedding, counted from 0."""
    logit_softcap: float = Field(30.0, gt=0)
    """Logits are cap·tanh(· / cap)."""
    query_gain: float = Field(5.0, gt=0)
    """Initial gain of each query head."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        width, heads, kv_heads = self.width, self.heads, self.kv_heads
        if width % heads:
            raise UserError(f"model.heads {heads} does not divide model.width {width}")
        if heads % kv_heads:
            raise UserError(f"model.kv_heads {kv_heads} does not divide model.heads {heads}")
        if self.rotary_dimensions > self.head_width or self.rotary_dimensions % 2:
            raise UserError(
                f"model.rotary_dimensions {self.rotary_dimensions} must be even and at most the "
                f"head width {self.head_width} (model.width / model.heads)"
            )
        outside = [layer for layer in self.value_layers if layer >= self.layers]
        if outside:
            raise UserError(
                f"model.value_layers names block {outside[0]}, but model.layers is {self.layers}"
            )
        return self

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        """Channels of all key heads, and of all value heads."""
        return self.kv_heads * self.head_width

    @property
    def skips(self) -> int:
        """Encoder outputs that a decoder block takes up."""
        return min(self.layers // 2, self.layers - self.layers // 2)


class GPTConfig(ModelSettings):
    """Everything that fixes the parameters' shapes and the function that they compute.

    Weights files and artifacts hold it. A file without a key is older than the key and means its
    default.
    """

    vocab_size: int = Field(1024, ge=1)
    """Tokens of the vocabulary, from the dataset's tokenizer."""
    sequence_tokens: int = Field(2048, ge=1)
    """Length of the sequences in training; with rope_trained_tokens it fixes the rotary base."""


@dataclass(frozen=True)
class Normal:
    """Initial values drawn from N(0, std²)."""

    std: float


@dataclass(frozen=True)
class Orthogonal:
    """Initial matrices [n, out, in], each orthogonal; those from index `zero_from` on are zero.

    The zero ones are drawn too, so that other numbers of them change no later parameter.
    """

    zero_from: int | None = None


@dataclass(frozen=True)
class Parameter:
    """The description of a parameter."""

    shape: tuple[int, ...]
    initial: float | tuple[float, ...] | Normal | Orthogonal
    """A constant, or one constant for each index of the second axis, or how it is drawn."""
    group: Literal["matrix", "embedding", "scalar"]
    """Matrices inside the network are trained by Muon; the others by AdamW, with two rates."""
    storage: Literal["quantized", "int8", "float16", "float32"]
    """How an artifact stores it; quantized: by the quantizer of the config."""
    per_block: bool = False
    """Whether row i of the first axis belongs to block i modulo the number of blocks."""


def parameters(config: GPTConfig) -> dict[str, Parameter]:
    """Name → description of every parameter, in the order in which initial values are drawn."""
    layers, width, kv_width = config.layers, config.width, config.kv_width

    def bank(count: int, rows: int, columns: int, initial: float | Orthogonal) -> Parameter:
        return Parameter((count, rows, columns), initial, "matrix", "quantized", per_block=True)

    def table(rows: int, columns: int, initial: float | Normal) -> Parameter:
        return Parameter((rows, columns), initial, "embedding", "int8")

    def projection(rows: int, columns: int) -> Parameter:
        return Parameter((rows, columns), 0.0, "scalar", "float16")

    def scalar(*shape: int, initial: float | tuple[float, ...], per_block: bool = False):
        return Parameter(shape, initial, "scalar", "float32", per_block)

    described = {
        "token_embedding": table(config.vocab_size, width, Normal(0.005)),
        "bigram_embedding": table(config.bigram_buckets, config.bigram_width, 0.0),
        "bigram_projection": projection(width, config.bigram_width),
        "bigram_scale": scalar(initial=0.05),
        "smear_gate": scalar(width, initial=0.0),
        "value_embedding": table(config.vocab_size, config.value_width, Normal(0.01)),
        "value_projection": projection(kv_width, config.value_width),
        "value_scale": scalar(initial=0.1),
        "value_layer_scales": scalar(len(config.value_layers), initial=1.0),
        "query_output_bank": bank(2 * layers, width, width, Orthogonal(zero_from=layers)),
        "key_value_bank": bank(2 * layers, kv_width, width, Orthogonal()),
        "mlp_up_bank": bank(layers, config.mlp_width, width, Orthogonal()),
        "mlp_down_bank": bank(layers, width, config.mlp_width, 0.0),
        "residual_mix": scalar(layers, 2, width, initial=(1.0, 0.0), per_block=True),
        "attention_scale": scalar(layers, width, initial=1.0, per_block=True),
        "mlp_scale": scalar(layers, width, initial=1.0, per_block=True),
        "query_gain": scalar(layers, config.heads, initial=config.query_gain, per_block=True),
        "skip_weights": scalar(config.skips, width, initial=1.0),
    }
    return described


PROJECTIONS = {
    "query": ("query_output_bank", 0),
    "output": ("query_output_bank", 1),
    "key": ("key_value_bank", 0),
    "value": ("key_value_bank", 1),
    "up": ("mlp_up_bank", 0),
    "down": ("mlp_down_bank", 0),
}
"""A block's matrices: the bank of each, and whether it lies in the bank's first or second half."""

BANKS = tuple(dict.fromkeys(bank for bank, _ in PROJECTIONS.values()))
"""The parameters that hold the blocks' matrices, each [matrices, out, in]."""


def block_of_rows(name: str, config: GPTConfig) -> list[int] | None:
    """The block that each row of a parameter's first axis belongs to; None where none does."""
    parameter = parameters(config)[name]
    if not parameter.per_block:
        return None
    return [row % config.layers for row in range(parameter.shape[0])]
