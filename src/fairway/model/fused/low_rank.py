"""What the rows of a batch add to the blocks' matrices, each its own, in the fused formulation.

To the product of x and a matrix, row b adds second_b · first_b · x. Shapes: B rows of T places,
M = B·T, r rank.
"""

import math
from collections.abc import Sequence

import torch

from fairway.model.gpt import GPT, PROJECTIONS

Place = tuple[str, int]
"""A projection, one of PROJECTIONS, and its block."""


def folded_factors(model: GPT) -> dict[Place, tuple[torch.Tensor, torch.Tensor]]:
    """The adapter's factors, [B, r, in] and [B, out, r], with the scales around them folded in.

    As the matrices have them in `folded_weights`. Differentiable; empty without an adapter.
    """
    if model.adapter is None:
        return {}
    layers, parts, folded = model.config.layers, model.adapter.parts, {}
    after = {"output": model.attention_scale, "down": model.mlp_scale}
    for projection, (bank, half) in PROJECTIONS.items():
        for layer in range(layers):
            if (bank, half * layers + layer) not in parts:
                continue
            first, second = parts[bank, half * layers + layer]
            if projection in after:
                second = second * after[projection][layer].to(second.dtype).unsqueeze(1)
            else:
                first = first / math.sqrt(layer + 1)
            folded[projection, layer] = first, second
    return folded


class Additions:
    """The rows' products of one forward pass, and their gradients once it has run backward."""

    def __init__(self, places: Sequence[Place], factors: Sequence[torch.Tensor]) -> None:
        """factors: those of `folded_factors` for each of `places`, one after the other."""
        self._factors = dict(
            zip(places, zip(factors[::2], factors[1::2], strict=True), strict=True)
        )
        self._gradients: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}

    def has(self, projection: str, layer: int) -> bool:
        return (projection, layer) in self._factors

    def add(self, projection: str, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add to y [M, out] what the rows have there for x [M, in], in place."""
        if self.has(projection, layer):
            first, second = self._factors[projection, layer]
            low = torch.bmm(_by_row(x, first), first.mT)
            _by_row(y, first).baddbmm_(low, second.mT)

    def add_backward(
        self,
        projection: str,
        layer: int,
        x: torch.Tensor,
        gradient: torch.Tensor,
        x_gradient: torch.Tensor,
    ) -> None:
        """Add to `x_gradient` [M, in] what comes through `add`, from y's gradient [M, out]."""
        if self.has(projection, layer):
            first, second = self._factors[projection, layer]
            x, gradient = _by_row(x, first), _by_row(gradient, first)
            low, low_gradient = torch.bmm(x, first.mT), torch.bmm(gradient, second)
            self._gradients[projection, layer] = (
                torch.bmm(low_gradient.mT, x),
                torch.bmm(gradient.mT, low),
            )
            _by_row(x_gradient, first).baddbmm_(low_gradient, first)

    def gradients(self) -> list[torch.Tensor]:
        """Of the factors, in the order in which they were given."""
        return [part for place in self._factors for part in self._gradients[place]]


def _by_row(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """[M, n] → [B, T, n]."""
    return x.unflatten(0, (len(factor), -1))
