"""The report's statistics: seed intervals, tests over seeds and a test over documents.

Two kinds of chance move a score. Seeds: another training run gives another model; `describe`,
`welch_test` and `paired_test` treat the seeds as independent draws. Text: other documents would
give another score to the same model; `document_test` treats whole documents as independent draws,
because tokens of one document are not. The distributions are SciPy's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

CONFIDENCE = 0.95
LEAST_TAIL = 1e-4
"""The least one-sided p over documents; farther out a t-distribution is a guess."""


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
class SeedTest:
    """A t-test over seeds. difference: the mean minus the reference's mean; negative is better."""

    difference: float
    t: float
    degrees_of_freedom: float
    p: float


@dataclass(frozen=True)
class DocumentTest:
    """A difference in bits per byte, tested over documents; NaN where fewer than two have bytes."""

    estimate: float
    standard_error: float
    ci_low: float
    ci_high: float
    """Ends of the 95 % interval; the one on the side of the documents' longer tail lies farther."""
    p_not_below: float
    """One-sided, that the difference is zero or more; `least_p(documents)` at least."""
    p: float
    """Two-sided, that it is zero: twice the smaller tail."""
    documents: int
    """Those with bytes."""
    degrees_of_freedom: float
    """documents − 1 where all are equally long, less where few hold most of the bytes."""


def describe(values: Sequence[float]) -> Description:
    """n, mean, std (ddof 1), standard error and t-interval of float `values`, at least one."""
    sample = np.asarray(values, dtype=np.float64)
    assert sample.ndim == 1 and len(sample) > 0
    n, mean = len(sample), float(sample.mean())
    if n == 1:
        return Description(1, mean, math.nan, math.nan, math.nan, math.nan)
    std = float(sample.std(ddof=1))
    error = std / math.sqrt(n)
    reach = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    return Description(n, mean, std, error, mean - reach, mean + reach)


def welch_test(
    values: Sequence[float],
    reference: Sequence[float],
    margin: float = 0.0,
    alternative: Literal["two-sided", "less"] = "two-sided",
) -> SeedTest:
    """Welch's t-test (unequal variances) that `values` differ from, or lie below, `reference`.

    margin: `values` have to lie that much below; it is added to them before the test. The challenge
    asks a submission to beat the best one by 0.005 nats per token at p < 0.01. t, degrees of
    freedom and p are NaN where a side has one value, or where neither side varies.
    """
    ours, theirs = (np.asarray(one, dtype=np.float64) for one in (values, reference))
    difference = float(ours.mean() - theirs.mean())
    if min(len(ours), len(theirs)) < 2 or np.ptp(ours) == np.ptp(theirs) == 0:
        return SeedTest(difference, math.nan, math.nan, math.nan)
    test = stats.ttest_ind(ours + margin, theirs, equal_var=False, alternative=alternative)
    return SeedTest(difference, float(test.statistic), float(test.df), float(test.pvalue))


def paired_test(values: Sequence[float], reference: Sequence[float]) -> SeedTest:
    """Student's two-sided t-test of the differences seed by seed; both in the order of the seeds.

    What a seed does to both sides alike, such as a training run that they share, cancels. t,
    degrees of freedom and p are NaN for one seed, or where the differences do not vary.
    """
    ours, theirs = (np.asarray(one, dtype=np.float64) for one in (values, reference))
    difference = float((ours - theirs).mean())
    if len(ours) < 2 or np.ptp(ours - theirs) == 0:
        return SeedTest(difference, math.nan, math.nan, math.nan)
    test = stats.ttest_rel(ours, theirs)
    return SeedTest(difference, float(test.statistic), float(test.df), float(test.pvalue))


def document_test(
    nats: np.ndarray, reference_nats: np.ndarray, byte_counts: np.ndarray
) -> DocumentTest:
    """Student's t over documents for bpb minus the reference's bpb, paired by document.

    nats, reference_nats: float64 [documents], each document's summed loss under either method.
    byte_counts: integers [documents], the documents' bytes, the same text for both.

    The difference is a ratio of sums, Σ(nats − reference) / (ln 2 · Σ bytes). Its standard error is
    the jackknife's, from how far each document moves it. The degrees of freedom are Satterthwaite's
    for documents of unequal length, (Σ share²)² / Σ share⁴ of the bytes. On the side where skewed
    documents make the tail longer, the critical value grows (`_critical`); the other side's stays.
    benchmarks/calibration.py simulates how often the test errs, beside other methods; docs/log.md
    has its table.
    """
    gap = (np.asarray(nats, np.float64) - np.asarray(reference_nats, np.float64)) / math.log(2)
    weight = np.asarray(byte_counts, dtype=np.float64)
    assert gap.shape == weight.shape and gap.ndim == 1 and weight.sum() > 0
    documents, total = int(np.count_nonzero(weight)), float(weight.sum())
    estimate = float(gap.sum()) / total
    if documents < 2:
        return DocumentTest(estimate, *[math.nan] * 5, documents, math.nan)
    # The estimate minus the one without the document.
    moves = (gap - estimate * weight) / (total - weight)
    length = float(np.linalg.norm(moves))
    skewness = float(((moves / length) ** 3).sum()) if length > 0 else 0.0
    error = length * math.sqrt(1 - 1 / documents)
    squares = (weight / total) ** 2
    degrees = min(documents - 1.0, float(squares.sum() ** 2 / (squares**2).sum()))
    z = float(special.ndtri((1 + CONFIDENCE) / 2))
    # Where documents are skewed to the right, the estimate lies far below the truth too often.
    tail = _tail(abs(estimate), error, degrees, skewness if estimate < 0 else -skewness, documents)
    return DocumentTest(
        estimate=estimate,
        standard_error=error,
        ci_low=estimate - error * _critical(z, degrees, -skewness),
        ci_high=estimate + error * _critical(z, degrees, skewness),
        p_not_below=tail if estimate < 0 else 1 - tail,
        p=2 * tail,
        documents=documents,
        degrees_of_freedom=degrees,
    )


def least_p(documents: int) -> float:
    """The least one-sided p-value of so many documents.

    If neither method were better, all documents would favour the same one as often as so many coins
    all show heads. LEAST_TAIL is the least of any number.
    """
    return max(0.5**documents, LEAST_TAIL)


def _critical(z: float, degrees: float, skewness: float) -> float:
    """Student's t with the tail of the normal deviate z; farther out where the tail is longer.

    skewness: that of the mean, the sample's over √n. It adds the first term of the expansion of
    Cornish and Fisher (Johnson, Modified t tests and confidence intervals for asymmetrical
    populations, 1978), doubled, because few documents show about half of the skewness they have.
    """
    symmetric = float(special.stdtrit(degrees, special.ndtr(z)))
    return symmetric + 2 * max(0.0, skewness) * (2 * z * z + 1) / 6


def _tail(distance: float, error: float, degrees: float, skewness: float, documents: int) -> float:
    """The one-sided p, `least_p` to 0.5, of an estimate that lies `distance` from zero."""

    def excess(z: float) -> float:
        return error * _critical(z, degrees, skewness) - distance

    farthest = -float(special.ndtri(least_p(documents)))
    if excess(0.0) >= 0:
        return 0.5
    if excess(farthest) <= 0:
        return least_p(documents)
    return float(special.ndtr(-optimize.brentq(excess, 0.0, farthest)))
