"""The model's forward and backward pass written out, for CUDA: the fast twin of `gpt.py`.

It computes the same function of the same parameters as the plain formulation, up to rounding. The
kernels beside this file compute everything between the matrix products; every per-channel scale
next to a matrix is folded into it; the products themselves accumulate residual sums; and gradients
are written by hand, so that no activation is read or stored more often than it must be. `GPT` calls
`loss` and `hidden` where this module is its backend.

Shapes: M = B·T tokens, C width, H query heads, K key/value heads, D head width, F MLP width, V
vocabulary, L blocks, each of which may run in several steps.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fairway.model.attention import attend
from fairway.model.functional import bigram_bucket, document_numbers, rotary_angles
from fairway.model.fused.embedding import (
    Embed,
    EmbedGatedByInput,
    Tokens,
    add_embedding,
    sums_by_token,
)
from fairway.model.fused.exclusion import (
    HeadGate,
    exclude_self,
    exclude_self_backward,
    head_gate_backward,
)
from fairway.model.fused.folded_weights import FoldedWeights, folded_weights
from fairway.model.fused.heads import copy_heads, gain_sums, heads_backward, norm_and_rotate
from fairway.model.fused.hooks import Hooks
from fairway.model.fused.loss import HeadLoss
from fairway.model.fused.low_rank import Additions, folded_factors
from fairway.model.fused.mlp import activate, activate_backward, mlp_down_backward, mlp_up
from fairway.model.fused.residual import (
    channel_sums,
    mix_and_norm,
    mix_and_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from fairway.model.gpt import GPT
from fairway.model.spec import BlockOrder, GPTConfig

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
        "activation_slope",
        "head_gate_dimensions",
        "smear",
        "smear_dimensions",
        "skip_gates",
        "recurrent_layers",
        "recurrence_passes",
        "asymmetric_softcap",
        "document_masks",
        "bos_id",
    )
)

WIDTH_MULTIPLE = 8
"""The tensor memory accelerator moves rows whose length in bytes is a multiple of 16."""


@dataclass(frozen=True)
class PassSpec:
    """The inputs of a pass that take no gradients."""

    config: GPTConfig
    order: BlockOrder
    attention_backend: str
    deterministic_attention: bool
    tokens: torch.Tensor
    """int64 [B, T]."""
    documents: torch.Tensor | None
    """int64 [B, T], the number of each position's document, where documents are masked."""
    first_position: int
    """The first position whose hidden state is wanted."""
    trains: bool
    """Whether there will be a backward pass; a Function cannot tell from within."""
    key_copies: int
    """Copies of every key and value head that attention gets."""
    cos: torch.Tensor
    """float32 [T, rotary_dimensions / 2], as is sin."""
    sin: torch.Tensor
    hooks: Hooks
    adapted: tuple[tuple[str, int], ...] = ()
    """Projections and blocks to which the rows of the batch add products of their own."""

    def later(self, step: int) -> tuple[int, int] | None:
        """The row of the skip weights and the step that takes up `step`'s input, if any does.

        The first decoder step takes up its own.
        """
        later = 2 * self.order.encoders - step
        skip = self.order.skip(later)
        return None if skip is None else (skip[0], later)


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
    skip: torch.Tensor | None = None
    """[M, C], the encoder output that it takes up."""
    skip_weights: torch.Tensor | None = None
    attention_input: tuple[torch.Tensor, ...] = ()
    """Normed [M, C], and 1 / rms, float32 [M]."""
    qkv: torch.Tensor | None = None
    """[M, C + 2·K·D], before norm and rotation."""
    attention: tuple[torch.Tensor, ...] = ()
    """Queries, keys, values and output, joined by autograd; the output without self, gated."""
    mlp_input: tuple[torch.Tensor, ...] = ()
    activation: torch.Tensor | None = None
    """The MLP's, [M, F]."""


class PartialGrads(NamedTuple):
    """Gradients of per-channel parameters as the kernels leave them: one sum for each program."""

    mix: torch.Tensor
    """float32 [L, 2, programs, C]."""
    skip: torch.Tensor
    """float32 [skips, 2, programs, C]."""
    gain: torch.Tensor
    """float32 [L, programs, H]."""

    def add_up(self, gradients: FoldedWeights) -> None:
        """Write the sums to `gradients`, all blocks' at once, where they were asked for."""
        if gradients.mix is not None:
            torch.sum(self.mix, 2, out=gradients.mix)
        if gradients.skip is not None:
            torch.sum(self.skip[:, : gradients.skip.shape[1]], 2, out=gradients.skip)
        if gradients.gain is not None:
            torch.sum(self.gain, 1, out=gradients.gain)


