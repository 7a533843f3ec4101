"""How often tests over documents err: simulated texts, of which the true difference is known.

    python benchmarks/calibration.py                      # every method at 12 documents
    python benchmarks/calibration.py --documents 5 8 12 30 200 --methods "document test"

Prints for each kind of text and method how many of 100 trials reject the truth at 1 %, and how many
95 % intervals hold it. A method that keeps its word rejects 1 and holds 95.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from fairway.report.statistics import document_test

RESAMPLES = 2000


class Lengths(NamedTuple):
    """Documents' bytes: how they are drawn, their mean and the mean of their square roots."""

    draw: Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
    mean: float
    mean_root: float


LENGTHS = {
    "equal": Lengths(lambda generator, shape: np.full(shape, 4000.0), 4000, math.sqrt(4000)),
    # As long and as uneven as Wikipedia's articles and web pages.
    "log-normal": Lengths(
        lambda generator, shape: np.exp(generator.normal(8.5, 1.1, shape)),
        math.exp(8.5 + 1.1**2 / 2),
        math.exp(8.5 / 2 + 1.1**2 / 8),
    ),
    # So uneven that their variance is infinite.
    "Pareto": Lengths(
        lambda generator, shape: 500 * (1 + generator.pareto(1.3, shape)),
        500 * 1.3 / 0.3,
        math.sqrt(500) * 1.3 / 0.8,
    ),
}
DIFFERENCES = {
    "normal": lambda generator, shape: generator.normal(0, 0.05, shape),
    "heavy-tailed (t of 3)": lambda generator, shape: 0.05 * generator.standard_t(3, shape),
    "skewed (exponential)": lambda generator, shape: 0.05 * (generator.exponential(1, shape) - 1),
    "very skewed (log-normal)": lambda generator, shape: (
        0.05 * (np.exp(generator.normal(0, 1, shape)) - math.exp(0.5))
    ),
}
"""Bits per byte of a document, of mean zero whatever its length."""
NOISIER_IF_SHORT = "noisier if short"
GROWING = "a gain that grows with length"
KINDS = tuple(
    (lengths, difference)
    for lengths in LENGTHS
    for difference in (*DIFFERENCES, NOISIER_IF_SHORT, GROWING)
    if lengths != "equal" or difference in DIFFERENCES
)


