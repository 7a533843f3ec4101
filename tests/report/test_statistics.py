"""Statistics of seeds and documents, against formulas, published figures and simulated truth."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fairway.report.statistics import (
    describe,
    document_test,
    least_p,
    paired_test,
    welch_test,
)
from tiny import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import calibration

# val_bpb of the reference submission (PR #1350), seeds 1337, 42 and 2025, as published.
REFERENCE_SLOT_BPB = (1.00430, 1.00478, 1.00470)


def welch_gain(losses, baseline, margin):
    """The test against a baseline: one-sided, with a margin."""
    return welch_test(losses, baseline, margin, alternative="less")


def test_the_references_seeds_give_its_published_mean_and_std():
    found = describe(REFERENCE_SLOT_BPB)
    assert (round(found.mean, 4), round(found.std, 4), found.n) == (1.0046, 0.0003, 3)


# The 97.5 % points of Student's t, from a printed table, for n − 1 degrees of freedom.
@pytest.mark.parametrize(("size", "point"), [(2, 12.7062), (3, 4.3027), (10, 2.2622)])
def test_describe_agrees_with_its_formula(size, point):
    values = np.random.default_rng(size).normal(1.1, 0.01, size)
    found = describe(values)
    deviations = values - values.sum() / size
    error = math.sqrt((deviations**2).sum() / (size - 1) / size)
    assert found.standard_error == pytest.approx(error)
    assert found.std == pytest.approx(error * math.sqrt(size))
    half = (found.ci_high - found.ci_low) / 2
    assert half == pytest.approx(point * error, abs=5e-5 * error)
    assert (found.ci_low + found.ci_high) / 2 == pytest.approx(found.mean)


@pytest.mark.filterwarnings("error")
def test_values_that_are_all_the_same_have_an_interval_of_no_width():
    found = describe([1.25, 1.25, 1.25])
    assert (found.std, found.standard_error) == (0, 0)
    assert (found.ci_low, found.ci_high) == (1.25, 1.25)


def test_one_seed_has_a_mean_and_no_spread():
    found = describe([1.25])
    assert (found.n, found.mean) == (1, 1.25)
    spread = (found.std, found.standard_error, found.ci_low, found.ci_high)
    assert all(math.isnan(value) for value in spread)


def test_welch_agrees_with_its_formula():
    ours, theirs, margin = np.array([1.840, 1.842, 1.841]), np.array([1.853, 1.851, 1.855]), 0.005
    found = welch_gain(ours, theirs, margin)
    variances = np.array([ours.var(ddof=1), theirs.var(ddof=1)]) / 3
    t = (ours.mean() + margin - theirs.mean()) / math.sqrt(variances.sum())
    degrees = variances.sum() ** 2 / (variances**2 / 2).sum()
    assert found.t == pytest.approx(t)
    assert found.degrees_of_freedom == pytest.approx(degrees)
    assert found.p == pytest.approx(stats.t.cdf(t, degrees))
    assert found.difference == pytest.approx(-0.012)


def test_a_gain_of_exactly_the_margin_is_a_coin_toss():
    theirs = [1.853, 1.851, 1.855]
    assert welch_gain([loss - 0.005 for loss in theirs], theirs, 0.005).p == pytest.approx(0.5)


def test_a_loss_is_never_a_significant_gain():
    assert welch_gain([1.90, 1.91, 1.92], [1.853, 1.851, 1.855], 0.005).p > 0.99


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [([1.84], [1.85, 1.86]), ([1.84, 1.85], [1.86]), ([1.84, 1.84], [1.86, 1.86])],
)
def test_welch_is_null_where_nothing_varies_or_one_value_stands_alone(ours, theirs):
    found = welch_gain(ours, theirs, 0.005)
    assert math.isnan(found.p) and math.isnan(found.t)
    assert found.difference == pytest.approx(np.mean(ours) - np.mean(theirs))


def test_welch_between_variants_has_two_sides():
    ours, theirs = np.array([1.840, 1.842, 1.841]), np.array([1.853, 1.851, 1.855, 1.852])
    found, back = welch_test(ours, theirs), welch_test(theirs, ours)
    assert (found.t, found.difference) == pytest.approx((-back.t, -back.difference))
    variances = np.array([ours.var(ddof=1) / 3, theirs.var(ddof=1) / 4])
    t = (ours.mean() - theirs.mean()) / math.sqrt(variances.sum())
    degrees = variances.sum() ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 3)
    assert found.degrees_of_freedom == pytest.approx(degrees)
    assert found.p == back.p == pytest.approx(2 * stats.t.cdf(t, degrees))


def test_welch_of_nothing_but_chance_is_calibrated():
    samples = np.random.default_rng(11).normal(2.5, 0.01, (2000, 2, 3)) * [[[1.0], [1.02]]]
    samples[:, 1] -= samples[:, 1].mean() - samples[:, 0].mean()
    rejected = np.mean([welch_test(*pair).p < 0.05 for pair in samples])
    assert 0.02 <= rejected <= 0.065  # Welch's is on the safe side for three seeds


def test_the_paired_test_agrees_with_its_formula():
    ours, theirs = np.array([1.840, 1.852, 1.861]), np.array([1.843, 1.854, 1.865])
    found = paired_test(ours, theirs)
    gaps = ours - theirs
    t = gaps.mean() / (gaps.std(ddof=1) / math.sqrt(3))
    assert (found.t, found.degrees_of_freedom) == pytest.approx((t, 2))
    assert found.p == pytest.approx(2 * stats.t.cdf(t, 2))
    assert found.difference == pytest.approx(-0.003)
    assert found.p < 0.1 * welch_test(ours, theirs).p  # what the seeds share cancels


@pytest.mark.parametrize(
    ("ours", "theirs"), [([1.84], [1.85]), ([1.5, 1.5], [2.0, 2.0]), ([1.5, 2.5], [2.0, 3.0])]
)
def test_the_paired_test_is_null_where_the_differences_do_not_vary(ours, theirs):
    found = paired_test(ours, theirs)
    assert math.isnan(found.p) and math.isnan(found.t) and math.isnan(found.degrees_of_freedom)
    assert found.difference == pytest.approx(np.mean(ours) - np.mean(theirs))


def make_documents(generator, documents, gain_nats):
    """Summed nats of two methods on documents of uneven length, and the documents' bytes."""
    tokens = generator.integers(20, 400, documents)
    before = tokens * generator.normal(2.0, 0.3, documents)
    after = before - tokens * generator.normal(gain_nats, 0.02, documents)
    return after, before, tokens * 3