def supports(config: GPTConfig) -> str | None:
    """Why this module cannot compute a model of this configuration; None where it can."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name not in SUPPORTED and value != field.default:
            return f"model.{name} is {value!r}, and the fused kernels know {field.default!r} only"
    for name in ("width", "mlp_width"):
        if getattr(config, name) % WIDTH_MULTIPLE:
            return (
                f"model.{name} is {getattr(config, name)}, and the fused kernels need a multiple "
                f"of {WIDTH_MULTIPLE}"
            )
    return None


def loss(model: GPT, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of int64 `targets` [B, T] given `tokens` [B, T]."""
    config, hidden = model.config, _hidden(model, tokens, 0)
    cap = model.softcaps if config.asymmetric_softcap else config.logit_softcap
    return HeadLoss.apply(hidden, model.token_embedding, targets, cap, torch.is_grad_enabled())


def hidden(model: GPT, tokens: torch.Tensor, first_position: int = 0) -> torch.Tensor:
    """tokens int64 [B, T] → the final, normalized residual stream [B, T − first_position, C]."""
    needs_all = torch.is_grad_enabled() or model.activation_hook is not None
    computed_from = 0 if needs_all else first_position
    rows = _hidden(model, tokens, computed_from)
    return rows.unflatten(0, (len(tokens), -1))[:, first_position - computed_from :]


def _hidden(model: GPT, tokens: torch.Tensor, first_position: int) -> torch.Tensor:
    config, tokens = model.config, tokens.contiguous()
    rotation = rotary_angles(config, torch.arange(tokens.shape[1], device=tokens.device))
    documents = document_numbers(config, tokens)
    trains = torch.is_grad_enabled()
    factors = folded_factors(model)
    spec = PassSpec(
        config, model.orders[model.recurs], model.attention_backend,
        model.deterministic_attention, tokens, documents, first_position, trains,
        model.key_copies if trains else 1, *rotation, Hooks(model, len(tokens)), (*factors,),
    )  # fmt: skip
    flat = [factor for pair in factors.values() for factor in pair]
    return Blocks.apply(spec, _embedded(model, tokens), *folded_weights(model), *flat)


def _embedded(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """x0 [M, C]."""
    config, buckets, bigram_table = model.config, None, None
    if config.bigram_buckets:
        previous = F.pad(tokens[:, :-1], (1, 0), value=-1)
        buckets = bigram_bucket(tokens, previous, config.bigram_buckets)
        # A row of the product is the product of a row: the tables are projected, not the tokens.
        projected = F.linear(model.bigram_embedding, model.bigram_projection)
        bigram_table = model.bigram_scale * projected
    tables = Tokens(tokens, buckets), model.token_embedding, bigram_table
    if config.smear == "input":
        gate = model.smear_weights, model.smear_scale, config.bos_id
        return EmbedGatedByInput.apply(*tables, *gate, model.compute_dtype)
    gate = torch.sigmoid(model.smear_gate) if config.smear == "channel" else None
    return Embed.apply(*tables, gate, model.compute_dtype)


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
        for step in range(len(spec.order.blocks)):
            saved = BlockActivations(x)
            activations.append(saved)
            if skip := spec.order.skip(step):
                row, encoder = skip
                saved.skip, saved.skip_weights = activations[encoder + 1].x, weights.skip[row]
            x = _block(context, step, saved, x0)
            if not spec.trains:
                activations[step] = BlockActivations(saved.x)
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
            channel_sums(x0, spec.config.layers),
            channel_sums(x0, spec.config.skips),
            gain_sums(x0, spec.config.heads, spec.config.layers),
        )
        x0_gradient = torch.zeros_like(x0)
        gradient = rms_norm_backward(gradient, *ctx.saved_tensors, x0_gradient)
        skip_gradients: dict[int, torch.Tensor] = {}
        for step in reversed(range(len(activations))):
            saved, index = activations.pop(), spec.order.blocks[step]
            gradient = _mlp_backward(context, gradients, index, saved, gradient)
            inner = _attention_backward(
                context, gradients, partial.gain[index], index, saved, gradient
            )
            skip, later = spec.order.skip(step), spec.later(step)
            inner, gradient = mix_and_norm_backward(
                gradient, inner, saved.attention_input[1], saved.x, x0, weights.mix[index],
                saved.skip, saved.skip_weights,
                skip_gradients.pop(later[1], None) if later else None,
                weights.skip[later[0]] if later else None,
                x0_gradient, partial.mix[index], partial.skip[skip[0]] if skip else None,
            )  # fmt: skip
            if skip:
                skip_gradients[step] = inner
        partial.add_up(gradients)
        x0_gradient.add_(gradient)
        return None, x0_gradient, *gradients, *additions.gradients()


