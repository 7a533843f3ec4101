"""The model's hooks for the fused twin: they see what the plain formulation would show them.

Shapes: M rows (tokens), of B sequences.
"""

import math
from collections.abc import Callable

import torch

from fairway.model.gpt import GPT
from fairway.model.spec import PROJECTIONS


class Hooks:
    """`activation_hook` and `gradient_hook`, without the scales that matrices have folded in."""

    def __init__(self, model: GPT, sequences: int) -> None:
        self._activation_hook, self._gradient_hook = model.activation_hook, model.gradient_hook
        self._scales = {"output": model.attention_scale, "down": model.mlp_scale}
        self._layers, self._sequences = model.config.layers, sequences

    def show_inputs(self, layer: int, x: torch.Tensor, *projections: str) -> None:
        """Show x [M, in], which the matrices of a block's `projections` all multiply."""
        if self._activation_hook is None:
            return
        if not self._scales.keys() & {*projections}:
            x = x / math.sqrt(layer + 1)
        self._show(self._activation_hook, layer, x, projections)

    def show_gradient(self, layer: int, gradient: torch.Tensor, projection: str) -> None:
        """Show the gradient [M, out] of a folded matrix's product as that of the matrix's own."""
        if self._gradient_hook is None:
            return
        if projection in self._scales:
            gradient = gradient * self._scales[projection][layer].to(gradient.dtype)
        self._show(self._gradient_hook, layer, gradient, [projection])

    def _show(self, hook: Callable, layer: int, rows: torch.Tensor, projections) -> None:
        rows = rows.detach().unflatten(0, (self._sequences, -1))
        for bank, half in map(PROJECTIONS.get, projections):
            hook(bank, half * self._layers + layer, rows)
