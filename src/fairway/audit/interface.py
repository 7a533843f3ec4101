"""What the audit asks of an evaluator, and what each of its checks answers.

An *evaluator* is a function from tokens, int64 [n + 1], to the log-probabilities that it scored
them with, float32 [n, V]: row i is the distribution that predicted `tokens[i + 1]`. The audit needs
to know no more. An evaluator that returns `Scores` also says which targets it scored, in which
order, and what it reported for each, so that coverage, order and arithmetic can be checked too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fairway.errors import UserError

Verdict = Literal["PASS", "FAIL", "NOT RUN", "NOT APPLICABLE"]

PASS = "PASS"
"""The check ran and found no fault."""

FAIL = "FAIL"
"""The check ran and found a fault."""

NOT_RUN = "NOT RUN"
"""The check could have been run but something that it needs was left out."""

NOT_APPLICABLE = "NOT APPLICABLE"
"""What the check examines does not exist for this evaluator."""

UNBOUNDED_NATS = 1e6
"""This stands for infinite nats, from or to a probability of zero: JSON has no infinity."""


@dataclass(frozen=True)
class Scores:
    """An evaluator's distributions, and how it used them.

    log_probs: float [n, V]; row i is the distribution that predicted tokens[i + 1].
    positions: int64 [m]; the target (an index into the tokens, 1 … n) of each score that went into
        the total, in the order in which the scores were fixed.
    reported_nll: float [m]; the nats that were reported for each of them.
    lanes: int64 [m]; which of several independent left-to-right passes (lanes, ranks) fixed each
        score. Only within a lane must the targets be in order. None: one lane.
    """

    log_probs: Tensor
    positions: Tensor
    reported_nll: Tensor
    lanes: Tensor | None = None


Evaluator = Callable[[Tensor], Tensor | Scores]
"""An evaluator maps tokens int64 [n + 1] to log-probabilities float32 [n, V], or to Scores."""

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


def log_probs_of(result: Tensor | Scores) -> Tensor:
    """The distributions [n, V] of either form of an evaluator's answer.

    Raises UserError where the answer is neither form.
    """
    log_probs = result.log_probs if isinstance(result, Scores) else result
    if not isinstance(log_probs, Tensor) or log_probs.ndim != 2:
        found = (
            f"shape {tuple(log_probs.shape)}"
            if isinstance(log_probs, Tensor)
            else f"a {type(log_probs).__name__}"
        )
        raise UserError(
            f"the evaluator returned {found}: expected a float32 tensor [targets, vocabulary] of "
            "log-probabilities, or fairway.audit.interface.Scores"
        )
    return log_probs.detach()


def evaluate(evaluator: Evaluator, tokens: Tensor) -> Tensor | Scores:
    """Run the evaluator on its own copy of `tokens`, so that it cannot alter the audit's."""
    assert tokens.dtype == torch.int64 and tokens.ndim == 1
    return evaluator(tokens.clone())
