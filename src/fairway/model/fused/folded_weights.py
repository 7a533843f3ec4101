"""The fused model's weights: the banks with the scales around them folded in.

Shapes: C width, H query heads, K key/value heads, D head width, F MLP width, V vocabulary, L
blocks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fairway.model.fused.folding import scale_rows, scale_rows_backward
from fairway.model.gpt import GPT


class FoldedWeights(NamedTuple):
    """The weights of all blocks; matrices in the compute dtype, scales folded in."""

    qkv: torch.Tensor
    """[L, C + 2·K·D, C]: query, key and value matrices, times the block's depth scale."""
    attention_out: torch.Tensor
    """[L, C, C], rows times attention_scale."""
    up: torch.Tensor
    """[L, F, C], times the block's depth scale."""
    down: torch.Tensor
    """[L, C, F], rows times mlp_scale."""
    mix: torch.Tensor
    """float32 [L, 2, C]."""
    skip: torch.Tensor
    """float32 [skips, C]."""
    gain: torch.Tensor
    """float32 [L, H]."""
    value_scales: torch.Tensor | None
    """float32 [value layers], where there are any."""
    values: torch.Tensor | None
    """float32 [V, K·D], the value embedding of every token, where there are value layers."""


def folded_weights(model: GPT) -> FoldedWeights:
    """The banks in the compute dtype with the scales around them folded in; differentiable."""
    layers, values, value_scales = model.config.layers, None, None
    if model.config.value_layers:
        value_scales = model.value_layer_scales
        values = model.value_scale * F.linear(model.value_embedding, model.value_projection)
    depth = torch.arange(1, layers + 1, device=model.mlp_up_bank.device).rsqrt().view(-1, 1)

    def fold(name: str, rows: torch.Tensor) -> torch.Tensor:
        bank = getattr(model, name)
        if model.fake_quantize is not None:
            bank = model.fake_quantize(name, bank)
        return ScaleRows.apply(bank, rows.expand(bank.shape[:2]), model.compute_dtype)

    query_rows = depth.expand(layers, model.config.width)
    query_output = fold("query_output_bank", torch.cat((query_rows, model.attention_scale)))
    key_value = fold("key_value_bank", torch.cat((depth, depth)))
    parts = (query_output[:layers], key_value[:layers], key_value[layers:])
    return FoldedWeights(
        qkv=torch.cat(parts, dim=1),
        attention_out=query_output[layers:],
        up=fold("mlp_up_bank", depth),
        down=fold("mlp_down_bank", model.mlp_scale),
        mix=model.residual_mix,
        skip=model.skip_weights,
        gain=model.query_gain,
        value_scales=value_scales,
        values=values,
    )


class ScaleRows(torch.autograd.Function):
    """bank [n, out, in] times scales [n, out], written in `dtype` without a float32 copy."""

    @staticmethod
    def forward(ctx, bank, scales, dtype):
        bank, scales = bank.contiguous(), scales.contiguous()
        ctx.save_for_backward(bank, scales)
        return scale_rows(bank, scales, dtype)

    @staticmethod
    def backward(ctx, gradient):
        return *scale_rows_backward(gradient.contiguous(), *ctx.saved_tensors), None
