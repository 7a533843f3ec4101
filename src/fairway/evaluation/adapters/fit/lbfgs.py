"""L-BFGS for many independent problems at once, one per row of a matrix.

Every row has its own curvature history, its own strong-Wolfe line search and its own stopping
test. A row meets the others only in the shape of the tensors: all reductions are along rows and
all choices are masks, so a row's path is bitwise the same whatever the other rows hold. That is
what keeps lanes of a causal evaluation apart: one shared step length would carry information.

Rows do not wait for one another either. Each call of the objective serves every row at the stage
where it is, one in the middle of a line search, another at the start of its next iteration.

Shape suffixes: B rows (problems), n unknowns, H pairs of history.
Sources: Nocedal & Wright, Numerical Optimization, 2nd edition, algorithms 3.5, 3.6 and 7.5;
Byrd, Nocedal & Schnabel (1994) for the products of the history as triangular systems.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SUFFICIENT_DECREASE = 1e-4  # c1 of the Wolfe conditions
CURVATURE = 0.9  # c2, the usual choice for quasi-Newton directions
LARGEST_EXTRAPOLATION = 10.0  # of one trial step over the one before
BRACKET_MARGIN = 0.1  # trial steps keep this share of the bracket away from its ends

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]


class Minimum(NamedTuple):
    """x: [B, n] where each row stopped. value: [B] there. iterations, evaluations: int64 [B]."""

    x: Tensor
    value: Tensor
    iterations: Tensor
    evaluations: Tensor


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise inner products, [B, n] x [B, n] -> [B]."""
    return (left * right).sum(dim=1)


def largest(vectors: Tensor) -> Tensor:
    """Row-wise largest magnitudes, [B, n] -> [B]."""
    return vectors.abs().amax(dim=1)