def test_the_estimate_over_documents_is_the_difference_of_bpb():
    after, before, byte_counts = make_documents(np.random.default_rng(0), 50, 0.01)
    found = document_test(after, before, byte_counts)
    bpb = [nats.sum() / math.log(2) / byte_counts.sum() for nats in (after, before)]
    assert found.estimate == pytest.approx(bpb[0] - bpb[1])
    assert found.ci_low < found.estimate < found.ci_high
    assert (found.documents, found.p) == (50, 2 * found.p_not_below)


def test_the_standard_error_is_the_jackknifes():
    after, before, byte_counts = make_documents(np.random.default_rng(3), 8, 0.004)
    found = document_test(after, before, byte_counts)
    without = [
        document_test(*(np.delete(values, one) for values in (after, before, byte_counts))).estimate
        for one in range(8)
    ]
    squares = (np.array(without) - found.estimate) ** 2
    assert found.standard_error == pytest.approx(math.sqrt(7 / 8 * squares.sum()))


def test_documents_of_equal_length_and_without_skew_give_students_t():
    gains = np.array([1.0, 2.0, 3.0, 4.0, 5.0, -6.0, -7.0, -8.0, -9.0, -10.0]) + 12
    gains = np.concatenate([gains, 24 - gains])  # as many above 12 as below
    found = document_test(1000 - gains, np.full(20, 1000.0), np.full(20, 4000))
    bpb = -gains / math.log(2) / 4000
    expected = stats.ttest_1samp(bpb, 0.0)
    interval = expected.confidence_interval()
    assert found.degrees_of_freedom == pytest.approx(19)
    assert found.standard_error == pytest.approx(stats.sem(bpb))
    assert (found.ci_low, found.ci_high) == pytest.approx((interval.low, interval.high))
    weaker = document_test(gains - 9, np.zeros(20), np.full(20, 4000))
    assert weaker.p == pytest.approx(stats.ttest_1samp(gains - 9, 0.0).pvalue)
    assert weaker.p_not_below == pytest.approx(1 - weaker.p / 2)


