"""The fit behind SLOT: one logit offset for many positions, in closed form over probabilities.

With q the model's probabilities at a position, logits + delta give its target v the loss
log(sum_u q_u exp(delta_u)) - delta_v - log q_v. The last term does not depend on delta, so one
softmax of the context serves a whole fit, and an evaluation of value and gradient is two
matrix-vector products with q: no logits are exponentiated again.
"""

import torch
from torch import Tensor

from fairway.evaluation.adapters.fit.lbfgs import Minimum, dot, minimize, rows_times
from fairway.evaluation.adapters.fit.slot_objective import (
    MAX_LINE_SEARCH_STEPS,
    TOLERANCE_CHANGE,
    TOLERANCE_GRADIENT,
    loss_terms,
    max_evaluations,
)


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
    most_evaluations: int | None = None,
) -> Minimum:
    """Fit each row's delta to its context; `x` of the result is clamped, zero without context.

    probabilities: float32 [B, P, V]. targets: int64 [B, P]. is_context: bool [B, P], the positions
    that count. initial: float32 [B, V]. Minimizes the loss of `slot_objective`, row by row, in at
    most `iterations` of L-BFGS and `most_evaluations` of the loss, by default
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
        max_evaluations=most_evaluations or max_evaluations(iterations),
        history_size=history,
        tolerance_gradient=TOLERANCE_GRADIENT,
        tolerance_change=TOLERANCE_CHANGE,
        max_line_search_steps=MAX_LINE_SEARCH_STEPS,
    )
    return result._replace(x=result.x.clamp(-clamp, clamp))


class ContextBuffer:
    """The probabilities with which each row's last targets were scored, as a ring of P entries.

    probabilities: [B, P, V], in the form that a fit takes. positions: int64 [B, P], 0 where nothing
    was written yet.
    """

    def __init__(self, rows: int, size: int, like: Tensor):
        self.probabilities = like.new_zeros(rows, size, like.shape[-1])
        self.positions = torch.zeros(rows, size, dtype=torch.int64, device=like.device)

    def write(self, rows: Tensor, positions: Tensor, probabilities: Tensor) -> None:
        """Store probabilities [m, V] of targets int64 [m] in the given rows int64 [m]."""
        entries = positions % self.positions.shape[1]
        self.probabilities[rows, entries] = probabilities
        self.positions[rows, entries] = positions
