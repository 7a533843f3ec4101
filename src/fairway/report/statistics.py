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
RESAMPLES = 10_000
_INDICES_PER_CHUNK = 1 << 17  # resampled document indices held at once: 1 MB, a cache's size


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

    standard_error: standard deviation (ddof 1) of the resampled differences.
    p_not_below: one-sided, that the difference is not below zero: the share of resampled
    differences that are zero or more.
    p: two-sided: how often the resampled difference strays from the estimate by at least the
    estimate's own size. Both count the sample itself as one more resample, so neither falls under
    1 / (resamples + 1).
    """

    estimate: float
    standard_error: float
    ci_low: float
    ci_high: float
    p_not_below: float
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
    byte_counts: integers [documents], the documents' bytes, the same text for both.
    The statistic is a ratio of sums, Σ(nats − reference) / (ln 2 · Σ bytes). Documents are drawn
    with replacement, and both methods are evaluated on the same draw (Efron & Tibshirani,
    An Introduction to the Bootstrap, 1993). All but the estimate is NaN for fewer than two
    documents.
    """
    gap = (np.asarray(nats, np.float64) - np.asarray(reference_nats, np.float64)) / math.log(2)
    weight = np.asarray(byte_counts, dtype=np.float64)
    assert gap.shape == weight.shape and gap.ndim == 1 and weight.sum() > 0
    documents, estimate = len(gap), float(gap.sum() / weight.sum())
    if documents < 2:
        return Bootstrap(estimate, *[math.nan] * 5, documents, 0)
    draws = _resampled_ratios(gap, weight, np.random.default_rng(seed))
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Bootstrap(
        estimate=estimate,
        standard_error=float(draws.std(ddof=1)),
        ci_low=float(low),
        ci_high=float(high),
        p_not_below=_share_with_sample(draws >= 0),
        p=_share_with_sample(np.abs(draws - estimate) >= abs(estimate)),
        documents=documents,
        resamples=len(draws),
    )


def _share_with_sample(found: np.ndarray) -> float:
    """The share of true among bool [resamples] and one more, the sample itself, that is true."""
    return (1 + int(np.count_nonzero(found))) / (1 + len(found))


def _resampled_ratios(
    numerator: np.ndarray, denominator: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """float64 [≤ RESAMPLES] ratios of sums; a draw of nothing but empty documents is dropped."""
    documents, columns = len(numerator), np.column_stack([numerator, denominator])
    rows = max(1, _INDICES_PER_CHUNK // documents)
    sums = []
    for first in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - first)
        chosen = generator.integers(0, documents, size=(count, documents))
        chosen += documents * np.arange(count)[:, None]  # each resample counts in its own range
        times = np.bincount(chosen.ravel(), minlength=count * documents)
        sums.append(times.reshape(count, documents) @ columns)
    top, bottom = np.concatenate(sums).T
    return top[bottom > 0] / bottom[bottom > 0]