def rows_times(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Each row's vector times its matrix, [B, p] x [B, p, q] -> [B, q].

    As a row on the left: CPU libraries are several times slower with a single column on the right.
    """
    return torch.bmm(vectors.unsqueeze(1), matrices).squeeze(1)


def choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Rows of `yes` where mask [B] holds, rows of `no` elsewhere."""
    return torch.where(mask.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)


class History:
    """The last H steps s and gradient changes y of each row, oldest first.

    A row with fewer pairs has zeros at the front, which add nothing to its directions.
    """

    def __init__(self, like: Tensor, size: int):
        rows, unknowns = like.shape
        self.steps = like.new_zeros(rows, size, unknowns)
        self.changes = like.new_zeros(rows, size, unknowns)
        # Entry (i, j) is s_i . y_j for i <= j: the upper triangle R of Byrd et al. Empty entries
        # keep R invertible with a one on the diagonal.
        self.products = torch.eye(size, dtype=like.dtype, device=like.device).repeat(rows, 1, 1)
        self.scale = like.new_ones(rows)

    def push(self, mask: Tensor, step: Tensor, change: Tensor) -> None:
        """Remember a pair [B, n] for the rows in mask [B] whose curvature is safely positive."""
        curvature, change_square = dot(step, change), dot(change, change)
        mask = mask & (curvature > torch.finfo(step.dtype).eps * change_square)
        self.steps = choose(mask, _shifted(self.steps, step), self.steps)
        self.changes = choose(mask, _shifted(self.changes, change), self.changes)
        products = torch.zeros_like(self.products)
        products[:, :-1, :-1] = self.products[:, 1:, 1:]
        products[:, :, -1] = rows_times(change, self.steps.mT)
        self.products = choose(mask, products, self.products)
        self.scale = choose(mask, curvature / change_square, self.scale)

    def descent_direction(self, gradient: Tensor) -> Tensor:
        """-H g for each row, [B, n]; with no history the negative gradient.

        The two loops of algorithm 7.4 are substitutions in R: the first solves
        R a = S g, the second R' c = D a - Y r with D the diagonal of R and r = scale (g - a Y).
        """
        alpha = _solve(self.products, rows_times(gradient, self.steps.mT), upper=True)
        remainder = (gradient - rows_times(alpha, self.changes)) * self.scale.unsqueeze(1)
        diagonal = torch.diagonal(self.products, dim1=1, dim2=2)
        right = diagonal * alpha - rows_times(remainder, self.changes.mT)
        correction = _solve(self.products.mT, right, upper=False)
        return -(remainder + rows_times(correction, self.steps))


def _solve(triangles: Tensor, right: Tensor, upper: bool) -> Tensor:
    """Each row's triangular system, [B, H, H] and [B, H] -> [B, H]; the other half is ignored."""
    return torch.linalg.solve_triangular(triangles, right.unsqueeze(2), upper=upper).squeeze(2)


def _shifted(history: Tensor, newest: Tensor) -> Tensor:
    """Drop the oldest of [B, H, n], append `newest` [B, n]."""
    return torch.cat([history[:, 1:], newest.unsqueeze(1)], dim=1)


class Trial(NamedTuple):
    """A point on each row's search line: step length, objective value and slope there, all [B]."""

    step: Tensor
    value: Tensor
    slope: Tensor


def choose_trial(mask: Tensor, yes: Trial, no: Trial) -> Trial:
    """Row-wise choice between two trials."""
    return Trial(*(torch.where(mask, a, b) for a, b in zip(yes, no, strict=True)))


def cubic_minimizer(left: Trial, right: Trial, lowest: Tensor, highest: Tensor) -> Tensor:
    """Minimizer [B] of the cubic through two trials' values and slopes, kept in [lowest, highest].

    Nocedal & Wright equation 3.59; the middle of the range where the cubic has no minimum or a
    value is not finite.
    """
    width = right.step - left.step
    d1 = left.slope + right.slope - 3 * (left.value - right.value) / (left.step - right.step)
    d2 = (d1 * d1 - left.slope * right.slope).sqrt() * torch.sign(width)
    step = right.step - width * (right.slope + d2 - d1) / (right.slope - left.slope + 2 * d2)
    step = torch.where(torch.isfinite(step), step, (lowest + highest) / 2)
    return torch.minimum(torch.maximum(step, lowest), highest)


@dataclass
class LineSearch:
    """Each row's strong-Wolfe search along its direction.

    start: the trial at step 0. low: the best trial so far that decreases enough. high: the other
    end of the bracket, at step infinity while none is known. low_gradient: [B, n].
    step: the next step to try. trials: int64 [B] of this search.
    """

    start: Trial
    low: Trial
    high: Trial
    low_gradient: Tensor
    step: Tensor
    trials: Tensor

    @classmethod
    def begin(cls, value: Tensor, slope: Tensor, gradient: Tensor, step: Tensor) -> "LineSearch":
        """Searches from value [B], slope [B] and gradient [B, n] whose first trial is `step`."""
        start = Trial(torch.zeros_like(value), value, slope)
        high = Trial(torch.full_like(value, torch.inf), value, slope)
        return cls(start, start, high, gradient, step, torch.zeros_like(value, dtype=torch.int64))

    def restart(self, mask: Tensor, fresh: "LineSearch") -> None:
        """Take over the rows of `fresh` where mask [B] holds."""
        self.start = choose_trial(mask, fresh.start, self.start)
        self.low = choose_trial(mask, fresh.low, self.low)
        self.high = choose_trial(mask, fresh.high, self.high)
        self.low_gradient = choose(mask, fresh.low_gradient, self.low_gradient)
        self.step = torch.where(mask, fresh.step, self.step)
        self.trials = torch.where(mask, fresh.trials, self.trials)

    def update(self, new: Trial, gradient: Tensor, value_slack: float) -> Tensor:
        """Use the values at `self.step`; set the next step; return the rows [B] that may stop.

        A value within `value_slack` of the bound counts as low enough: near the minimum the
        differences are rounding noise. A value that is not finite never does.
        """
        self.trials = self.trials + 1
        bound = self.start.value + SUFFICIENT_DECREASE * new.step * self.start.slope + value_slack
        low_enough = new.value <= bound
        accepted = low_enough & (new.slope.abs() <= CURVATURE * self.start.slope.abs())
        too_high = ~low_enough | ((new.value >= self.low.value) & (self.trials > 1))
        uphill = new.slope * torch.sign(self.high.step - self.low.step) >= 0
        previous = self.low
        self.high = choose_trial(
            too_high, new, choose_trial(uphill & ~too_high, self.low, self.high)
        )
        # An accepted trial is the one to take, whatever its rank.
        lower = accepted | ~too_high
        self.low = choose_trial(lower, new, self.low)
        self.low_gradient = choose(lower, gradient, self.low_gradient)
        self.step = self._next_step(previous, new)
        return accepted

    def _next_step(self, previous: Trial, new: Trial) -> Tensor:
        """Interpolate inside the bracket; extrapolate where none is known yet."""
        bracketed = torch.isfinite(self.high.step)
        left = choose_trial(bracketed, self.low, previous)
        right = choose_trial(bracketed, self.high, new)
        nearest, farthest = torch.minimum(left.step, right.step), self.bracket_width()
        margin = BRACKET_MARGIN * farthest
        lowest = torch.where(
            bracketed, nearest + margin, new.step + 0.01 * (new.step - previous.step)
        )
        highest = torch.where(
            bracketed, nearest + farthest - margin, LARGEST_EXTRAPOLATION * new.step
        )
        return cubic_minimizer(left, right, lowest, highest)

    def bracket_width(self) -> Tensor:
        """|high - low| [B]; infinite while there is no bracket."""
        return (self.high.step - self.low.step).abs()


def minimize(
    objective: Objective,
    initial: Tensor,
    *,
    max_iterations: int,
    max_evaluations: int,
    history_size: int,
    tolerance_gradient: float,
    tolerance_change: float,
    max_line_search_steps: int,
) -> Minimum:
    """Minimize each row of `initial` [B, n] under `objective`: [B, n] -> values [B], gradients.

    The objective must treat rows independently. A row stops, and stays put, when its largest
    gradient entry is at most `tolerance_gradient`; when an iteration moves no entry by more than
    `tolerance_change`, or changes the value by less or promises to; after `max_iterations`; or
    after `max_evaluations`, the one at `initial` included, which may be in the middle of a line
    search. As one of `max_line_search_steps` trials, it then ends at the best point it found.
    """
    x = initial.clone()
    value, gradient = objective(x)
    iterations = torch.zeros_like(value, dtype=torch.int64)
    evaluations = torch.ones_like(iterations)
    history = History(x, history_size)
    direction = -gradient
    active = (largest(gradient) > tolerance_gradient) & (evaluations < max_evaluations)
    # A gradient says nothing about distance, so the very first step is a short one.
    first_step = (1 / gradient.abs().sum(dim=1)).clamp(max=1.0)
    search = LineSearch.begin(value, dot(gradient, direction), gradient, first_step)

    while bool(active.any()):
        step = torch.where(active, search.step, 0.0)
        trial_value, trial_gradient = objective(x + step.unsqueeze(1) * direction)
        evaluations = evaluations + active
        trial = Trial(step, trial_value, dot(trial_gradient, direction))
        accepted = search.update(trial, trial_gradient, tolerance_change)
        is_narrow = search.bracket_width() * largest(direction) < tolerance_change
        is_last = evaluations >= max_evaluations
        is_over = accepted | is_narrow | is_last | (search.trials >= max_line_search_steps)
        moved = active & is_over
        if not bool(moved.any()):
            continue

        change = search.low.step.unsqueeze(1) * direction
        decrease = search.start.value - search.low.value
        history.push(moved, change, search.low_gradient - gradient)
        x = choose(moved, x + change, x)
        value = torch.where(moved, search.low.value, value)
        gradient = choose(moved, search.low_gradient, gradient)
        iterations = iterations + moved
        direction = choose(moved, history.descent_direction(gradient), direction)
        slope = dot(gradient, direction)
        finished = (
            (largest(gradient) <= tolerance_gradient)
            | (largest(change) <= tolerance_change)
            | (decrease.abs() < tolerance_change)
            | ~(slope < -tolerance_change)
            | (iterations >= max_iterations)
            | is_last
        )
        active = active & ~(moved & finished)
        fresh = LineSearch.begin(value, slope, gradient, torch.ones_like(value))
        search.restart(moved, fresh)
    return Minimum(x, value, iterations, evaluations)
