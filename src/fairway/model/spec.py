"""The model's configuration, and the one table of its parameters.

A config is checked without PyTorch, which takes seconds to load. From the table follow initial
values, the optimizer's groups, storage in an artifact, the slices that test-time training freezes,
and the check of a weights file.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from fairway.errors import UserError
from fairway.settings import Settings

BlockNumber = Annotated[int, Field(ge=0)]


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
    bigram_buckets: int = Field(2048, ge=0)
    """Rows of the table of hashed bigrams, at least 2; 0: no such table."""
    bigram_width: int = Field(128, ge=1)
    """Columns of the table of hashed bigrams."""
    value_width: int = Field(128, ge=1)
    """Columns of the value embedding."""
    value_layers: tuple[BlockNumber, ...] = (9, 10)
    """Blocks that receive the value embedding, counted from 0; none: there is no such embedding."""
    logit_softcap: float = Field(30.0, gt=0)
    """Logits are cap·tanh(· / cap)."""
    query_gain: float = Field(5.0, gt=0)
    """Initial gain of each query head."""
    activation_slope: float = Field(0.5, ge=0, lt=1)
    """The MLP's activation is leaky_relu(·, slope)²."""
    head_gate_dimensions: int = Field(0, ge=0)
    """Channels of a block's attention input that gate each head's output; 0: no gate."""
    smear: Literal["channel", "input", "none"] = "channel"
    """How the embedding before is mixed into each: with a gate for each channel; with one gate that
    depends on the embedding, and not at a BOS; or not."""
    smear_dimensions: int = Field(12, ge=1)
    """Channels of the embedding that the gate of `smear: input` depends on."""
    skip_gates: bool = False
    """Whether a skip is mixed in by a learned gate for each channel, not added."""
    recurrent_layers: tuple[BlockNumber, ...] = ()
    """A run of blocks that is executed several times, such as [3, 4, 5], counted from 0."""
    recurrence_passes: int = Field(1, ge=1)
    """How often the run is executed in all, with the same weights."""
    asymmetric_softcap: bool = False
    """Whether the caps of positive and of negative logits are learned, from logit_softcap on."""
    document_masks: bool = False
    """Whether attention sees only the positions from its own document's BOS on."""

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
        if self.bigram_buckets == 1:
            raise UserError("model.bigram_buckets is 1: expected at least 2, or 0 for no bigrams")
        for key in ("value_layers", "recurrent_layers"):
            outside = [layer for layer in getattr(self, key) if layer >= self.layers]
            if outside:
                raise UserError(
                    f"model.{key} names block {outside[0]}, but model.layers is {self.layers}"
                )
        self._check_recurrence()
        gates = ["head_gate_dimensions", *(["smear_dimensions"] if self.smear == "input" else [])]
        for key in gates:
            if getattr(self, key) > width:
                raise UserError(f"model.{key} {getattr(self, key)} exceeds model.width {width}")
        return self

    def _check_recurrence(self) -> None:
        run, passes = self.recurrent_layers, self.recurrence_passes
        if any(after != before + 1 for before, after in pairwise(run)):
            raise UserError(
                f"model.recurrent_layers is {list(run)}: expected neighboring blocks in ascending "
                "order, such as [3, 4, 5]"
            )
        if passes > 1 and not run:
            raise UserError(
                f"model.recurrence_passes is {passes} but model.recurrent_layers names no block"
            )

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        """Channels of all key heads, and of all value heads."""
        return self.kv_heads * self.head_width

    @property
    def steps(self) -> int:
        """Executions of blocks in a forward pass, recurrence included."""
        return self.layers + (self.recurrence_passes - 1) * len(self.recurrent_layers)

    @property
    def skips(self) -> int:
        """Encoder outputs that a decoder step takes up, recurrence included."""
        return self.steps // 2


class GPTConfig(ModelSettings):
    """Everything that fixes the parameters' shapes and the function that they compute.

    Weights files and artifacts hold it. A file without a key is older than the key and means its
    default.
    """

    vocab_size: int = Field(1024, ge=1)
    """Tokens of the vocabulary, from the dataset's tokenizer."""
    sequence_tokens: int = Field(2048, ge=1)
    """Length of the sequences in training; with rope_trained_tokens it fixes the rotary base."""
    bos_id: int = Field(1, ge=0)
    """The token that begins each document, from the dataset's tokenizer."""