def _block(context, step, saved, x0) -> torch.Tensor:
    """A step from `saved.x` to its output; keeps in `saved` what the backward pass needs."""
    spec, weights, additions = context
    index, slope = spec.order.blocks[step], spec.config.activation_slope
    x, *saved.attention_input = mix_and_norm(
        saved.x, x0, weights.mix[index], saved.skip, saved.skip_weights
    )
    first = spec.first_position if step == len(spec.order.blocks) - 1 else 0
    output = _attention(context, index, saved, first)
    spec.hooks.show_inputs(index, output, "output")
    x = _rows_from(x, spec, first)
    # Both sums go into the residual stream's own memory: the backward pass needs the norms'
    # outputs, not their inputs.
    x.addmm_(output, weights.attention_out[index].T)
    additions.add("output", index, output, x)
    saved.mlp_input = rms_norm(x)
    normed = saved.mlp_input[0]
    spec.hooks.show_inputs(index, normed, "up")
    if additions.has("up", index):
        up = normed @ weights.up[index].T
        additions.add("up", index, normed, up)
        saved.activation = activate(up, slope)
    else:
        saved.activation = mlp_up(normed, weights.up[index], slope, spec.trains)
    spec.hooks.show_inputs(index, saved.activation, "down")
    x.addmm_(saved.activation, weights.down[index].T)
    additions.add("down", index, saved.activation, x)
    return x


def _attention(context, index, saved, first) -> torch.Tensor:
    """Attention without self of the positions from `first` on, before its output matrix."""
    spec, weights, additions = context
    config, (normed, _) = spec.config, saved.attention_input
    latest = _rows_from(normed, spec, first)
    spec.hooks.show_inputs(index, normed, *QKV)
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
        joined = attend(
            *inputs, spec.attention_backend, spec.deterministic_attention, spec.documents
        )
    output = joined.detach().flatten(0, 1).contiguous()
    gate = _head_gate(weights, index, latest)
    excluded = exclude_self(output, _rows_from(own_values, spec, first), gate)
    saved.attention = *inputs, joined, excluded
    return excluded.flatten(1)


def _mlp_backward(context, gradients, index, saved, gradient) -> torch.Tensor:
    """The gradient of the residual stream before the MLP, from the one after it."""
    spec, weights, additions = context
    activation, normed = saved.activation, saved.mlp_input[0]
    slope = spec.config.activation_slope
    spec.hooks.show_gradient(index, gradient, "down")
    _add_product_gradient(gradients.down, index, gradient, activation)
    if additions.has("down", index):
        inner = gradient @ weights.down[index]
        additions.add_backward("down", index, activation, gradient, inner)
        activate_backward(inner, activation, slope)
    else:
        inner = mlp_down_backward(gradient, weights.down[index], activation, slope)
    spec.hooks.show_gradient(index, inner, "up")
    _add_product_gradient(gradients.up, index, inner, normed)
    input_gradient = inner @ weights.up[index]
    additions.add_backward("up", index, normed, inner, input_gradient)
    return rms_norm_backward(input_gradient, *saved.mlp_input, gradient)


def _attention_backward(context, gradients, gain_sums, index, saved, gradient) -> torch.Tensor:
    """The gradient of attention's normed input, from that of the residual stream after it."""
    spec, weights, additions = context
    config, (*inputs, joined, excluded) = spec.config, saved.attention
    spec.hooks.show_gradient(index, gradient, "output")
    _add_product_gradient(gradients.attention_out, index, gradient, excluded.flatten(1))
    inner = gradient @ weights.attention_out[index]
    additions.add_backward("output", index, excluded.flatten(1), gradient, inner)
    output, own_values = joined.detach().flatten(0, 1), _heads(_split(saved.qkv, config)[2], config)
    normed = saved.attention_input[0]
    gate = _head_gate(weights, index, normed)
    inner, from_exclusion, of_gate = exclude_self_backward(
        inner.view(excluded.shape), output.contiguous(), own_values, gate
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
            gradients.value_scales[number] += (by_token * weights.values).sum()
        if gradients.values is not None:
            gradients.values.add_(weights.value_scales[number] * by_token)
    _add_product_gradient(gradients.qkv, index, qkv_gradient, normed)
    input_gradient = qkv_gradient @ weights.qkv[index]
    for projection, part in zip(QKV, parts, strict=True):
        spec.hooks.show_gradient(index, part, projection)
        additions.add_backward(projection, index, normed, part, input_gradient)
    if gate is not None:
        weights_gradient = head_gate_backward(of_gate, gate, input_gradient)
        if gradients.head_gate is not None:
            gradients.head_gate[index] += weights_gradient
    return input_gradient


def _head_gate(weights: FoldedWeights, index: int, normed: torch.Tensor) -> HeadGate | None:
    """Of the heads' outputs at the rows of `normed`."""
    return None if weights.head_gate is None else HeadGate(normed, weights.head_gate[index])


def _add_product_gradient(
    gradients: torch.Tensor | None, index: int, gradient: torch.Tensor, x: torch.Tensor
) -> None:
    """Add a matrix's gradient, where it was asked for, from that [M, out] of its product with x.

    x: [M, in].
    """
    if gradients is not None:
        gradients[index].addmm_(gradient.T, x)


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