def test_the_interval_reaches_farther_on_the_side_of_the_longer_tail():
    """Most documents gain 1 nat, one gains 15: other texts could hold more like it."""
    gains = np.array([1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.1, 15.0])
    found = document_test(-gains, np.zeros(8), np.full(8, 100))
    assert found.estimate - found.ci_low > 1.5 * (found.ci_high - found.estimate)
    mirrored = document_test(gains, np.zeros(8), np.full(8, 100))
    assert (mirrored.ci_low, mirrored.ci_high) == pytest.approx((-found.ci_high, -found.ci_low))
    assert (mirrored.p, mirrored.p_not_below) == pytest.approx((found.p, 1 - found.p_not_below))


def test_few_long_documents_leave_few_degrees_of_freedom():
    after, before, _ = make_documents(np.random.default_rng(5), 12, 0.01)
    freedom = [
        document_test(after, before, np.array([long, *[1000] * 11])).degrees_of_freedom
        for long in (1000, 3000, 20_000, 1_000_000)
    ]
    assert freedom == sorted(freedom, reverse=True)
    assert freedom[0] == pytest.approx(11) and freedom[-1] == pytest.approx(1, abs=1e-3)


@given(
    st.lists(st.tuples(st.floats(-50, 50), st.integers(1, 40_000)), min_size=6, max_size=20),
)
def test_the_interval_holds_zero_where_the_test_does_not_reject_it(rows):
    gaps, byte_counts = (np.array(column) for column in zip(*rows, strict=True))
    found = document_test(gaps, np.zeros(len(rows)), byte_counts)
    assert found.ci_low <= found.estimate <= found.ci_high
    if abs(found.p - 0.05) > 1e-6 and found.standard_error > 0:
        assert (found.p > 0.05) == (found.ci_low < 0 < found.ci_high)
    assert 2 * least_p(found.documents) <= found.p <= 1


@given(st.floats(-5, 5))
def test_what_is_added_to_every_byte_shifts_the_interval(shift):
    after, before, byte_counts = make_documents(np.random.default_rng(8), 12, 0.01)
    alone = document_test(after, before, byte_counts)
    found = document_test(after + shift * math.log(2) * byte_counts, before, byte_counts)
    ends = ("estimate", "ci_low", "ci_high")
    for name in ends:
        assert getattr(found, name) == pytest.approx(getattr(alone, name) + shift, abs=1e-9)
    assert found.standard_error == pytest.approx(alone.standard_error)


def test_no_change_at_all_is_no_gain():
    nats = np.array([3.0, 4.0, 5.0])
    found = document_test(nats, nats, np.array([4, 5, 6]))
    assert (found.estimate, found.standard_error) == (0, 0)
    assert (found.p, found.p_not_below) == (1, 0.5)


@given(st.lists(st.floats(0, 1e4), min_size=12, max_size=12))
def test_what_both_methods_share_changes_nothing(difficulty):
    after, before, byte_counts = make_documents(np.random.default_rng(8), 12, 0.01)
    alone = document_test(after, before, byte_counts)
    both = np.array(difficulty)
    found = document_test(after + both, before + both, byte_counts)
    assert found.estimate == pytest.approx(alone.estimate)
    assert (found.ci_low, found.ci_high) == pytest.approx((alone.ci_low, alone.ci_high))
    assert found.p_not_below == pytest.approx(alone.p_not_below)


@given(st.permutations(range(40)))
def test_pairing_a_document_with_another_is_felt(order):
    generator = np.random.default_rng(9)
    before = generator.normal(900, 200, 40)
    after, byte_counts = before - generator.normal(9, 2, 40), np.full(40, 1000)
    paired = document_test(after, before, byte_counts)
    mixed = document_test(after, before[order], byte_counts)
    assert mixed.estimate == pytest.approx(paired.estimate)
    moved = sum(position != one for position, one in enumerate(order))
    if moved > 10:
        assert mixed.standard_error > 2 * paired.standard_error


