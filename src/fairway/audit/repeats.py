"""Repeated calls on one text: noise of the backend, or an evaluator that remembers?

An evaluator that learned from an earlier call scores the same text better, target by target; noise
has no direction. The mean difference of two calls over its standard error, t, tells them apart: it
was 49 and 300 for evaluators with a memory, at most 1.2 for noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fairway.audit.flip import largest_changes
from fairway.audit.interface import (
    FAIL,
    PASS,
    UNDECIDED,
    Answer,
    Check,
    Evaluator,
    evaluate,
)

STATE_T = 6.0
"""A mean difference so many standard errors from zero, in each later call, is a memory."""

FURTHER_CALLS = 4
"""Calls beyond the planned ones where two differ: noise may repeat a direction once, not so often.
"""


@dataclass(frozen=True)
class Repeats:
    """Several calls on the same text.

    answers: at least the first two. noise_nats: the largest change between two calls. t_values: of
    the nats that each later call saved against the first.
    """

    answers: Sequence[Answer]
    noise_nats: float
    t_values: Sequence[float]
    saved_nats_per_token: float

    @property
    def remembers(self) -> bool:
        """Whether all later calls differ from the first in the same direction."""
        return all(t > STATE_T for t in self.t_values) or all(t < -STATE_T for t in self.t_values)


def repeat_calls(evaluator: Evaluator, tokens: Tensor, reference: Answer, repeats: int) -> Repeats:
    """Call the evaluator `repeats` ≥ 1 times more, and four times beyond that where calls differ.

    reference: its first answer to tokens, int64 [n + 1].
    """
    answers, noise, t_values, saved = [reference], 0.0, [], 0.0
    planned = repeats
    while len(t_values) < planned:
        again = evaluate(evaluator, tokens)
        change = _noise(reference, again)
        noise = max(noise, change)
        if change > 0 and planned == repeats:
            planned = repeats + FURTHER_CALLS
        mean, t = _saved(reference.nll, again.nll)
        t_values.append(t)
        saved = mean
        if len(answers) < 2:
            answers.append(again)
    return Repeats(answers, noise, t_values, saved)


def _noise(first: Answer, second: Answer) -> float:
    if first.rows.shape != second.rows.shape:
        return math.inf
    return float(largest_changes(first.rows, second.rows).max())


def _saved(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Mean nats a token that the second call saved, and its t; 0 where both are the same."""
    if first.shape != second.shape:
        return 0.0, 0.0
    difference = (first - second)[(first - second).isfinite()]
    if len(difference) < 2 or not difference.any():
        return 0.0, 0.0
    mean, deviation = float(difference.mean()), float(difference.std())
    if deviation == 0:
        return mean, math.copysign(math.inf, mean)
    return mean, mean / deviation * math.sqrt(len(difference))


def check_state(repeats: Repeats, limit_nats: float) -> Check:
    """PASS where a repeated call finds what the first left behind nowhere in its scores.

    evidence: calls, noise_nats, t (the smallest in size), saved_nats_per_token.
    """
    smallest = min((abs(t) for t in repeats.t_values), default=0.0)
    evidence = {
        "calls": 1 + len(repeats.t_values),
        "noise_nats": repeats.noise_nats if math.isfinite(repeats.noise_nats) else None,
        "t": smallest if math.isfinite(smallest) else None,
        "saved_nats_per_token": repeats.saved_nats_per_token,
    }
    if repeats.remembers:
        better = "better" if repeats.saved_nats_per_token > 0 else "worse"
        sentence = (
            f"A later call on the same text scores it {abs(repeats.saved_nats_per_token):.3g} nats "
            f"a token {better} than the first: the evaluator keeps state between calls. Start each "
            "evaluation afresh."
        )
        return Check("state", FAIL, sentence, evidence)
    if not math.isfinite(repeats.noise_nats):
        sentence = "Two calls on the same text return different numbers of distributions."
        return Check("state", FAIL, sentence, evidence)
    if repeats.noise_nats == 0:
        return Check("state", PASS, "A repeated call gives the same scores bit for bit.", evidence)
    size = f"by up to {repeats.noise_nats:.3g} nats"
    if abs(repeats.saved_nats_per_token) > limit_nats and smallest > STATE_T:
        sentence = f"Repeated calls differ {size}, and not as noise does: their means differ too."
        return Check("state", UNDECIDED, sentence, evidence)
    sentence = f"Repeated calls differ {size}, without a direction: noise, no state."
    return Check("state", PASS, sentence, evidence)
