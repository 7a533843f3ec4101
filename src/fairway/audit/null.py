"""The null test: can the evaluator predict text that nobody can predict better than its source?

Text is drawn token by token from the model's own softmax p. Whatever an evaluator q learned from
earlier tokens, E[q(x) / p(x)] = 1 for the next one. So from any starting point on, the running
product of these ratios is a test martingale: an honest q ever drives it above 1/α with probability
at most α, whatever the model, the dependence between tokens or the length of the text (Ville's
inequality, 1939; G. Shafer et al., "Test martingales, Bayes factors and p-values", Statistical
Science 26, 2011). Half of α is for the start of the text, the other half for all n starting points
alike: a gain above log(2/α) nats from the start on, or above log(2n/α) on any stretch, is a leak,
also where losses elsewhere hide it in the mean.

Positions known beforehand may be left out (ratio 1), such as the starts of documents that were
drawn side by side and then joined. An evaluator whose windows see the document before, which p did
not see, loses by it: this causes no false alarm, but the estimated size of a leak is then a little
too small. Only the confidence interval uses a normal approximation, over blocks of tokens.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.special import stdtrit  # scipy.stats takes a second to load
from torch import Tensor

from fairway.audit.interface import (
    FAIL,
    NOT_RUN,
    PASS,
    UNBOUNDED_NATS,
    Check,
    Evaluator,
    Predictor,
    evaluate,
)
from fairway.progress import progress

BLOCK_TOKENS = 64
"""The confidence interval uses blocks of this length: adaptations correlate on this scale."""

POWER_Z = 2.33
"""A standard normal variable stays below this with probability 99 %."""

CONFIDENCE = 0.95
"""This is the confidence of the interval of the mean gain; the verdict does not use it."""

NullSampler = Callable[[int, int], tuple[Tensor, np.ndarray]]
"""A sampler maps (targets, seed) to text drawn from the model, int64 [n + 1], and float64 [n]: the
log-probability, nats, of each target under the very distribution it was drawn from, NaN for a
target that was not drawn, such as a document's start. n is about the number of targets asked for.
"""


def draw_stream(
    next_token: Predictor, first_token: Tensor, num_targets: int, seed: int
) -> tuple[Tensor, np.ndarray]:
    """Draw text from a model, one token at a time; with two arguments bound, a `NullSampler`.

    next_token: prefix int64 [k] → log-probabilities [V] of token k. first_token: int64 [1], on the
    device that the model expects.
    Returns the tokens, int64 [num_targets + 1], and float64 [num_targets]: the log-probability,
    nats, of each target under the very distribution it was drawn from.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = first_token.new_empty(num_targets + 1)
    tokens[0] = first_token[0]
    log_probs = np.empty(num_targets)
    with progress(num_targets, "null text", "token") as bar:
        for index in range(num_targets):
            answer = next_token(tokens[: index + 1].clone()).detach().double().cpu()
            distribution = torch.log_softmax(answer, dim=-1)
            drawn = int(torch.multinomial(distribution.exp(), 1, generator=generator))
            tokens[index + 1] = drawn
            log_probs[index] = float(distribution[drawn])
            bar.update(1)
    return tokens, log_probs


def null_gains(evaluator: Evaluator, tokens: Tensor, drawn_log_probs: np.ndarray) -> np.ndarray:
    """log q(x_t) - log p(x_t), nats, float64 [n]: the evaluator's gain over the true source.

    It is 0 for a target that was not drawn. tokens, drawn_log_probs: from a `NullSampler`.
    """
    answer = evaluate(evaluator, tokens)
    scored = -answer.nll.numpy()
    left_out = np.isnan(drawn_log_probs)
    if not answer.has_distributions:  # a target without a score is a fault of coverage
        left_out |= np.isnan(scored)
    return np.where(left_out, 0.0, scored - drawn_log_probs)


def detectable_gain(num_targets: int, limit_nats: float) -> float:
    """Smallest mean gain, nats a token, that the test shows in 99 of 100 texts of n targets.

    A gain of g nats a token from knowing something of the target varies by about √(2g) from token
    to token (a log-likelihood ratio's variance is twice its mean, where it is small), so its sum
    exceeds the limit L with that probability where n·g − 2.33·√(2·g·n) ≥ L.
    """
    root = (POWER_Z * math.sqrt(2) + math.sqrt(2 * POWER_Z**2 + 4 * limit_nats)) / 2
    return root**2 / num_targets