@pytest.mark.parametrize(
    ("documents", "least"), [(2, 1 / 4), (5, 1 / 32), (12, 1 / 4096), (776, 1e-4), (50_000, 1e-4)]
)
def test_no_p_is_below_what_so_many_documents_can_give(documents, least):
    """All documents gain alike, so that nothing but their number limits what they show."""
    byte_counts = np.full(documents, 3000)
    gains = 5000 + np.random.default_rng(4).normal(0, 1e-6, documents)
    found = document_test(10_000 - gains, np.full(documents, 10_000.0), byte_counts)
    assert found.p_not_below == pytest.approx(least) == least_p(documents)
    assert found.p == pytest.approx(2 * least)


def test_one_document_alone_tells_nothing_of_others():
    empty_too = document_test(np.array([10.0, 0.0]), np.array([11.0, 0.0]), np.array([30, 0]))
    alone = document_test(np.array([10.0]), np.array([11.0]), np.array([30]))
    for found in (alone, empty_too):
        assert found.estimate == pytest.approx(-1 / math.log(2) / 30)
        assert math.isnan(found.p) and math.isnan(found.ci_low) and found.documents == 1


@pytest.mark.filterwarnings("error")
def test_empty_documents_count_for_nothing():
    after, before, byte_counts = make_documents(np.random.default_rng(6), 6, 0.01)
    found = document_test(*(np.append(values, 0) for values in (after, before, byte_counts)))
    assert found == document_test(after, before, byte_counts)


VERY_SKEWED = ("a gain that grows with length", "very skewed (log-normal)")
"""No method that was tried keeps its level on these; docs/log.md has the figures."""
CALIBRATED = [
    kind
    for kind in calibration.KINDS
    if kind[1] not in VERY_SKEWED and kind != ("equal", "skewed (exponential)")
]


def errors(kind, documents, trials):
    """Percentages of simulated texts: the truth rejected at 1 %, held by the 95 % interval."""
    generator = np.random.default_rng(documents)
    answer = calibration.kept(*calibration.draw_texts(kind, trials, documents, generator))
    return 100 * answer.rejected.mean(), 100 * answer.held.mean()


@pytest.mark.parametrize("kind", CALIBRATED, ids=" ".join)
def test_twelve_documents_are_calibrated(kind):
    rejected, held = errors(kind, 12, 500)
    assert rejected <= 2.4 and held >= 91.5  # three standard deviations beyond 1.3 and 94


def test_the_program_prints_a_row_for_each_kind_of_text_and_a_column_for_each_method(capsys):
    calibration.main(["--documents", "8", "13", "--trials", "50"])
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert rows[0][3:] == list(calibration.METHODS) and len(rows) == 2 + 2 * len(calibration.KINDS)
    shares = {tuple(row[:3]): [float(cell.split(" / ")[1]) for cell in row[3:]] for row in rows[2:]}
    for held in shares.values():
        assert held[-1] >= held[0]  # the report's test against the bootstrap that it had before


@pytest.mark.slow
@pytest.mark.parametrize("documents", [5, 8, 12, 30, 200])
def test_the_test_over_documents_is_calibrated(documents):
    """Every kind of text but those of which docs/log.md says that it is not."""
    for kind in CALIBRATED:
        rejected, held = errors(kind, documents, 3000)
        assert rejected <= 1.9, kind  # 1.3 and three standard deviations
        assert held >= (92.0 if documents == 5 else 92.7), kind  # 94, or 93.3, and less three


@pytest.mark.slow
def test_where_the_test_over_documents_errs_is_known():
    rejected, held = errors(("equal", "skewed (exponential)"), 12, 3000)
    assert 1.3 < rejected < 3.5 and 92 < held < 95
    rejected, held = errors(("log-normal", "very skewed (log-normal)"), 12, 3000)
    assert 1.3 < rejected < 4 and 90 < held < 94
    rejected, held = errors(("Pareto", "a gain that grows with length"), 12, 3000)
    assert 6 < rejected < 13 and 76 < held < 85
