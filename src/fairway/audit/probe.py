"""Do the distributions of an evaluator that gives only losses sum to one?

The last token of a text is replaced by every token of the vocabulary in turn, and e^(−loss) is
added up. Everything before it stays, so each run scores the last target in the same state; an
evaluator that knows the token before it scores it gives more than one in all.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairway.audit.flip_plan import RECURRING_TOKENS
from fairway.audit.interface import FAIL, PASS, UNDECIDED, Check, Evaluator, evaluate
from fairway.progress import progress

SUM_TOLERANCE_NATS = 1e-3
"""As many float32 losses as a vocabulary has tokens add up to one within this."""


@dataclass(frozen=True)
class ProbedSum:
    """The sum at one target: log Σ e^(−loss), nats, and the float type's part in its error."""

    target: int
    log_sum_nats: float
    rounding_nats: float


def probe_sums(
    evaluator: Evaluator, tokens: Tensor, vocab_size: int, mark: int | None = None
) -> list[ProbedSum]:
    """Probe the last target of tokens, int64 [n + 1], and one that follows a recurring passage.

    The evaluator runs twice as often as the vocabulary has tokens. mark: the token that starts
    documents, left out where an evaluator may know where they start.
    """
    candidates = [token for token in range(vocab_size) if token != mark]
    texts = [tokens]
    if len(tokens) > 2 * RECURRING_TOKENS + 2:
        recurring = tokens.clone()
        recurring[-RECURRING_TOKENS - 2 : -1] = tokens[1 : RECURRING_TOKENS + 2]
        texts.append(recurring)
    sums = []
    with progress(len(texts) * len(candidates), "normalization", "token") as bar:
        for text in texts:
            losses = []
            for token in candidates:
                changed = text.clone()
                changed[-1] = token
                answer = evaluate(evaluator, changed)
                losses.append(float(answer.nll[-1]))
                bar.update(1)
            kind = answer.scores.reported_nll.dtype
            sums.append(_sum(len(text) - 1, np.array(losses), kind))
    return sums


def _sum(target: int, losses: np.ndarray, kind: torch.dtype) -> ProbedSum:
    log_sum = float(np.logaddexp.reduce(-losses))
    eps = torch.finfo(kind).eps if kind.is_floating_point else 0.0
    weights = np.exp(-losses - log_sum)
    return ProbedSum(target, log_sum, float((weights * np.abs(losses)).sum() * 2 * eps))


def check_probed_sums(sums: list[ProbedSum], without_mark: bool = False) -> Check:
    """PASS where the losses at the probed targets are those of one distribution each.

    without_mark: a token was left out, so that less than one is no fault.
    """

    def size(one: ProbedSum) -> float:
        error = max(one.log_sum_nats, 0.0) if without_mark else abs(one.log_sum_nats)
        return float(np.nan_to_num(error, nan=math.inf))

    worst = max(sums, key=size)
    error = worst.log_sum_nats
    shown = [one.log_sum_nats if math.isfinite(one.log_sum_nats) else None for one in sums]
    evidence = {
        "targets": [one.target for one in sums],
        "log_sums_nats": shown,
        "tolerance_nats": SUM_TOLERANCE_NATS,
        "rounding_nats": worst.rounding_nats,
    }
    places = f"{len(sums)} probed targets"
    if size(worst) <= SUM_TOLERANCE_NATS:
        sentence = (
            f"At {places} the losses of all tokens are those of one distribution: log Σ e^−loss is "
            f"{error:+.2g} nats. Other targets were not probed."
        )
        return Check("normalization", PASS, sentence, evidence)
    if size(worst) <= SUM_TOLERANCE_NATS + worst.rounding_nats:
        sentence = (
            f"At {places} log Σ e^−loss is {error:+.3g} nats, as rounding to half precision gives: "
            "give float32 losses."
        )
        return Check("normalization", UNDECIDED, sentence, evidence)
    sentence = (
        f"At {places} the losses of all tokens are not those of one distribution: log Σ e^−loss is "
        f"{error:+.3g} nats. The distribution is not normalized, or knew its own token."
    )
    return Check("normalization", FAIL, sentence, evidence)
