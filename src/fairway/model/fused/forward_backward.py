"""The model's forward and backward pass written out, for CUDA: the fast twin of `gpt.py`.

It computes the same function of the same parameters as the plain formulation, up to rounding. The
kernels beside this file compute everything between the matrix products; every per-channel scale
next to a matrix is folded into it; the products themselves accumulate residual sums; and gradients
are written by hand, so that no activation is read or stored more often than it must be. `GPT` calls
`loss` and `hidden` where this module is its backend.

Shapes: M = B·T tokens, C width, H query heads, K key/value heads, D head width, F MLP width, V
vocabulary, L blocks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fairway.model.attention import attend
from fairway.model.functional import bigram_bucket, rotary_angles
from fairway.model.fused.embedding import add_embedding, embed, embed_backward
from fairway.model.fused.exclusion import exclude_self, exclude_self_backward
from fairway.model.fused.folded_weights import FoldedWeights, folded_weights
from fairway.model.fused.heads import copy_heads, gain_sums, heads_backward, norm_and_rotate
from fairway.model.fused.loss import cross_entropy
from fairway.model.fused.low_rank import Additions, folded_factors
from fairway.model.fused.mlp import activate, activate_backward, mlp_down_backward, mlp_up
from fairway.model.fused.residual import (
    mix_and_norm,
    mix_and_norm_backward,
    mix_sums,
    rms_norm,
    rms_norm_backward,
)
from fairway.model.gpt import GPT
from fairway.model.spec import GPTConfig

QKV = ("query", "key", "value")


# Every value of these is computed here. A key of the model that is not among them must have its
# default, which means that the feature is off.
SUPPORTED = frozenset(
    (
        "vocab_size",
        "sequence_tokens",
        "layers",
        "width",
        "heads",
        "kv_heads",
        "mlp_width",
        "rotary_dimensions",
        "rope_base",
        "rope_trained_tokens",
        "bigram_buckets",
        "bigram_width",
        "value_width",
        "value_layers",
        "logit_softcap",
        "query_gain",
        "bos_id",
    )
)

WIDTH_MULTIPLE = 8
"""The tensor memory accelerator moves rows whose length in bytes is a multiple of 16."""


@dataclass(frozen=True)
class PassSpec:
    """The inputs of a pass that take no gradients."""

    config: GPTConfig
    attention_backend: str
    deterministic_attention: bool
    tokens: torch.Tensor
    """int64 [B, T]."""
    first_position: int
    """The first position whose hidden state is wanted."""
    trains: bool
    """Whether there will be a backward pass; a Function cannot tell from within."""
    key_copies: int
    """Copies of every key and value head that attention gets."""
    cos: torch.Tensor
    """float32 [T, rotary_dimensions / 2], as is sin."""
    sin: torch.Tensor
    adapted: tuple[tuple[str, int], ...] = ()
    """Projections and blocks to which the rows of the batch add products of their own."""

    @property
    def encoders(self) -> int:
        return self.config.layers // 2

    def skip_partner(self, index: int) -> int | None:
        """The decoder block that adds block `index`'s input to its own, or the other way round.

        Block e's output is block e + 1's input, so the first decoder block is its own partner.
        """
        partner = 2 * self.encoders - index
        decoder = max(index, partner)
        return partner if self.encoders <= decoder < self.encoders + self.config.skips else None


class Context(NamedTuple):
    """The inputs that all blocks of a pass share."""

    spec: PassSpec
    weights: FoldedWeights
    additions: Additions


@dataclass
class BlockActivations:
    """The tensors that a block's forward pass keeps for its backward pass."""

    x: torch.Tensor
    """[M, C], its input."""
    skip: torch.Tensor | None
    """[M, C], the encoder output that it adds."""
    skip_weight: torch.Tensor | None
    attention_input: tuple[torch.Tensor, ...] = ()
    """Normed [M, C], and 1 / rms, float32 [M]."""
    qkv: torch.Tensor | None = None
    """[M, C + 2·K·D], before norm and rotation."""
    attention: tuple[torch.Tensor, ...] = ()
    """Queries, keys, values and output, joined by autograd; the output without self."""
    mlp_input: tuple[torch.Tensor, ...] = ()
    activation: torch.Tensor | None = None
    """The MLP's, [M, F]."""


class PartialGrads(NamedTuple):
    """Gradients of per-channel parameters as the kernels leave them: one sum for each program."""

    mix: torch.Tensor
    """float32 [L, 3, programs, C]: of mix and, last, of the block's skip weight."""
    gain: torch.Tensor
    """float32 [L, programs, H]."""

    def add_up(self, gradients: FoldedWeights, encoders: int) -> None:
        """Write the sums to `gradients`, all blocks' at once, where they were asked for."""
        if gradients.mix is not None:
            torch.sum(self.mix[:, :2], 2, out=gradients.mix)
        if gradients.skip is not None:
            decoders = slice(encoders, encoders + len(gradients.skip))
            torch.sum(self.mix[decoders, 2], 1, out=gradients.skip)
        if gradients.gain is not None:
            torch.sum(self.gain, 1, out=gradients.gain)


