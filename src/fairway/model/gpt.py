"""The decoder-only transformer of the reference submission, in its plain formulation.

Token and hashed-bigram embeddings, SmearGate, U-Net skips between the two halves of the blocks,
per-channel residual mixes, grouped-query attention with partial rotary embedding and exclusive
self-attention (XSA), a value embedding on chosen blocks, a leaky-ReLU² MLP, a tied head with soft
cap. Settings add gates on heads and skips, a run of blocks that recurs, and other parts.

The matrices of all blocks lie in four banks [matrices, out, in], so that the optimizer and GPTQ
treat every shape as one batched problem. Shapes: B sequences, T positions, C width, H query heads,
K key/value heads, D head width, V vocabulary, L blocks, S steps: blocks as often as they run.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from fairway.model.attention import attend, attend_to_cache
from fairway.model.functional import (
    bigram_bucket,
    document_numbers,
    exclude_self,
    positions_from,
    rms_norm,
    rotary_angles,
    rotate,
)
from fairway.model.spec import (
    GPTConfig,
    Normal,
    Orthogonal,
    Parameter,
    block_order,
    parameters,
)


class RowAdapter(Protocol):
    """Changes to a model's function that differ between the rows of a batch (per-row LoRA)."""

    parts: Mapping[tuple[str, int], tuple[torch.Tensor, ...]]
    """Bank and index of a changed matrix → A [B, r, in] and B [B, out, r]; B·A is added to it."""
    changes_scales: bool
    """Whether `scale` changes any; the plain formulation then computes."""

    def product(self, bank: str, index: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y [B, T, out], a bank's matrix times x [B, T, in], with the rows' changes."""

    def scale(self, name: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        """A block's per-channel scale [C] as it is, or with the rows' changes, [B, 1, C]."""


class Backend(Protocol):
    """Another formulation of the same function, such as the fused twin."""

    def loss(self, model: "GPT", tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """As `GPT.loss`."""

    def hidden(self, model: "GPT", tokens: torch.Tensor, first_position: int) -> torch.Tensor:
        """As `GPT.hidden`."""


Attend = Callable[[int, int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""A step, its block, queries, keys and values → attention's output."""


@dataclass
class Cache:
    """State of incremental decoding: `length` positions seen, of at most M."""

    keys: torch.Tensor
    """[S, B, M, K, D], rotated."""
    values: torch.Tensor
    """[S, B, M, K, D]."""
    length: torch.Tensor
    """int64 scalar."""
    previous_tokens: torch.Tensor
    """int64 [B, 1]; −1 before the first token."""
    previous_embedding: torch.Tensor
    """[B, 1, C], before SmearGate; zero before the first token."""
    documents: torch.Tensor | None
    """int64 [B, M], the number of BOS up to each position, where documents are masked."""
    banks: dict[str, torch.Tensor]


class GPT(nn.Module):
    """The model. Parameters are float32; activations take `compute_dtype`."""

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.parameter_table = parameters(config)
        self.orders = {recurs: block_order(config, recurs) for recurs in (False, True)}
        self.recurs = True
        """Whether recurrent_layers run as often as they can, or once, as early in training."""
        self.compute_dtype = torch.float32
        self.attention_backend = "sdpa"
        self.deterministic_attention = False
        self.backend: Backend | None = None
        """Computes in place of the plain formulation; `runtime.prepare` chooses it."""
        self.kernels_reason: str | None = None
        """Why `auto` did not take the fused kernels on this GPU."""
        self.key_copies = 1
        """Copies of each key and value head that the fused kernels give attention in training."""
        self.adapter: RowAdapter | None = None
        self.activation_hook: Callable[[str, int, torch.Tensor], None] | None = None
        """Called with a bank, an index and x [B, T, in] before x is multiplied by that matrix."""
        self.gradient_hook: Callable[[str, int, torch.Tensor], None] | None = None
        """Called in the backward pass with a bank, an index and the gradient of that product."""
        self.fake_quantize: Callable[[str, torch.Tensor], torch.Tensor] | None = None
        """Applied to the name and value of each bank, such as a fake quantization."""
        for name, parameter in self.parameter_table.items():
            self.register_parameter(name, nn.Parameter(torch.empty(parameter.shape)))
        self._initialize(seed)

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        if self.token_embedding.is_meta:
            return
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for name, parameter in self.parameter_table.items():
            getattr(self, name).copy_(initial_value(parameter, generator))

    @property
    def kernels(self) -> str:
        """`plain` or `fused`, for metrics.json."""
        return "plain" if self.backend is None else "fused"

    def forward(self, tokens: torch.Tensor, first_position: int = 0) -> torch.Tensor:
        """tokens int64 [B, T] → soft-capped logits float32 [B, T − first_position, V].

        Only positions from `first_position` on get logits; the last block skips the others.
        """
        return self.logits(self.hidden(tokens, first_position))

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of int64 `targets` [B, T] given `tokens` [B, T]."""
        if self.backend is not None:
            return self.backend.loss(self, tokens, targets)
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., C] → cap·tanh(·/cap) of the tied head's output, float32 [..., V]."""
        scores = F.linear(hidden, self.token_embedding.to(hidden.dtype)).float()
        cap = self.config.logit_softcap
        if self.config.asymmetric_softcap:
            cap = torch.where(scores > 0, *self.softcaps)
        return cap * torch.tanh(scores / cap)

    def hidden(self, tokens: torch.Tensor, first_position: int = 0) -> torch.Tensor:
        """tokens int64 [B, T] → the final, normalized residual stream [B, T − first_position, C].

        The plain formulation computes wherever there are adapted scales.
        """
        adapts_scales = self.adapter is not None and self.adapter.changes_scales
        if self.backend is not None and not adapts_scales:
            return self.backend.hidden(self, tokens, first_position)
        embedding = self._embed(tokens, F.pad(tokens[:, :-1], (1, 0), value=-1))
        x = self._smear(tokens, embedding, F.pad(embedding[:, :-1], (0, 0, 1, 0)))
        rotation = self._rotation(torch.arange(tokens.shape[1], device=tokens.device))
        documents = document_numbers(self.config, tokens)

        def attend_step(step, layer, queries, keys, values):
            latest = tuple(part[-queries.shape[1] :] for part in rotation)
            queries = rotate(queries, latest) * self._query_gain(layer, queries)
            return attend(
                queries,
                rotate(keys, rotation),
                values,
                self.attention_backend,
                self.deterministic_attention,
                documents,
            )

        return self._blocks(tokens, x, self._prepared_banks(), attend_step, first_position)

    def new_cache(self, batch: int, max_tokens: int) -> Cache:
        """An empty cache for `decode_step` on `batch` sequences of up to `max_tokens`."""
        config, device = self.config, self.token_embedding.device
        steps = len(self.orders[self.recurs].blocks)
        shape = (steps, batch, max_tokens, config.kv_heads, config.head_width)
        documents = torch.zeros((batch, max_tokens), dtype=torch.int64, device=device)
        return Cache(
            keys=torch.zeros(shape, dtype=self.compute_dtype, device=device),
            values=torch.zeros(shape, dtype=self.compute_dtype, device=device),
            length=torch.zeros((), dtype=torch.int64, device=device),
            previous_tokens=torch.full((batch, 1), -1, dtype=torch.int64, device=device),
            previous_embedding=torch.zeros(
                batch, 1, config.width, dtype=self.compute_dtype, device=device
            ),
            documents=documents if config.document_masks else None,
            banks=self._prepared_banks(),
        )

    def decode_step(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Append int64 `tokens` [B] and return the next position's logits, float32 [B, V].

        Updates `cache` in place, with fixed shapes, so that a CUDA graph can capture it.
        """
        tokens = tokens[:, None]
        embedding = self._embed(tokens, cache.previous_tokens)
        x = self._smear(tokens, embedding, cache.previous_embedding)
        place = cache.length[None]
        rotation = self._rotation(place)
        if cache.documents is not None:
            number = cache.documents.amax(1, keepdim=True) + (tokens == self.config.bos_id)
            cache.documents.index_copy_(1, place, number)

        def attend_step(step, layer, queries, keys, values):
            queries = rotate(queries, rotation) * self._query_gain(layer, queries)
            cache.keys[step].index_copy_(1, place, rotate(keys, rotation))
            cache.values[step].index_copy_(1, place, values)
            return attend_to_cache(
                queries, cache.keys[step], cache.values[step], cache.length + 1, cache.documents
            )

        hidden = self._blocks(tokens, x, cache.banks, attend_step)
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
        first_position: int = 0,
    ) -> torch.Tensor:
        x0, outputs = x, []
        value_embedding = self._value_embedding(tokens, x.dtype)
        order = self.orders[self.recurs]
        for step, layer in enumerate(order.blocks):
            if skip := order.skip(step):
                row, encoder = skip
                x = self._add_skip(row, x, outputs[encoder])
            first = first_position if step == len(order.blocks) - 1 else 0
            x = self._block(layer, x, x0, value_embedding, banks, partial(attend, step), first)
            if step < order.encoders:
                outputs.append(x)
        return rms_norm(x)

    def _add_skip(self, row: int, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """x + w∘skip; with a gate g for each channel, g∘x + (1 − g)∘w∘skip."""
        skip = self.skip_weights[row].to(x.dtype) * skip
        if not self.config.skip_gates:
            return x + skip
        gate = torch.sigmoid(self.skip_gate[row]).to(x.dtype)
        return gate * x + (1 - gate) * skip

    def _block(self, layer, x, x0, value_embedding, banks, attend, first):
        depth_scale = 1 / math.sqrt(layer + 1)
        mix = self.residual_mix[layer].to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        attention = self._attention(
            layer, depth_scale * rms_norm(x), value_embedding, banks, attend, first
        )
        x = positions_from(x, first) + self._scale("attention_scale", layer, x.dtype) * attention
        mlp = self._mlp(layer, depth_scale * rms_norm(x), banks)
        return x + self._scale("mlp_scale", layer, x.dtype) * mlp

    def _scale(self, name: str, layer: int, dtype: torch.dtype) -> torch.Tensor:
        value = getattr(self, name)[layer]
        return (value if self.adapter is None else self.adapter.scale(name, layer, value)).to(dtype)

    def _attention(self, layer, x, value_embedding, banks, attend, first):
        config, (B, T, _) = self.config, x.shape
        queries = self._linear(positions_from(x, first), banks, "query_output_bank", layer)
        keys = self._linear(x, banks, "key_value_bank", layer)
        values = self._linear(x, banks, "key_value_bank", config.layers + layer)
        if layer in config.value_layers:
            scale = self.value_layer_scales[config.value_layers.index(layer)]
            values = values + scale.to(x.dtype) * value_embedding
        queries = rms_norm(queries.view(B, -1, config.heads, config.head_width))
        keys = rms_norm(keys.view(B, T, config.kv_heads, config.head_width))
        values = values.view(B, T, config.kv_heads, config.head_width)
        output = exclude_self(attend(layer, queries, keys, values), positions_from(values, first))
        if config.head_gate_dimensions:
            output = output * self._head_gate(layer, positions_from(x, first))
        return self._linear(output.flatten(2), banks, "query_output_bank", config.layers + layer)

    def _head_gate(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """σ(W·x[:n] / 2) of attention's input x [B, T, C], for each head: [B, T, H, 1]."""
        weights = self.head_gate[layer].to(x.dtype)
        return torch.sigmoid(0.5 * F.linear(x[..., : weights.shape[1]], weights)).unsqueeze(3)

    def _mlp(self, layer, x, banks):
        up = self._linear(x, banks, "mlp_up_bank", layer)
        activation = F.leaky_relu(up, self.config.activation_slope).square()
        return self._linear(activation, banks, "mlp_down_bank", layer)

    def _linear(self, x, banks, bank: str, index: int) -> torch.Tensor:
        if self.activation_hook is not None:
            self.activation_hook(bank, index, x)
        y = F.linear(x, banks[bank][index])
        if self.gradient_hook is not None:
            y.register_hook(partial(self.gradient_hook, bank, index))
        return y if self.adapter is None else self.adapter.product(bank, index, x, y)

    def _prepared_banks(self) -> dict[str, torch.Tensor]:
        """The banks as the forward pass uses them: transformed (late QAT), then cast."""
        transform = self.fake_quantize or (lambda name, bank: bank)
        return {
            name: transform(name, getattr(self, name)).to(self.compute_dtype)
            for name, parameter in self.parameter_table.items()
            if parameter.storage == "quantized"
        }

    def _embed(self, tokens: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Token plus bigram embedding [B, T, C], normed before a gate for each channel.

        previous: the tokens before, int64 [B, T]; −1 at the start.
        """
        x = F.embedding(tokens, self.token_embedding)
        if self.config.bigram_buckets:
            buckets = bigram_bucket(tokens, previous, self.config.bigram_buckets)
            bigram = F.linear(F.embedding(buckets, self.bigram_embedding), self.bigram_projection)
            x = x + self.bigram_scale * bigram
        x = x.to(self.compute_dtype)
        return x if self.config.smear == "input" else rms_norm(x)

    def _smear(self, tokens: torch.Tensor, x: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """SmearGate and norm, [B, T, C]: (1−g)·x_t + g·x_{t−1}, or x_t + λ·σ(w·x_t[:n])·x_{t−1}.

        The second adds nothing at a BOS, so that documents stay apart.
        """
        if self.config.smear == "none":
            return x
        if self.config.smear == "channel":
            gate = torch.sigmoid(self.smear_gate).to(x.dtype)
            return (1 - gate) * x + gate * previous
        weights = self.smear_weights.to(x.dtype)
        gate = torch.sigmoid(F.linear(x[..., : len(weights)], weights[None]))
        gate = self.smear_scale.to(x.dtype) * gate * (tokens != self.config.bos_id).unsqueeze(2)
        return rms_norm(x + gate * previous)

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


def initial_value(parameter: Parameter, generator: torch.Generator) -> torch.Tensor:
    """A parameter's initial value, float32; the draws, if any, are the generator's next ones."""
    value = torch.empty(parameter.shape)
    match parameter.initial:
        case Normal(std):
            value.normal_(0, std, generator=generator)
        case Orthogonal(zero_from):
            for matrix in value:
                nn.init.orthogonal_(matrix, generator=generator)
            if zero_from is not None:
                value[zero_from:] = 0.0
        case tuple(constants):
            for index, constant in enumerate(constants):
                value[:, index] = constant
        case constant:
            value.fill_(constant)
    return value
