"""The fit behind SLOT: one logit offset for many positions, in closed form over probabilities.

With q the model's probabilities at a position, logits + delta give its target v the loss
log(sum_u q_u exp(delta_u)) - delta_v - log q_v. The last term does not depend on delta, so one
softmax of the context serves a whole fit, and an evaluation of value and gradient is two
matrix-vector products with q: no logits are exponentiated again.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fairway.evaluation.adapters.fit.lbfgs import Minimum, dot, minimize, rows_times

# On the mean loss in nats: far below what a score can show, and above float32's rounding.
TOLERANCE_GRADIENT = 1e-5
TOLERANCE_CHANGE = 1e-7
MAX_LINE_SEARCH_STEPS = 10


def fit_delta(
    probabilities: Tensor,
    targets: Tensor,
    is_context: Tensor,
    initial: Tensor,
    *,
    l2: float,
    clamp: float,
    iterations: int,
    history: int,
) -> Minimum:
    """Fit each row's delta to its context; `x` of the result is clamped, zero without context.

    probabilities: float32 [B, P, V]. targets: int64 [B, P]. is_context: bool [B, P], the places
    that count. initial: float32 [B, V]. Minimizes, row by row and over its counted places,
    (sum of cross-entropies + l2 / 2 |delta|^2) / places, in at most `iterations` of L-BFGS and
    max_evaluations(iterations).
    """
    share, wanted, ridge = loss_terms(targets, is_context, initial, l2)

    def objective(delta: Tensor) -> tuple[Tensor, Tensor]:
        growth = delta.exp()
        # The floor is out of reach, except for a wild trial step of the line search.
        total = rows_times(growth, probabilities.mT).clamp(min=torch.finfo(growth.dtype).tiny)
        value = dot(share, total.log()) - dot(wanted, delta) + ridge / 2 * dot(delta, delta)
        expected = rows_times(share / total, probabilities) * growth
        return value, expected - wanted + ridge.unsqueeze(1) * delta

    has_context = is_context.any(dim=1, keepdim=True)
    result = minimize(
        objective,
        torch.where(has_context, initial, 0.0),
        max_iterations=iterations,
        max_evaluations=max_evaluations(iterations),
        history_size=history,
        tolerance_gradient=TOLERANCE_GRADIENT,
        tolerance_change=TOLERANCE_CHANGE,
        max_line_search_steps=MAX_LINE_SEARCH_STEPS,
    )
    return result._replace(x=result.x.clamp(-clamp, clamp))


def max_evaluations(iterations: int) -> int:
    """The most that torch.optim.LBFGS's default `max_eval` lets this many iterations cost.

    That is max_iter * 5 // 4, but a line search that begins below it tries one more step.
    """
    return iterations * 5 // 4 + 1


def loss_terms(
    targets: Tensor, is_context: Tensor, initial: Tensor, l2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss of `fit_delta` needs beside the probabilities.

    share: float32 [B, P], each place's weight. wanted: float32 [B, V], the share of each token
    among the targets. ridge: float32 [B], the prior's weight in the mean.
    """
    places = is_context.sum(dim=1).clamp(min=1)
    share = is_context / places.unsqueeze(1)
    wanted = torch.zeros_like(initial).scatter_add_(1, targets, share)
    return share, wanted, l2 / places


class FitKernels(NamedTuple):
    """One way to compute a fit.

    softmax: float32 logits [m, V] or [B, P, V] -> probabilities in the form that `fit` takes.
    fit: `fit_delta` or one with its signature.
    """

    softmax: Callable[[Tensor], Tensor]
    fit: Callable[..., Minimum]


def fit_kernels(kernels: str) -> FitKernels:
    """The fit of this file for "plain", that of Triton kernels for "fused"."""
    if kernels == "fused":
        from fairway.adaptation import logit_delta_kernel  # there is no Triton without a GPU

        return FitKernels(logit_delta_kernel.compact_softmax, logit_delta_kernel.fit_delta)
    assert kernels == "plain", kernels
    return FitKernels(partial(torch.softmax, dim=-1), fit_delta)


class ContextBuffer:
    """The probabilities with which each row's last targets were scored, as a ring of P places.

    probabilities: [B, P, V], as `FitKernels.softmax` makes them. positions: int64 [B, P], 0 where
    nothing was written yet.
    """

    def __init__(self, rows: int, places: int, like: Tensor):
        self.probabilities = like.new_zeros(rows, places, like.shape[-1])
        self.positions = torch.zeros(rows, places, dtype=torch.int64, device=like.device)

    def contents(self) -> tuple[Tensor, Tensor]:
        """probabilities and positions."""
        return self.probabilities, self.positions

    def write(self, rows: Tensor, positions: Tensor, probabilities: Tensor) -> None:
        """Store probabilities [m, V] of targets int64 [m] in the given rows int64 [m]."""
        places = positions % self.positions.shape[1]
        self.probabilities[rows, places] = probabilities
        self.positions[rows, places] = positions
