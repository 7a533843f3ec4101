"""The report's statistics: seed intervals, Welch's test and a block bootstrap over documents.

Two kinds of chance move a score. Seeds: another training run gives another model; `describe` and
`welch_gain` treat the seeds as independent draws. Text: other documents would give another
score to the same model; `bootstrap_bpb_difference` resamples whole documents, because tokens of one
document are not independent of each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9_999
_ROWS_PER_DRAW = 4_000_000  # resampled document indices held at once: 32 MB of int64


@dataclass(frozen=True)
class Description:
    """A sample's mean and its 95 % Student-t interval; NaN where one value cannot tell."""

    n: int
    mean: float
    std: float
    standard_error: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class WelchTest:
    """Welch's one-sided test that a loss lies more than a margin below a baseline's.

    difference: mean loss minus the baseline's mean, in nats; negative is better.
    p: probability of a t this small if the true gain were exactly the margin.
    """

    difference: float
    t: float
    degrees_of_freedom: float
    p: float


@dataclass(frozen=True)
class Bootstrap:
    """A bootstrapped difference in bits per byte, with a 95 % percentile interval.

    p is two-sided: how often the resampled difference strays from the estimate by at least the
    estimate's own size. It cannot fall under 1 / (resamples + 1).
    """

    estimate: float
    ci_low: float
    ci_high: float
    p: float
    documents: int
    resamples: int


def describe(values: Sequence[float]) -> Description:
    """n, mean, std (ddof 1), standard error and t-interval of float `values`, at least one."""
    sample = np.asarray(values, dtype=np.float64)
    assert sample.ndim == 1 and len(sample) > 0
    n, mean = len(sample), float(sample.mean())
    if n == 1:
        return Description(1, mean, math.nan, math.nan, math.nan, math.nan)
    std = float(sample.std(ddof=1))
    standard_error = std / math.sqrt(n)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * standard_error
    return Description(n, mean, std, standard_error, mean - half, mean + half)


def welch_gain(
    losses: Sequence[float], baseline: Sequence[float], minimum_gain: float
) -> WelchTest:
    """Test that `losses` lie more than `minimum_gain` below `baseline`; all in nats per token.

    The challenge asks a record to beat the standing one by 0.005 nats at p < 0.01. The margin is
    added to `losses`, then Welch's t-test (unequal variances) asks whether they are still lower.
    t, degrees of freedom and p are NaN where a side has one value, or where neither side varies.
    """
    ours = np.asarray(losses, dtype=np.float64)
    theirs = np.asarray(baseline, dtype=np.float64)
    difference = float(ours.mean() - theirs.mean())
    untestable = min(len(ours), len(theirs)) < 2 or np.ptp(ours) == np.ptp(theirs) == 0
    if untestable:
        return WelchTest(difference, math.nan, math.nan, math.nan)
    test = stats.ttest_ind(ours + minimum_gain, theirs, equal_var=False, alternative="less")
    return WelchTest(difference, float(test.statistic), float(test.df), float(test.pvalue))


def bootstrap_bpb_difference(
    nats: np.ndarray, reference_nats: np.ndarray, byte_counts: np.ndarray, seed: int
) -> Bootstrap:
    """Paired block bootstrap over documents of bpb minus the reference's bpb.

    nats, reference_nats: float64 [documents], each document's summed loss under either method.
    byte_counts: [documents], the documents' bytes, the same text for both.
    The statistic is a ratio of sums, Σ(nats − reference) / (ln 2 · Σ bytes). Documents are drawn
    with replacement, and both methods are evaluated on the same draw (Efron & Tibshirani,
    An Introduction to the Bootstrap, 1993). Interval and p are NaN for fewer than two documents.
    """
    gap = (np.asarray(nats, np.float64) - np.asarray(reference_nats, np.float64)) / math.log(2)
    weight = np.asarray(byte_counts, dtype=np.float64)
    assert gap.shape == weight.shape and gap.ndim == 1 and weight.sum() > 0
    documents, estimate = len(gap), float(gap.sum() / weight.sum())
    if documents < 2:
        return Bootstrap(estimate, math.nan, math.nan, math.nan, documents, 0)
    draws = _resampled_ratios(gap, weight, np.random.default_rng(seed))
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    strays = int(np.count_nonzero(np.abs(draws - estimate) >= abs(estimate)))
    p = (1 + strays) / (len(draws) + 1)
    return Bootstrap(estimate, float(low), float(high), p, documents, len(draws))


def _resampled_ratios(
    numerator: np.ndarray, denominator: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """float64 [≤ RESAMPLES] ratios of sums; a draw of nothing but empty documents is dropped."""
    documents = len(numerator)
    rows = max(1, _ROWS_PER_DRAW // documents)
    ratios = []
    for first in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - first)
        chosen = generator.integers(0, documents, size=(count, documents))
        totals = denominator[chosen].sum(axis=1)
        kept = totals > 0
        ratios.append(numerator[chosen].sum(axis=1)[kept] / totals[kept])
    return np.concatenate(ratios)