def block_interval(gains: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Mean of `gains` [n] and a t-interval from the means of blocks of consecutive tokens.

    With fewer than two blocks the interval is unbounded.
    """
    blocks = max(1, len(gains) // BLOCK_TOKENS)
    means = np.array([block.mean() for block in np.array_split(gains, blocks)])
    mean = float(gains.mean())
    if blocks < 2:
        return mean, -math.inf, math.inf
    standard_error = means.std(ddof=1) / math.sqrt(blocks)
    half = stdtrit(blocks - 1, (1 + confidence) / 2) * standard_error
    return mean, mean - float(half), mean + float(half)


@dataclass(frozen=True)
class MaxGain:
    """A gain, nats, over consecutive tokens [start, stop), and the limit that chance sets to it."""

    nats: float
    limit_nats: float
    start: int
    stop: int


def largest_gains(gains: np.ndarray, significance: float) -> tuple[MaxGain, MaxGain]:
    """The largest gain from the start of the text on, and the largest on any stretch.

    gains: float64 [n], nats. significance: α of both together.
    """
    running = np.concatenate([[0.0], np.cumsum(np.clip(gains, -UNBOUNDED_NATS, UNBOUNDED_NATS))])
    stop = int(running[1:].argmax()) + 1
    first = MaxGain(float(running[stop]), math.log(2 / significance), 0, stop)
    rises = running[1:] - np.minimum.accumulate(running)[:-1]
    stop = int(rises.argmax()) + 1
    start = int(running[:stop].argmin())
    limit = math.log(2 * len(gains) / significance)
    return first, MaxGain(float(rises[stop - 1]), limit, start, stop)


def check_null(
    gains: np.ndarray | None, significance: float, reported_gain_nats: float | None
) -> Check:
    """PASS where the gain on the model's own text stays within what chance allows.

    gains: float64 [n] of `null_gains`; None where no model was given to draw from.
    reported_gain_nats: adaptation's gain on real text, nats a token; the evidence gives a leak that
        raises the mean as a share of it too.
    """
    if gains is None:
        reason = (
            "No text was drawn from the model: give the distribution of the next token without "
            "adaptation, and null_tokens above 0."
        )
        return Check("null", NOT_RUN, reason)
    largest = largest_gains(gains, significance)
    leaks = [gain for gain in largest if not gain.nats <= gain.limit_nats]  # also catches NaN
    detectable = detectable_gain(len(gains), largest[0].limit_nats)
    mean, low, high = block_interval(gains, CONFIDENCE)
    bounded = math.isfinite(low) and math.isfinite(mean)
    evidence = {
        "tokens": len(gains),
        "largest_gains": [asdict(gain) for gain in largest if math.isfinite(gain.nats)],
        "significance": significance,
        "gain_nats_per_token": mean if math.isfinite(mean) else None,
        "confidence": CONFIDENCE,
        "interval_nats_per_token": [low, high] if bounded else None,
        "detectable_gain_nats_per_token": detectable,
        "reported_gain_nats_per_token": reported_gain_nats,
        "leaked_share_of_reported_gain": None,
    }
    spread = f" (95 % interval {low:+.4f} to {high:+.4f})" if bounded else ""
    overall = f"{mean:+.4f} nats a token over all{spread}"
    text = f"{len(gains):,} tokens drawn from the model itself"
    if not leaks:
        sentence = (
            f"On {text} the evaluator gains no more than chance allows: {overall}. A leak worth "
            f"{detectable:.4f} nats a token would have failed with 99 % probability."
        )
        return Check("null", PASS, sentence, evidence)
    worst = leaks[0]
    sentence = (
        f"On {text}, where an honest evaluator gains nothing, the evaluator gains {worst.nats:.1f} "
        f"nats within {worst.stop - worst.start:,} tokens (chance allows {worst.limit_nats:.1f}); "
        f"{overall}."
    )
    if reported_gain_nats is not None and reported_gain_nats > 0 and mean > 0:
        share = mean / reported_gain_nats
        evidence["leaked_share_of_reported_gain"] = share
        sentence += f" That is {share:.0%} of the gain reported on real text."
    return Check("null", FAIL, sentence, evidence)