class BlockOrder(NamedTuple):
    """The order in which a model's blocks run, one a step."""

    blocks: tuple[int, ...]
    """The block of each step; those that recur come several times."""
    encoders: int
    """Steps of the encoder half, the first; each gives its output to one of the decoder half."""

    def skip(self, step: int) -> tuple[int, int] | None:
        """The row of the skip weights and the encoder step whose output `step` takes up, if any.

        Last in, first out: the decoder half's first step takes the last encoder output.
        """
        row = step - self.encoders
        return (row, self.encoders - 1 - row) if 0 <= row < self.encoders else None


def block_order(config: ModelSettings, recurs: bool = True) -> BlockOrder:
    """The order of the blocks; recurs: whether recurrent_layers run as often as they can."""
    run, passes = config.recurrent_layers, config.recurrence_passes if recurs else 1
    last = run[-1] + 1 if run else 0
    blocks = (*range(last), *run * (passes - 1), *range(last, config.layers))
    return BlockOrder(blocks, len(blocks) // 2)


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
    return _of_embeddings(config) | _of_blocks(config) | _of_gates(config)


def _of_embeddings(config: GPTConfig) -> dict[str, Parameter]:
    width = config.width
    found = {"token_embedding": _table(config.vocab_size, width, Normal(0.005))}
    if config.bigram_buckets:
        found |= {
            "bigram_embedding": _table(config.bigram_buckets, config.bigram_width, 0.0),
            "bigram_projection": _scalar(width, config.bigram_width, storage="float16"),
            "bigram_scale": _scalar(initial=0.05),
        }
    if config.smear == "channel":
        found["smear_gate"] = _scalar(width)
    if config.value_layers:
        found |= {
            "value_embedding": _table(config.vocab_size, config.value_width, Normal(0.01)),
            "value_projection": _scalar(config.kv_width, config.value_width, storage="float16"),
            "value_scale": _scalar(initial=0.1),
            "value_layer_scales": _scalar(len(config.value_layers), initial=1.0),
        }
    return found


def _of_blocks(config: GPTConfig) -> dict[str, Parameter]:
    layers, width = config.layers, config.width
    blocks = {"per_block": True}
    return {
        "query_output_bank": _bank(2 * layers, width, width, Orthogonal(zero_from=layers)),
        "key_value_bank": _bank(2 * layers, config.kv_width, width, Orthogonal()),
        "mlp_up_bank": _bank(layers, config.mlp_width, width, Orthogonal()),
        "mlp_down_bank": _bank(layers, width, config.mlp_width, 0.0),
        "residual_mix": _scalar(layers, 2, width, initial=(1.0, 0.0), **blocks),
        "attention_scale": _scalar(layers, width, initial=1.0, **blocks),
        "mlp_scale": _scalar(layers, width, initial=1.0, **blocks),
        "query_gain": _scalar(layers, config.heads, initial=config.query_gain, **blocks),
        "skip_weights": _scalar(config.skips, width, initial=1.0),
    }


def _of_gates(config: GPTConfig) -> dict[str, Parameter]:
    found = {}
    if dimensions := config.head_gate_dimensions:
        shape = (config.layers, config.heads, dimensions)
        found["head_gate"] = _scalar(*shape, storage="float16", per_block=True)
    if config.smear == "input":
        found |= {"smear_scale": _scalar(), "smear_weights": _scalar(config.smear_dimensions)}
    if config.skip_gates:
        found["skip_gate"] = _scalar(config.skips, config.width, storage="float16")
    if config.asymmetric_softcap:
        found["softcaps"] = _scalar(2, initial=config.logit_softcap)
    return found


def _bank(count: int, rows: int, columns: int, initial: float | Orthogonal) -> Parameter:
    return Parameter((count, rows, columns), initial, "matrix", "quantized", per_block=True)


def _table(rows: int, columns: int, initial: float | Normal) -> Parameter:
    return Parameter((rows, columns), initial, "embedding", "int8")


def _scalar(*shape: int, initial=0.0, storage="float32", per_block=False) -> Parameter:
    return Parameter(shape, initial, "scalar", storage, per_block)


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
