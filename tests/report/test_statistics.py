"""Seed statistics and the bootstrap, against their formulas and published figures."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fairway.report.statistics import (
    RESAMPLES,
    bootstrap_bpb_difference,
    describe,
    least_p,
    paired_test,
    welch_test,
)

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


def test_the_bootstraps_estimate_is_the_ratio_of_sums():
    after, before, byte_counts = make_documents(np.random.default_rng(0), 50, 0.01)
    found = bootstrap_bpb_difference(after, before, byte_counts, seed=1)
    bpb = [nats.sum() / math.log(2) / byte_counts.sum() for nats in (after, before)]
    assert found.estimate == pytest.approx(bpb[0] - bpb[1])
    assert found.ci_low < found.estimate < found.ci_high
    assert found == bootstrap_bpb_difference(after, before, byte_counts, seed=1)


def test_the_bootstraps_interval_agrees_with_resampling_by_hand():
    after, before, byte_counts = make_documents(np.random.default_rng(3), 80, 0.004)
    found = bootstrap_bpb_difference(after, before, byte_counts, seed=1)
    gap = (after - before) / math.log(2)
    generator = np.random.default_rng(2)
    times = generator.multinomial(80, np.full(80, 1 / 80), size=RESAMPLES)
    draws = (times @ gap) / (times @ byte_counts)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.ci_low == pytest.approx(low, abs=0.05 * (high - low))
    assert found.ci_high == pytest.approx(high, abs=0.05 * (high - low))
    assert found.standard_error == pytest.approx(draws.std(ddof=1), rel=0.05)


def test_the_bootstrap_of_two_documents_is_known_in_closed_form():
    """Gaps of −3 and +1 nats: both draws the first, one of each, both the second; 1 : 2 : 1."""
    found = bootstrap_bpb_difference(np.array([2.0, 6.0]), np.array([5.0, 5.0]), [4, 4], seed=1)
    unit = 1 / math.log(2) / 8  # the bits per byte of a nat
    assert found.estimate == pytest.approx(-2 * unit)
    assert (found.ci_low, found.ci_high) == pytest.approx((-6 * unit, 2 * unit))
    assert found.p_not_below == pytest.approx(1 / 4, abs=0.02)
    assert found.p == pytest.approx(1 / 2, abs=0.02)
    assert found.standard_error == pytest.approx(math.sqrt(8) * unit, rel=0.02)


def test_documents_of_equal_length_give_the_means_standard_error():
    generator = np.random.default_rng(6)
    before, gain = generator.normal(900, 200, 300), generator.normal(3, 20, 300)
    found = bootstrap_bpb_difference(before - gain, before, np.full(300, 1000), seed=1)
    exact = gain.std() / math.sqrt(300) / math.log(2) / 1000
    assert found.standard_error == pytest.approx(exact, rel=0.03)
    normal = stats.norm.cdf(found.estimate / exact)
    assert found.p_not_below == pytest.approx(normal, abs=0.01)


def test_no_change_at_all_is_no_gain():
    nats = np.array([3.0, 4.0, 5.0])
    found = bootstrap_bpb_difference(nats, nats, np.array([4, 5, 6]), seed=1)
    assert (found.estimate, found.standard_error) == (0, 0)
    assert found.p_not_below == found.p == 1


@given(st.lists(st.floats(0, 1e4), min_size=12, max_size=12))
def test_what_both_methods_share_changes_nothing(difficulty):
    after, before, byte_counts = make_documents(np.random.default_rng(8), 12, 0.01)
    alone = bootstrap_bpb_difference(after, before, byte_counts, seed=1)
    both = np.array(difficulty)
    found = bootstrap_bpb_difference(after + both, before + both, byte_counts, seed=1)
    assert found.estimate == pytest.approx(alone.estimate)
    assert (found.ci_low, found.ci_high) == pytest.approx((alone.ci_low, alone.ci_high))
    assert found.p_not_below == pytest.approx(alone.p_not_below, abs=2e-4)


@given(st.permutations(range(40)))
def test_pairing_a_document_with_another_is_felt(order):
    generator = np.random.default_rng(9)
    before = generator.normal(900, 200, 40)
    after, byte_counts = before - generator.normal(9, 2, 40), np.full(40, 1000)
    paired = bootstrap_bpb_difference(after, before, byte_counts, seed=1)
    mixed = bootstrap_bpb_difference(after, before[order], byte_counts, seed=1)
    assert mixed.estimate == pytest.approx(paired.estimate)
    moved = sum(position != one for position, one in enumerate(order))
    if moved > 10:
        assert mixed.standard_error > 2 * paired.standard_error


def test_pairing_cancels_the_documents_difficulty():
    after, before, byte_counts = make_documents(np.random.default_rng(4), 60, 0.01)
    paired = bootstrap_bpb_difference(after, before, byte_counts, seed=1)
    alone = bootstrap_bpb_difference(after, np.zeros_like(after), byte_counts, seed=1)
    assert paired.ci_high - paired.ci_low < 0.2 * (alone.ci_high - alone.ci_low)
    assert paired.p == pytest.approx(1 / (paired.resamples + 1))
    assert paired.p == least_p(paired.resamples)


def test_the_bootstraps_p_is_calibrated_without_a_difference():
    generator = np.random.default_rng(5)
    found = [
        bootstrap_bpb_difference(*make_documents(generator, 40, 0.0), seed=trial)
        for trial in range(200)
    ]
    for name in ("p", "p_not_below"):
        assert 3 <= sum(getattr(one, name) < 0.05 for one in found) <= 24
    covered = sum(one.ci_low <= 0 <= one.ci_high for one in found)
    assert covered >= 176


def test_the_bootstraps_interval_covers_a_true_gain():
    generator = np.random.default_rng(10)
    truth = -0.02 / math.log(2) / 3  # a token stands for three bytes in make_documents
    covered, errors, estimates = 0, [], []
    for trial in range(200):
        one = bootstrap_bpb_difference(*make_documents(generator, 60, 0.02), seed=trial)
        covered += one.ci_low <= truth <= one.ci_high
        errors.append(one.standard_error)
        estimates.append(one.estimate)
    assert 178 <= covered <= 199
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)


def test_one_document_cannot_be_resampled():
    found = bootstrap_bpb_difference(np.array([10.0]), np.array([11.0]), np.array([30]), seed=1)
    assert found.estimate == pytest.approx(-1 / math.log(2) / 30)
    assert math.isnan(found.p) and math.isnan(found.ci_low)


@pytest.mark.filterwarnings("error")
def test_a_draw_of_nothing_but_empty_documents_is_dropped():
    found = bootstrap_bpb_difference(np.array([1.0, 0.0]), np.zeros(2), np.array([3, 0]), seed=1)
    assert 0 < found.resamples < RESAMPLES
    assert math.isfinite(found.ci_low)
