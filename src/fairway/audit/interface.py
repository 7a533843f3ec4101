"""What the audit asks of an evaluator, and what each of its checks answers.

An *evaluator* is a function from tokens, int64 [n + 1], to the log-probabilities that it scored
them with, float [n, V]: row i is the distribution that predicted `tokens[i + 1]`. The audit needs
to know no more. An evaluator that returns `Scores` also says which targets it scored, in which
order, and what it reported for each, so that coverage, order and arithmetic can be checked too; it
may leave the distributions out. `fairway.audit.Recorder` makes one of any script.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fairway.errors import UserError

Verdict = Literal["PASS", "FAIL", "UNDECIDED", "NOT RUN", "NOT APPLICABLE"]

PASS = "PASS"
"""The check ran and found no fault."""

FAIL = "FAIL"
"""The check ran and found a fault."""

UNDECIDED = "UNDECIDED"
"""The check ran, but what it saw tells neither a fault from rounding nor an honest evaluator from
one that does not read its text."""

NOT_RUN = "NOT RUN"
"""The check could have been run but something that it needs was left out."""

NOT_APPLICABLE = "NOT APPLICABLE"
"""What the check examines does not exist for this evaluator."""

UNBOUNDED_NATS = 1e6
"""This stands for infinite nats, from or to a probability of zero: JSON has no infinity."""


@dataclass(frozen=True)
class Scores:
    """An evaluator's scores and distributions, and in which order it made them.

    log_probs: float [n, V]; row i is the distribution that predicted tokens[i + 1]. None where only
        losses are known.
    positions: int64 [m]; the target (an index into the tokens, 1 … n) of each score that went into
        the total, in the order in which the scores were fixed.
    reported_nll: float [m]; the nats that were reported for each of them.
    lanes: int64 [m]; which of several independent left-to-right passes (lanes, ranks) fixed each
        score. Only within a lane must the targets be in order. None: one lane.
    order: int64 [n]; the rank of each target 1 … n in the order that the evaluator declares: every
        distribution may depend on targets of lower rank and on where documents start, and on
        nothing else. None: the order of the text.
    own_nll: float [m]; -log p of each score's target under the distribution that made the score.
        None: under the target's row of `log_probs`.
    """

    log_probs: Tensor | None
    positions: Tensor
    reported_nll: Tensor
    lanes: Tensor | None = None
    order: Tensor | None = None
    own_nll: Tensor | None = None


Evaluator = Callable[[Tensor], Tensor | Scores]
"""An evaluator maps tokens int64 [n + 1] to log-probabilities float [n, V], or to Scores."""

Predictor = Callable[[Tensor], Tensor]
"""A predictor maps a prefix, int64 [k] with k ≥ 1, to the log-probabilities float32 [V] of the next
token, without adaptation."""


@dataclass(frozen=True)
class Check:
    """The outcome of one check: a verdict, a sentence for a reviewer, and the numbers behind it."""

    name: str
    verdict: Verdict
    sentence: str
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The audit's own copy of what an evaluator returned for one text of n targets.

    rows: float [n, V] log-probabilities, or [n, 1] losses where it gave no distributions.
    nll: float64 [n], nats of each target; NaN for one without a score.
    order: int64 [n], the declared rank of each target.
    scores: as the evaluator returned them; None where it returned distributions only.
    """

    rows: Tensor
    nll: Tensor
    order: Tensor
    scores: Scores | None

    @property
    def has_distributions(self) -> bool:
        return self.scores is None or self.scores.log_probs is not None

    @property
    def is_reordered(self) -> bool:
        """Whether the evaluator declares another order than the text's."""
        return self.scores is not None and self.scores.order is not None


def evaluate(evaluator: Evaluator, tokens: Tensor) -> Answer:
    """Run the evaluator on its own copy of `tokens`, and copy its answer: it may use both again.

    Raises UserError where the answer has not the form that this module describes. The number of
    its rows and their width are not looked at.
    """
    assert tokens.dtype == torch.int64 and tokens.ndim == 1
    returned = evaluator(tokens.clone())
    check_form(returned)
    scores = _copied(returned) if isinstance(returned, Scores) else None
    distributions = returned if scores is None else scores.log_probs
    num_targets = len(tokens) - 1
    order = torch.arange(num_targets)
    if scores is not None and scores.order is not None:
        order = _ranks(scores.order, num_targets)
    if distributions is not None:
        rows = distributions.detach().clone()
        return Answer(rows, _own_nll(rows, tokens), order, scores)
    nll = torch.full((num_targets,), math.nan, dtype=torch.float64)
    inside = (scores.positions >= 1) & (scores.positions <= num_targets)
    # The first score of a target counts: written last.
    targets = scores.positions[inside].flip(0) - 1
    nll[targets] = scores.reported_nll[inside].flip(0).double()
    return Answer(nll[:, None], nll, order, scores)


def _own_nll(rows: Tensor, tokens: Tensor) -> Tensor:
    """float64 [n]; empty where the rows fit neither the text nor its vocabulary."""
    targets = tokens[1:].to(rows.device)
    if len(rows) != len(targets) or (len(targets) and rows.shape[1] <= int(targets.max())):
        return torch.empty(0, dtype=torch.float64)
    return -rows.gather(1, targets[:, None]).squeeze(1).double().cpu()


def check_form(returned: Any) -> None:
    """Raise UserError where an evaluator's answer has not the form that this module describes."""
    if not isinstance(returned, Scores):
        _check_rows(returned)
        return
    if returned.log_probs is not None:
        _check_rows(returned.log_probs)
    positions = returned.positions
    if not isinstance(positions, Tensor) or positions.ndim != 1:
        raise UserError(
            "the evaluator's Scores.positions are no list: expected an int64 tensor [m]"
        )
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise UserError(f"the evaluator's positions are {positions.dtype}: expected whole numbers")
    for name in ("reported_nll", "lanes", "own_nll"):
        column = getattr(returned, name)
        if column is None and name != "reported_nll":
            continue
        if not isinstance(column, Tensor) or column.shape != positions.shape:
            found = list(column.shape) if isinstance(column, Tensor) else type(column).__name__
            raise UserError(
                f"the evaluator returned Scores with {name} of shape {found} and {len(positions)} "
                "positions: expected a tensor of one entry a score"
            )


def _check_rows(value: Any) -> None:
    if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
        found = (
            f"shape {tuple(value.shape)} of {value.dtype}"
            if isinstance(value, Tensor)
            else f"a {type(value).__name__}"
        )
        raise UserError(
            f"the evaluator returned {found}: expected a float tensor [targets, vocabulary] of "
            "log-probabilities, or fairway.audit.Scores"
        )


def _copied(scores: Scores) -> Scores:
    """A copy on the CPU, distributions and order aside."""
    columns = {
        name: None if column is None else column.detach().cpu().clone()
        for name, column in (
            ("positions", scores.positions.long()),
            ("reported_nll", scores.reported_nll),
            ("lanes", scores.lanes),
            ("own_nll", scores.own_nll),
        )
    }
    return Scores(log_probs=scores.log_probs, order=scores.order, **columns)


def _ranks(order: Any, num_targets: int) -> Tensor:
    ranks = order.detach().cpu().long().clone() if isinstance(order, Tensor) else None
    if ranks is None or not torch.equal(ranks.sort().values, torch.arange(num_targets)):
        raise UserError(
            f"the evaluator declared an order that is no ranking of its {num_targets} targets: "
            f"expected an int64 tensor with each of 0 … {num_targets - 1} once"
        )
    return ranks