def draw_texts(
    kind: tuple[str, str], trials: int, documents: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Texts of one of KINDS: gaps in bits, minus the true bits per byte times the bytes, and bytes.

    Both are float64 [trials, documents]; of such gaps the true difference is zero.
    """
    lengths, shape = LENGTHS[kind[0]], (trials, documents)
    byte_counts = lengths.draw(generator, shape)
    if kind[1] in DIFFERENCES:
        return byte_counts * DIFFERENCES[kind[1]](generator, shape), byte_counts
    noise = 0.05 * np.sqrt(4000 / byte_counts) * generator.normal(0, 1, shape)
    if kind[1] == NOISIER_IF_SHORT:
        return byte_counts * noise, byte_counts
    # As in the quickstart: 0.15 bits per byte at 1,500 bytes, 0.35 at 35,000.
    gain = 0.4 * (1 - np.sqrt(600 / byte_counts))
    truth = 0.4 * (1 - math.sqrt(600) * lengths.mean_root / lengths.mean)
    return byte_counts * (truth - gain + noise), byte_counts


class Answer(NamedTuple):
    """bool [trials]: is zero rejected at 1 %, and does the 95 % interval hold it?"""

    rejected: np.ndarray
    held: np.ndarray


def of_p_values(p: np.ndarray) -> Answer:
    """p: two-sided, of zero; the interval holds what is not rejected at 5 %."""
    return Answer(p < 0.01, p >= 0.05)


def of_draws(draws: np.ndarray, levels: Callable[[float], np.ndarray]) -> Answer:
    """draws: [trials, resamples]. levels: the quantile to take in place of one, [trials]."""
    draws = np.sort(draws, axis=1)

    def holds_zero(miss: float) -> np.ndarray:
        ends = [
            np.take_along_axis(draws, np.int64(levels(one) * (draws.shape[1] - 1))[:, None], 1)
            for one in (miss / 2, 1 - miss / 2)
        ]
        return (ends[0] <= 0)[:, 0] & (ends[1] >= 0)[:, 0]

    return Answer(~holds_zero(0.01), holds_zero(0.05))


def of_tails(draws: np.ndarray, value: np.ndarray) -> Answer:
    """Twice the smaller share of `draws` [trials, resamples] beyond `value` [trials]."""
    below, above = (np.mean(side, axis=1) for side in (draws <= value, draws >= value))
    return of_p_values(2 * (RESAMPLES * np.minimum(below, above) + 1) / (RESAMPLES + 1))


def ratio(gaps: np.ndarray, byte_counts: np.ndarray) -> np.ndarray:
    return gaps.sum(1, keepdims=True) / byte_counts.sum(1, keepdims=True)


def moves(gaps: np.ndarray, byte_counts: np.ndarray) -> np.ndarray:
    """What each document moves the ratio by, to first order."""
    return (gaps - ratio(gaps, byte_counts) * byte_counts) / byte_counts.sum(1, keepdims=True)


def draws_with_replacement(documents: int) -> np.ndarray:
    """How often each document is drawn, float64 [documents, resamples]; the same for every text."""
    generator = np.random.default_rng(0)
    times = generator.multinomial(documents, np.full(documents, 1 / documents), RESAMPLES)
    return times.T.astype(np.float64)


def percentile_bootstrap(gaps: np.ndarray, byte_counts: np.ndarray) -> Answer:
    """What Fairway had before: the bootstrap's percentiles, and tails about the estimate."""
    times = draws_with_replacement(gaps.shape[1])
    draws, estimate = (gaps @ times) / (byte_counts @ times), ratio(gaps, byte_counts)
    tail = np.mean(np.abs(draws - estimate) >= np.abs(estimate), axis=1)
    held = of_draws(draws, lambda level: np.full(len(gaps), level)).held
    return Answer((RESAMPLES * tail + 1) / (RESAMPLES + 1) < 0.01, held)


def bca_bootstrap(gaps: np.ndarray, byte_counts: np.ndarray) -> Answer:
    """Bias-corrected and accelerated."""
    times = draws_with_replacement(gaps.shape[1])
    draws = (gaps @ times) / (byte_counts @ times)
    bias = special.ndtri(np.clip(np.mean(draws < ratio(gaps, byte_counts), 1), 1e-4, 1 - 1e-4))
    left_out = (gaps.sum(1, keepdims=True) - gaps) / (
        byte_counts.sum(1, keepdims=True) - byte_counts
    )
    centred = left_out.mean(1, keepdims=True) - left_out
    acceleration = (centred**3).sum(1) / 6 / (centred**2).sum(1) ** 1.5

    def levels(level: float) -> np.ndarray:
        shifted = bias + special.ndtri(level)
        return special.ndtr(bias + shifted / (1 - acceleration * shifted))

    return of_draws(draws, levels)


def bootstrap_t(gaps: np.ndarray, byte_counts: np.ndarray) -> Answer:
    """Each resample studentised with its own standard error."""
    times, estimate = draws_with_replacement(gaps.shape[1]), ratio(gaps, byte_counts)
    bottom = byte_counts @ times
    draws = (gaps @ times) / bottom
    squares = (gaps**2) @ times - 2 * draws * ((gaps * byte_counts) @ times)
    errors = np.sqrt(np.maximum(0, squares + draws**2 * ((byte_counts**2) @ times))) / bottom
    with np.errstate(divide="ignore", invalid="ignore"):
        studentised = np.nan_to_num((draws - estimate) / errors)
    error = np.sqrt((moves(gaps, byte_counts) ** 2).sum(1, keepdims=True))
    return of_tails(studentised, estimate / error)


def sign_flips(gaps: np.ndarray, byte_counts: np.ndarray) -> Answer:
    """Each document's gap as it is or with its sign changed: all ways, or as many as resamples."""
    documents = gaps.shape[1]
    if 2**documents <= 2 * RESAMPLES + 96:
        signs = 1 - 2.0 * (np.arange(2**documents) >> np.arange(documents)[:, None] & 1)
        totals = np.abs(gaps @ signs)
        rounding = 1e-9 * np.abs(gaps).sum(1, keepdims=True)
        return of_p_values(np.mean(totals >= totals[:, :1] - rounding, axis=1))
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (documents, RESAMPLES))
    as_far = np.abs(gaps @ signs) >= np.abs(gaps.sum(1, keepdims=True))
    return of_p_values((as_far.sum(1) + 1) / (RESAMPLES + 1))


def plain_t(gaps: np.ndarray, byte_counts: np.ndarray) -> Answer:
    """The ratio's linearized standard error and n − 1 degrees of freedom."""
    freedom = gaps.shape[1] - 1
    error = np.sqrt((moves(gaps, byte_counts) ** 2).sum(1) * (freedom + 1) / freedom)
    t = np.abs(ratio(gaps, byte_counts)[:, 0]) / error
    return of_p_values(2 * special.stdtr(freedom, -t))


def kept(gaps: np.ndarray, byte_counts: np.ndarray) -> Answer:
    """The report's."""
    nothing = np.zeros(gaps.shape[1])
    found = [
        document_test(gap, nothing, bytes_) for gap, bytes_ in zip(gaps, byte_counts, strict=True)
    ]
    return Answer(
        np.array([one.p < 0.01 for one in found]),
        np.array([one.ci_low <= 0 <= one.ci_high for one in found]),
    )


METHODS = {
    "percentile bootstrap": percentile_bootstrap,
    "BCa": bca_bootstrap,
    "bootstrap-t": bootstrap_t,
    "sign flips": sign_flips,
    "t, n − 1": plain_t,
    "document test": kept,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[12])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print("| documents | lengths | differences |", " | ".join(options.methods), "|", flush=True)
    print("|---" * (3 + len(options.methods)) + "|")
    for documents in options.documents:
        for kind in KINDS:
            generator = np.random.default_rng(options.seed)
            texts = draw_texts(kind, options.trials, documents, generator)
            answers = [METHODS[name](*texts) for name in options.methods]
            shares = [f"{100 * np.mean(a):.1f} / {100 * np.mean(b):.1f}" for a, b in answers]
            print("|", " | ".join([str(documents), *kind, *shares]), "|", flush=True)


if __name__ == "__main__":
    main()