def supports(config: GPTConfig) -> str | None:
    """Why this module cannot compute a model of this configuration; None where it can."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name not in SUPPORTED and value != field.default:
            return f"model.{name} is {value!r}, and the fused kernels know {field.default!r} only"
    if not config.bigram_buckets:
        return "model.bigram_buckets is 0, and the fused kernels need bigrams"
    for name in ("width", "mlp_width"):
        if getattr(config, name) % WIDTH_MULTIPLE:
            return (
                f"model.{name} is {getattr(config, name)}, and the fused kernels need a multiple "
                f"of {WIDTH_MULTIPLE}"
            )
    return None


def loss(model: GPT, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of int64 `targets` [B, T] given `tokens` [B, T]."""
    hidden = _hidden(model, tokens, 0)
    return HeadLoss.apply(hidden, model.token_embedding, targets, model.config.logit_softcap)


def hidden(model: GPT, tokens: torch.Tensor, first_position: int = 0) -> torch.Tensor:
    """tokens int64 [B, T] → the final, normalized residual stream [B, T − first_position, C]."""
    computed_from = 0 if torch.is_grad_enabled() else first_position
    rows = _hidden(model, tokens, computed_from)
    return rows.unflatten(0, (len(tokens), -1))[:, first_position - computed_from :]


def _hidden(model: GPT, tokens: torch.Tensor, first_position: int) -> torch.Tensor:
    config, dtype, tokens = model.config, model.compute_dtype, tokens.contiguous()
    x0 = Embed.apply(
        tokens,
        bigram_bucket(tokens, F.pad(tokens[:, :-1], (1, 0), value=-1), config.bigram_buckets),
        model.token_embedding,
        # A row of the product is the product of a row: the tables are projected, not the tokens.
        model.bigram_scale * F.linear(model.bigram_embedding, model.bigram_projection),
        torch.sigmoid(model.smear_gate),
        dtype,
    )
    rotation = rotary_angles(config, torch.arange(tokens.shape[1], device=tokens.device))
    trains = torch.is_grad_enabled()
    factors = folded_factors(model)
    spec = PassSpec(
        config, model.attention_backend, model.deterministic_attention, tokens, first_position,
        trains, model.key_copies if trains else 1, *rotation, (*factors,),
    )  # fmt: skip
    flat = [factor for pair in factors.values() for factor in pair]
    return Blocks.apply(spec, x0, *folded_weights(model), *flat)


class Embed(torch.autograd.Function):
    """Token and bigram embeddings, normed, and SmearGate: x0 [M, C]."""

    @staticmethod
    def forward(ctx, tokens, buckets, table, bigram_table, gate, dtype):
        ctx.save_for_backward(tokens, buckets, table, bigram_table, gate)
        return embed(tokens, buckets, table, bigram_table, gate, dtype)

    @staticmethod
    def backward(ctx, gradient):
        tokens, buckets, table, bigram_table, _ = ctx.saved_tensors
        rows, gate_gradient = embed_backward(gradient, *ctx.saved_tensors)
        return (
            None,
            None,
            sums_by_token(rows, tokens, len(table)),
            sums_by_token(rows, buckets, len(bigram_table)),
            gate_gradient,
            None,
        )


