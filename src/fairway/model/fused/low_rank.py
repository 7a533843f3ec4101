"""Per-row LoRA for the fused model.

Each row of a batch has factors A and B of its own for a matrix; it adds B·A·x to the product of the
matrix and x. Shapes: N rows of T positions, M = N·T, r rank.
"""

import math
from collections.abc import Sequence

import torch

from fairway.model.gpt import GPT
from fairway.model.spec import PROJECTIONS

AdaptedMatrix = tuple[str, int]
"""A projection, one of PROJECTIONS, and its block."""


def folded_factors(model: GPT) -> dict[AdaptedMatrix, tuple[torch.Tensor, torch.Tensor]]:
    """The adapter's factors A [N, r, in] and B [N, out, r], with the scales around them folded in.

    `folded_weights` folds the same scales into the matrices. Differentiable; empty without an
    adapter.
    """
    if model.adapter is None:
        return {}
    layers, parts, folded = model.config.layers, model.adapter.parts, {}
    after = {"output": model.attention_scale, "down": model.mlp_scale}
    for projection, (bank, half) in PROJECTIONS.items():
        for layer in range(layers):
            if (bank, half * layers + layer) not in parts:
                continue
            A, B = parts[bank, half * layers + layer]
            if projection in after:
                B = B * after[projection][layer].to(B.dtype).unsqueeze(1)
            else:
                A = A / math.sqrt(layer + 1)
            folded[projection, layer] = A, B
    return folded


class Additions:
    """The rows' products of one forward pass, and their gradients once it has run backward."""

    def __init__(self, matrices: Sequence[AdaptedMatrix], factors: Sequence[torch.Tensor]) -> None:
        """factors: those of `folded_factors` for each of `matrices`, one after the other."""
        self._factors = dict(
            zip(matrices, zip(factors[::2], factors[1::2], strict=True), strict=True)
        )
        self._gradients: dict[AdaptedMatrix, tuple[torch.Tensor, torch.Tensor]] = {}

    def has(self, projection: str, layer: int) -> bool:
        return (projection, layer) in self._factors

    def add(self, projection: str, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add each row's own product with x [M, in] to y [M, out], in place."""
        if self.has(projection, layer):
            A, B = self._factors[projection, layer]
            low = torch.bmm(_by_row(x, A), A.mT)
            _by_row(y, A).baddbmm_(low, B.mT)

    def add_backward(
        self,
        projection: str,
        layer: int,
        x: torch.Tensor,
        gradient: torch.Tensor,
        x_gradient: torch.Tensor,
    ) -> None:
        """Add x's gradient through `add` to `x_gradient` [M, in], from y's gradient [M, out]."""
        if self.has(projection, layer):
            A, B = self._factors[projection, layer]
            x, gradient = _by_row(x, A), _by_row(gradient, A)
            low, low_gradient = torch.bmm(x, A.mT), torch.bmm(gradient, B)
            found = torch.bmm(low_gradient.mT, x), torch.bmm(gradient.mT, low)
            if before := self._gradients.get((projection, layer)):  # of a later run of the block
                found = tuple(map(torch.add, before, found))
            self._gradients[projection, layer] = found
            _by_row(x_gradient, A).baddbmm_(low_gradient, A)

    def gradients(self) -> list[torch.Tensor]:
        """The factors' gradients, in the order in which the factors were given."""
        return [part for matrix in self._factors for part in self._gradients[matrix]]


def _by_row(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """[M, n] → [N, T, n]."""
    return x.unflatten(0, (len(factor), -1))
