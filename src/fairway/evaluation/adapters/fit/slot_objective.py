"""SLOT's objective apart from who computes it: its tolerances, its bounds, and its fixed terms.

For a row with context targets v_1 … v_P, whose model probabilities are q_1 … q_P, a fit minimizes

    (Σ_i cross-entropy of v_i under softmax(ln q_i + delta) + l2 / 2 · |delta|²) / P.
"""

import torch
from torch import Tensor

TOLERANCE_GRADIENT = 1e-5
"""A fit ends where no entry of the gradient of the mean loss exceeds this, in nats."""

TOLERANCE_CHANGE = 1e-7
"""A fit ends where an iteration changes the mean loss, or every entry of delta, by less, in nats.

That is far below what a score can show, and about float32's rounding of a loss of one nat.
"""

MAX_LINE_SEARCH_STEPS = 10
"""A line search ends after so many trials with the best of them."""


def max_evaluations(iterations: int) -> int:
    """The most that torch.optim.LBFGS's default `max_eval` lets this many iterations cost.

    That is max_iter * 5 // 4, but a line search that begins below it tries one more step.
    """
    return iterations * 5 // 4 + 1


def loss_terms(
    targets: Tensor, is_context: Tensor, initial: Tensor, l2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss needs besides the probabilities.

    targets: int64 [B, P]. is_context: bool [B, P]. initial: float32 [B, V].
    share: float32 [B, P], each position's weight. wanted: float32 [B, V], the share of each token
    among the targets. ridge: float32 [B], the prior's weight in the mean.
    """
    positions = is_context.sum(dim=1).clamp(min=1)
    share = is_context / positions.unsqueeze(1)
    wanted = torch.zeros_like(initial).scatter_add_(1, targets, share)
    return share, wanted, l2 / positions
