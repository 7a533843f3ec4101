"""The record's decoder-only transformer, in its plain formulation.

Token and hashed-bigram embeddings, SmearGate, U-Net skips between the two halves of the blocks,
per-channel residual mixes, grouped-query attention with partial rotary embedding and exclusive
self-attention (XSA), a value embedding on chosen blocks, a leaky-ReLU² MLP, a tied head with soft
cap.

The matrices of all blocks lie in four banks [matrices, out, in], so that the optimiser and GPTQ
treat every shape as one batched problem. Shapes: B sequences, T positions, C width, H query heads,
K key/value heads, D head width, V vocabulary, L blocks.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from fairway.config import check_model
from fairway.model.attention import attend, attend_to_cache

BANKS = ("query_output_bank", "key_value_bank", "mlp_up_bank", "mlp_down_bank")

# What can be adapted of a block: its bank, and whether in the bank's first or second half.
PROJECTIONS = {
    "query": ("query_output_bank", 0),
    "output": ("query_output_bank", 1),
    "key": ("key_value_bank", 0),
    "value": ("key_value_bank", 1),
    "up": ("mlp_up_bank", 0),
    "down": ("mlp_down_bank", 0),
}

NORM_EPSILON = torch.finfo(torch.float32).eps
VALUE_NORM_EPSILON = 1e-12


class RowAdapter(Protocol):
    """Changes to a model's function that differ between the rows of a batch (per-row LoRA)."""

    parts: Mapping[tuple[str, int], tuple[torch.Tensor, ...]]
    """Bank and index of a changed matrix → factors [B, r, in] and [B, out, r] of what is added."""
    changes_scales: bool
    """Whether `scale` changes any; the fused kernels then stand aside."""

    def product(self, bank: str, index: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What to use for y [B, T, out], the product of x [B, T, in] and a bank's matrix."""

    def scale(self, name: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        """What to use for a block's per-channel scale [C]: itself or [B, 1, C]."""


Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class GPTConfig:
    """Everything that fixes the parameters' shapes and the function that they compute."""

    vocab_size: int
    sequence_tokens: int
    """Length it is trained at; with rope_trained_tokens it fixes the rotary base."""
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    rotary_dimensions: int
    rope_base: float
    rope_trained_tokens: int
    bigram_buckets: int
    bigram_width: int
    value_width: int
    value_layers: tuple[int, ...]
    logit_softcap: float
    query_gain: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_layers", tuple(self.value_layers))
        check_model(asdict(self))

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def skips(self) -> int:
        """Encoder outputs that a decoder block takes up."""
        return min(self.layers // 2, self.layers - self.layers // 2)


@dataclass
class Cache:
    """State of incremental decoding: `length` positions seen, of at most M."""

    keys: torch.Tensor
    """[L, B, M, K, D], rotated."""
    values: torch.Tensor
    """[L, B, M, K, D]."""
    length: torch.Tensor
    """int64 scalar."""
    previous_tokens: torch.Tensor
    """int64 [B, 1]; −1 before the first token."""
    previous_embedding: torch.Tensor
    """[B, 1, C], before SmearGate; zero before the first token."""
    banks: dict[str, torch.Tensor]


class GPT(nn.Module):
    """The model. Parameters are float32; activations take `compute_dtype`."""

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.attention_backend = "sdpa"
        self.deterministic_attention = False
        self.kernels = "plain"
        self.adapter: RowAdapter | None = None
        self.observer: Callable[[str, int, torch.Tensor], None] | None = None
        self.matrix_transform: Callable[[torch.Tensor], torch.Tensor] | None = None
        for name, shape in parameter_shapes(config).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        if self.token_embedding.is_meta:
            return
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for name, parameter in self.named_parameters():
            value = torch.empty(parameter.shape)
            _initial_value(name, value, self.config, generator)
            parameter.copy_(value)

    def forward(self, tokens: torch.Tensor, first_place: int = 0) -> torch.Tensor:
        """tokens int64 [B, T] → soft-capped logits float32 [B, T − first_place, V].

        Of the places from `first_place` on: what would serve earlier ones alone is not computed.
        """
        return self.logits(self.hidden(tokens, first_place))

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of int64 `targets` [B, T] given `tokens` [B, T]."""
        if self.kernels == "fused":
            from fairway.model.fused import forward_backward as fused

            return fused.loss(self, tokens, targets)
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., C] → 30·tanh(·/30) of the tied head's output, float32 [..., V]."""
        scores = F.linear(hidden, self.token_embedding.to(hidden.dtype)).float()
        cap = self.config.logit_softcap
        return cap * torch.tanh(scores / cap)

    def hidden(self, tokens: torch.Tensor, first_place: int = 0) -> torch.Tensor:
        """tokens int64 [B, T] → the final, normalised residual stream [B, T − first_place, C].

        The fused kernels know no observers and no adapted scales, and stand aside for them.
        """
        adapts_scales = self.adapter is not None and self.adapter.changes_scales
        if self.kernels == "fused" and self.observer is None and not adapts_scales:
            from fairway.model.fused import forward_backward as fused

            return fused.hidden(self, tokens, first_place)
        embedding = self._embed(tokens, F.pad(tokens[:, :-1], (1, 0), value=-1))
        x = self._smear(embedding, F.pad(embedding[:, :-1], (0, 0, 1, 0)))
        rotation = self._rotation(torch.arange(tokens.shape[1], device=tokens.device))

        def attend_layer(layer, queries, keys, values):
            latest = tuple(part[-queries.shape[1] :] for part in rotation)
            queries = rotate(queries, latest) * self._query_gain(layer, queries)
            return attend(
                queries,
                rotate(keys, rotation),
                values,
                self.attention_backend,
                self.deterministic_attention,
            )

        return self._blocks(tokens, x, self._prepared_banks(), attend_layer, first_place)

    def new_cache(self, batch: int, max_tokens: int) -> Cache:
        """An empty cache for `decode_step` on `batch` sequences of up to `max_tokens`."""
        config, device = self.config, self.token_embedding.device
        shape = (config.layers, batch, max_tokens, config.kv_heads, config.head_width)
        return Cache(
            keys=torch.zeros(shape, dtype=self.compute_dtype, device=device),
            values=torch.zeros(shape, dtype=self.compute_dtype, device=device),
            length=torch.zeros((), dtype=torch.int64, device=device),
            previous_tokens=torch.full((batch, 1), -1, dtype=torch.int64, device=device),
            previous_embedding=torch.zeros(
                batch, 1, config.width, dtype=self.compute_dtype, device=device
            ),
            banks=self._prepared_banks(),
        )

    def decode_step(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Append int64 `tokens` [B] and return the next position's logits, float32 [B, V].

        Updates `cache` in place, with fixed shapes, so that a CUDA graph can capture it.
        """
        tokens = tokens[:, None]
        embedding = self._embed(tokens, cache.previous_tokens)
        x = self._smear(embedding, cache.previous_embedding)
        rotation = self._rotation(cache.length[None])

        def attend_layer(layer, queries, keys, values):
            queries = rotate(queries, rotation) * self._query_gain(layer, queries)
            cache.keys[layer].index_copy_(1, cache.length[None], rotate(keys, rotation))
            cache.values[layer].index_copy_(1, cache.length[None], values)
            return attend_to_cache(
                queries, cache.keys[layer], cache.values[layer], cache.length + 1
            )

        hidden = self._blocks(tokens, x, cache.banks, attend_layer)
        cache.previous_tokens.copy_(tokens)
        cache.previous_embedding.copy_(embedding)
        cache.length += 1
        return self.logits(hidden[:, 0])

    def _blocks(
        self,
        tokens: torch.Tensor,
        x: torch.Tensor,
        banks: Mapping[str, torch.Tensor],
        attend: Attend,
        first_place: int = 0,
    ) -> torch.Tensor:
        x0, skips = x, []
        value_embedding = self._value_embedding(tokens, x.dtype)
        encoders = self.config.layers // 2
        for layer in range(self.config.layers):
            if layer >= encoders and skips:
                x = x + self.skip_weights[layer - encoders].to(x.dtype) * skips.pop()
            place = first_place if layer == self.config.layers - 1 else 0
            x = self._block(layer, x, x0, value_embedding, banks, attend, place)
            if layer < encoders:
                skips.append(x)
        return rms_norm(x)

    def _block(self, layer, x, x0, value_embedding, banks, attend, place):
        depth_scale = 1 / math.sqrt(layer + 1)
        mix = self.residual_mix[layer].to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        attention = self._attention(
            layer, depth_scale * rms_norm(x), value_embedding, banks, attend, place
        )
        x = places_from(x, place) + self._scale("attention_scale", layer, x.dtype) * attention
        mlp = self._mlp(layer, depth_scale * rms_norm(x), banks)
        return x + self._scale("mlp_scale", layer, x.dtype) * mlp

    def _scale(self, name: str, layer: int, dtype: torch.dtype) -> torch.Tensor:
        value = getattr(self, name)[layer]
        return (value if self.adapter is None else self.adapter.scale(name, layer, value)).to(dtype)

    def _attention(self, layer, x, value_embedding, banks, attend, place):
        config, (B, T, _) = self.config, x.shape
        queries = self._linear(places_from(x, place), banks, "query_output_bank", layer)
        keys = self._linear(x, banks, "key_value_bank", layer)
        values = self._linear(x, banks, "key_value_bank", config.layers + layer)
        if layer in config.value_layers:
            scale = self.value_layer_scales[config.value_layers.index(layer)]
            values = values + scale.to(x.dtype) * value_embedding
        queries = rms_norm(queries.view(B, -1, config.heads, config.head_width))
        keys = rms_norm(keys.view(B, T, config.kv_heads, config.head_width))
        values = values.view(B, T, config.kv_heads, config.head_width)
        output = exclude_self(attend(layer, queries, keys, values), places_from(values, place))
        return self._linear(output.flatten(2), banks, "query_output_bank", config.layers + layer)

    def _mlp(self, layer, x, banks):
        up = self._linear(x, banks, "mlp_up_bank", layer)
        return self._linear(F.leaky_relu(up, 0.5).square(), banks, "mlp_down_bank", layer)

    def _linear(self, x, banks, bank: str, index: int) -> torch.Tensor:
        if self.observer is not None:
            self.observer(bank, index, x)
        y = F.linear(x, banks[bank][index])
        return y if self.adapter is None else self.adapter.product(bank, index, x, y)

    def _prepared_banks(self) -> dict[str, torch.Tensor]:
        """The banks as the forward pass uses them: transformed (late QAT), then cast."""
        transform = self.matrix_transform or (lambda bank: bank)
        return {name: transform(getattr(self, name)).to(self.compute_dtype) for name in BANKS}

    def _embed(self, tokens: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Normalised token plus bigram embedding, [B, T, C]; `previous` is −1 at the start."""
        buckets = bigram_bucket(tokens, previous, self.config.bigram_buckets)
        bigram = F.linear(F.embedding(buckets, self.bigram_embedding), self.bigram_projection)
        x = F.embedding(tokens, self.token_embedding) + self.bigram_scale * bigram
        return rms_norm(x.to(self.compute_dtype))

    def _smear(self, x: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """SmearGate: (1−g)·x_t + g·x_{t−1}, with one gate per channel."""
        gate = torch.sigmoid(self.smear_gate).to(x.dtype)
        return (1 - gate) * x + gate * previous

    def _value_embedding(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        if not self.config.value_layers:
            return None
        embedding = F.embedding(tokens, self.value_embedding)
        return (self.value_scale * F.linear(embedding, self.value_projection)).to(dtype)

    def _query_gain(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        return self.query_gain[layer].to(queries.dtype)[:, None]

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, rotary_dimensions/2], in the compute dtype."""
        cos, sin = rotary_angles(self.config, positions)
        return cos.to(self.compute_dtype), sin.to(self.compute_dtype)


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter; whatever belongs to a block has the block index first."""
    layers, width = config.layers, config.width
    return {
        "token_embedding": (config.vocab_size, width),
        "bigram_embedding": (config.bigram_buckets, config.bigram_width),
        "bigram_projection": (width, config.bigram_width),
        "bigram_scale": (),
        "smear_gate": (width,),
        "value_embedding": (config.vocab_size, config.value_width),
        "value_projection": (config.kv_width, config.value_width),
        "value_scale": (),
        "value_layer_scales": (len(config.value_layers),),
        "query_output_bank": (2 * layers, width, width),
        "key_value_bank": (2 * layers, config.kv_width, width),
        "mlp_up_bank": (layers, config.mlp_width, width),
        "mlp_down_bank": (layers, width, config.mlp_width),
        "residual_mix": (layers, 2, width),
        "attention_scale": (layers, width),
        "mlp_scale": (layers, width),
        "query_gain": (layers, config.heads),
        "skip_weights": (config.skips, width),
    }


def block_of_bank_row(name: str, layers: int) -> list[int]:
    """For a bank, the block that each of its matrices belongs to."""
    doubled = name in ("query_output_bank", "key_value_bank")
    return [index % layers for index in range(2 * layers if doubled else layers)]


def _initial_value(
    name: str, value: torch.Tensor, config: GPTConfig, generator: torch.Generator
) -> None:
    """Fill `value` in place; an unknown name is a programmer's fault, not a default."""
    constants = {
        "bigram_embedding": 0.0,
        "bigram_projection": 0.0,
        "bigram_scale": 0.05,
        "smear_gate": 0.0,
        "value_projection": 0.0,
        "value_scale": 0.1,
        "value_layer_scales": 1.0,
        "mlp_down_bank": 0.0,
        "attention_scale": 1.0,
        "mlp_scale": 1.0,
        "query_gain": config.query_gain,
        "skip_weights": 1.0,
    }
    if name in constants:
        value.fill_(constants[name])
    elif name == "token_embedding":
        value.normal_(0, 0.005, generator=generator)
    elif name == "value_embedding":
        value.normal_(0, 0.01, generator=generator)
    elif name == "residual_mix":
        value[:, 0], value[:, 1] = 1.0, 0.0
    elif name in ("query_output_bank", "key_value_bank", "mlp_up_bank"):
        for matrix in value:
            nn.init.orthogonal_(matrix, generator=generator)
        if name == "query_output_bank":
            value[config.layers :] = 0.0
    else:
        raise AssertionError(f"no initial value for parameter {name}")


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x²) + ε) over the last dimension, with no learned scale."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPSILON)


def places_from(x: torch.Tensor, place: int) -> torch.Tensor:
    """x [B, T, …] from `place` on; x itself where that is all of it."""
    return x[:, place:] if place else x


def bigram_bucket(tokens: torch.Tensor, previous: torch.Tensor, buckets: int) -> torch.Tensor:
    """(36313·x_t xor 27191·x_{t−1}) mod (buckets−1); the last bucket where `previous` is −1."""
    hashed = torch.bitwise_xor(36313 * tokens, 27191 * previous) % (buckets - 1)
    return torch.where(previous < 0, buckets - 1, hashed)


def rotary_base(config: GPTConfig) -> float:
    """The rotary base, rescaled for sequences beyond rope_trained_tokens ("NTK-aware" scaling)."""
    stretch = max(1.0, config.sequence_tokens / config.rope_trained_tokens)
    dimensions = config.rotary_dimensions
    # With two dimensions there is one frequency, 1, whatever the base.
    exponent = dimensions / (dimensions - 2) if dimensions > 2 else 0.0
    return config.rope_base * stretch**exponent


def rotary_angles(config: GPTConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [T, rotary_dimensions/2], of int64 `positions` [T]."""
    dimensions = config.rotary_dimensions
    exponents = torch.arange(0, dimensions, 2, device=positions.device) / dimensions
    angles = torch.outer(positions.float(), rotary_base(config) ** -exponents)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of the first dimensions of each head; x [B, T, heads, D].

    Su et al., RoFormer (2021); the rotated pairs are (i, i + half).
    """
    cos, sin = (part[:, None, :] for part in rotation)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


def exclude_self(output: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Exclusive self-attention: subtract each head's projection on its own position's value.

    output [B, T, H, D], values [B, T, K, D] → [B, T, H, D].
    """
    B, T, H, D = output.shape
    own = F.normalize(values, dim=-1, eps=VALUE_NORM_EPSILON).unsqueeze(3)
    grouped = output.view(B, T, values.shape[2], -1, D)
    return (grouped - (grouped * own).sum(-1, keepdim=True) * own).view(B, T, H, D)


def config_from_settings(
    settings: Mapping[str, Any], vocab_size: int, sequence_tokens: int
) -> GPTConfig:
    """The config section `model`, completed by the dataset's vocabulary and the training length."""
    return GPTConfig(vocab_size=vocab_size, sequence_tokens=sequence_tokens, **settings)