def sums_by_token(rows: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """float32 [count, C]: for each token the sum of its rows of `rows` [M, C]."""
    scatter = torch.ops.aten.embedding_dense_backward
    return scatter(rows, tokens.flatten(), count, -1, False).float()


class HeadLoss(torch.autograd.Function):
    """Tied head, soft cap and mean cross-entropy; logits exist once, as their own gradient."""

    @staticmethod
    def forward(ctx, hidden, embedding, targets, cap):
        head = embedding.to(hidden.dtype)
        scores = hidden @ head.T
        losses = cross_entropy(scores, targets.flatten(), cap)
        ctx.save_for_backward(hidden, embedding, scores)
        return losses.mean()

    @staticmethod
    def backward(ctx, gradient):
        hidden, embedding, scores = ctx.saved_tensors
        factor = gradient / len(hidden)
        head = (embedding * factor).to(hidden.dtype)
        return scores @ head, (scores.T @ hidden).float() * factor, None, None


class Blocks(torch.autograd.Function):
    """All blocks and the final norm: x0 [M, C] → hidden [B·(T − first_position), C].

    tensors: those of FoldedWeights, then two factors for each of `spec.adapted`. Gradients need
    first_position 0.
    """

    @staticmethod
    def forward(ctx, spec, x0, *tensors):
        weights = FoldedWeights(*tensors[: len(FoldedWeights._fields)])
        activations, x = [], x0
        context = Context(spec, weights, Additions(spec.adapted, tensors[len(weights) :]))
        for index in range(spec.config.layers):
            saved = BlockActivations(x, None, None)
            activations.append(saved)
            partner = spec.skip_partner(index)
            if partner is not None and index >= spec.encoders:
                saved.skip = activations[partner].x
                saved.skip_weight = weights.skip[index - spec.encoders]
            x = _block(context, index, saved, x0)
            if not spec.trains:
                activations[index] = BlockActivations(saved.x, None, None)
        hidden, inverse = rms_norm(x)
        ctx.save_for_backward(hidden, inverse)
        ctx.inputs = context, activations, x0
        return hidden

    @staticmethod
    def backward(ctx, gradient):
        context, activations, x0 = ctx.inputs
        spec, weights, additions = context
        assert spec.first_position == 0, "gradients need all positions"
        asked = ctx.needs_input_grad[2 : 2 + len(weights)]
        gradients = FoldedWeights(
            *(
                torch.zeros_like(weight) if needed else None
                for weight, needed in zip(weights, asked, strict=True)
            )
        )
        partial = PartialGrads(
            mix_sums(x0, len(activations)), gain_sums(x0, spec.config.heads, len(activations))
        )
        x0_gradient = torch.zeros_like(x0)
        gradient = rms_norm_backward(gradient, *ctx.saved_tensors, x0_gradient)
        skip_gradients: dict[int, torch.Tensor] = {}
        for index in reversed(range(len(activations))):
            saved = activations.pop()
            gradient = _mlp_backward(context, gradients, index, saved, gradient)
            inner = _attention_backward(
                context, gradients, partial.gain[index], index, saved, gradient
            )
            partner = spec.skip_partner(index)
            taken = partner is not None and index <= spec.encoders
            inner, gradient = mix_and_norm_backward(
                gradient, inner, saved.attention_input[1], saved.x, x0, weights.mix[index],
                saved.skip, saved.skip_weight, skip_gradients.get(partner),
                weights.skip[partner - spec.encoders] if taken else None, x0_gradient,
                partial.mix[index],
            )  # fmt: skip
            if saved.skip is not None:
                skip_gradients[index] = inner
        partial.add_up(gradients, spec.encoders)
        x0_gradient.add_(gradient)
        return None, x0_gradient, *gradients, *additions.gradients()


def _block(context, index, saved, x0) -> torch.Tensor:
    """Block `index` from `saved.x` to its output; keeps in `saved` what the backward pass needs."""
    spec, weights, additions = context
    x, *saved.attention_input = mix_and_norm(
        saved.x, x0, weights.mix[index], saved.skip, saved.skip_weight
    )
    first = spec.first_position if index == spec.config.layers - 1 else 0
    output = _attention(context, index, saved, first)
    x = _rows_from(x, spec, first)
    # Both sums go into the residual stream's own memory: the backward pass needs the norms'
    # outputs, not their inputs.
    x.addmm_(output, weights.attention_out[index].T)
    additions.add("output", index, output, x)
    saved.mlp_input = rms_norm(x)
    normed = saved.mlp_input[0]
    if additions.has("up", index):
        up = normed @ weights.up[index].T
        additions.add("up", index, normed, up)
        saved.activation = activate(up)
    else:
        saved.activation = mlp_up(normed, weights.up[index], spec.trains)
    x.addmm_(saved.activation, weights.down[index].T)
    additions.add("down", index, saved.activation, x)
    return x


def _attention(context, index, saved, first) -> torch.Tensor:
    """Attention without self of the positions from `first` on, before its output matrix."""
    spec, weights, additions = context
    config, (normed, _) = spec.config, saved.attention_input
    latest = _rows_from(normed, spec, first)
    if first:
        key_values = normed @ weights.qkv[index, config.width :].T
        parts = (latest @ weights.qkv[index, : config.width].T, *key_values.chunk(2, dim=1))
    else:
        saved.qkv = normed @ weights.qkv[index].T
        parts = _split(saved.qkv, config)
    for projection, x, part in zip(QKV, (latest, normed, normed), parts, strict=True):
        additions.add(projection, index, x, part)
    queries, keys, own_values = (_heads(part, config) for part in parts)
    if index in config.value_layers:
        scale = weights.value_scales[config.value_layers.index(index)]
        add_embedding(parts[2], spec.tokens, weights.values, scale)
    (B, T), cos, sin = spec.tokens.shape, spec.cos, spec.sin
    queries = norm_and_rotate(queries, cos[first:], sin[first:], weights.gain[index], T - first)
    copies = spec.key_copies
    keys = norm_and_rotate(keys, cos, sin, None, T, copies)
    values = own_values if copies == 1 else copy_heads(own_values, copies)
    inputs = [part.unflatten(0, (B, -1)).detach() for part in (queries, keys, values)]
    with torch.set_grad_enabled(spec.trains):
        for part in inputs:
            part.requires_grad_(spec.trains)
        joined = attend(*inputs, spec.attention_backend, spec.deterministic_attention)
    output = joined.detach().flatten(0, 1).contiguous()
    excluded = exclude_self(output, _rows_from(own_values, spec, first))
    saved.attention = *inputs, joined, excluded
    return excluded.flatten(1)


def _mlp_backward(context, gradients, index, saved, gradient) -> torch.Tensor:
    """The gradient of the residual stream before the MLP, from the one after it."""
    _, weights, additions = context
    activation, normed = saved.activation, saved.mlp_input[0]
    _write_product_gradient(gradients.down, index, gradient, activation)
    if additions.has("down", index):
        inner = gradient @ weights.down[index]
        additions.add_backward("down", index, activation, gradient, inner)
        activate_backward(inner, activation)
    else:
        inner = mlp_down_backward(gradient, weights.down[index], activation)
    _write_product_gradient(gradients.up, index, inner, normed)
    input_gradient = inner @ weights.up[index]
    additions.add_backward("up", index, normed, inner, input_gradient)
    return rms_norm_backward(input_gradient, *saved.mlp_input, gradient)


def _attention_backward(context, gradients, gain_sums, index, saved, gradient) -> torch.Tensor:
    """The gradient of attention's normed input, from that of the residual stream after it."""
    spec, weights, additions = context
    config, (*inputs, joined, excluded) = spec.config, saved.attention
    _write_product_gradient(gradients.attention_out, index, gradient, excluded.flatten(1))
    inner = gradient @ weights.attention_out[index]
    additions.add_backward("output", index, excluded.flatten(1), gradient, inner)
    output, own_values = joined.detach().flatten(0, 1), _heads(_split(saved.qkv, config)[2], config)
    inner, from_exclusion = exclude_self_backward(
        inner.view(excluded.shape), output.contiguous(), own_values
    )
    found = torch.autograd.grad(joined, inputs, inner.view(joined.shape))
    # Flattening a single sequence copies nothing, whatever layout the backend chose.
    query_gradient, key_gradient, value_gradient = (
        part.flatten(0, 1).contiguous() for part in found
    )
    qkv_gradient = heads_backward(
        query_gradient, key_gradient, value_gradient, from_exclusion, saved.qkv, spec.cos,
        spec.sin, weights.gain[index], gain_sums,
    )  # fmt: skip
    parts = _split(qkv_gradient, config)
    if index in config.value_layers:
        number = config.value_layers.index(index)
        by_token = sums_by_token(parts[2], spec.tokens, len(weights.values))
        if gradients.value_scales is not None:
            gradients.value_scales[number] = (by_token * weights.values).sum()
        if gradients.values is not None:
            gradients.values.add_(weights.value_scales[number] * by_token)
    normed = saved.attention_input[0]
    _write_product_gradient(gradients.qkv, index, qkv_gradient, normed)
    input_gradient = qkv_gradient @ weights.qkv[index]
    for projection, part in zip(QKV, parts, strict=True):
        additions.add_backward(projection, index, normed, part, input_gradient)
    return input_gradient


def _write_product_gradient(
    gradients: torch.Tensor | None, index: int, gradient: torch.Tensor, x: torch.Tensor
) -> None:
    """Write a matrix's gradient, where it was asked for, from that [M, out] of its product with x.

    x: [M, in].
    """
    if gradients is not None:
        torch.mm(gradient.T, x, out=gradients[index])


def _split(qkv: torch.Tensor, config: GPTConfig) -> tuple[torch.Tensor, ...]:
    """Queries [M, C], keys and values [M, K·D] as views of qkv."""
    return qkv.split((config.width, config.kv_width, config.kv_width), dim=1)


def _heads(part: torch.Tensor, config: GPTConfig) -> torch.Tensor:
    return part.unflatten(1, (-1, config.head_width))


def _rows_from(x: torch.Tensor, spec: PassSpec, first: int) -> torch.Tensor:
    """The rows of the positions from `first` on, of every sequence; x itself where that is all."""
    if first == 0:
        return x
    return x.unflatten(0, spec.tokens.shape)[:, first:].flatten(0, 1)
