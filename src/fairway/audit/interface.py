"""What the audit asks of an evaluator, and what each of its checks answers.

An *evaluator* is a function from a token stream, int64 [n + 1], to the log-probabilities it scored
with, float32 [n, V]: row i is the distribution that predicted `tokens[i + 1]`. That is all the
audit needs to know. An evaluator that returns `Scores` instead also says which targets it scored,
in which order, and what it charged for each; then coverage, order and arithmetic are checked too.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fairway.errors import UserError

PASS = "PASS"
FAIL = "FAIL"
NOT_RUN = "NOT RUN"


@dataclass(frozen=True)
class Scores:
    """An evaluator's distributions with the account of how they were used.

    log_probs: float [n, V]; row i is the distribution that predicted tokens[i + 1].
    positions: int64 [m]; the target (an index into the tokens, 1 … n) of each score that went into
        the total, in the order in which the scores were fixed.
    claimed_nll: float [m]; the nats charged for each of them.
    streams: int64 [m]; which of several independent left-to-right passes (lanes, ranks) fixed each
        score. Order is required inside a stream only. None: one stream.
    """

    log_probs: Tensor
    positions: Tensor
    claimed_nll: Tensor
    streams: Tensor | None = None


Evaluator = Callable[[Tensor], Tensor | Scores]
"""tokens int64 [n + 1] → log-probabilities float32 [n, V], or Scores."""

Predictor = Callable[[Tensor], Tensor]
"""prefix int64 [k], k ≥ 1 → log-probabilities float32 [V] of the next token, without adaptation."""


@dataclass(frozen=True)
class Check:
    """The outcome of one check: a verdict, a sentence for a reviewer, and the numbers behind it."""

    name: str
    verdict: str
    sentence: str
    evidence: dict[str, Any] = field(default_factory=dict)


def log_probs_of(result: Tensor | Scores) -> Tensor:
    """The distributions [n, V] of either form of an evaluator's answer."""
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
    """Run the evaluator on its own copy of the stream, so that it cannot alter the audit's."""
    assert tokens.dtype == torch.int64 and tokens.ndim == 1
    return evaluator(tokens.clone())


def load_callable(name: str, option: str) -> Callable:
    """Import `module:function`; UserError, naming the command-line `option`, where that fails."""
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise UserError(f"{option} is {name!r}: expected module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{option} {name!r}: {error}; run the command in the folder that holds the module, "
            "or install what it imports"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{option} {name!r}: {module_name} has no function {function_name!r}")
    return function
