"""The audit's parts one by one: seams, reach, noise, null statistics, coverage, budgets."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from fairway.audit.bookkeeping import check_coverage, check_reported_score, read_evaluation
from fairway.audit.checks import (
    check_attribution,
    check_budgets,
    check_normalization,
    check_width,
)
from fairway.audit.flip import (
    FlipRun,
    check_flips,
    detectable_leak_rate,
    largest_changes,
    reach_table,
    run_flips,
)
from fairway.audit.flip_plan import Flip, Geometry, choose_excerpt, plan_flips
from fairway.audit.fresh import load_callable
from fairway.audit.interface import (
    FAIL,
    NOT_APPLICABLE,
    NOT_RUN,
    PASS,
    UNBOUNDED_NATS,
    Scores,
    evaluate,
)
from fairway.audit.null import check_null, draw_stream, largest_gains
from fairway.audit.repeats import repeat_calls
from fairway.audit.result import AuditResult
from fairway.audit.runner import NO_FLIPS, AuditSettings
from fairway.audit.tally import Tally, tally_of
from fairway.errors import UserError
from fairway.evaluation.windows import lane_runs, sliding_windows
from fairway.settings import validated
from mutants import context_start

VOCAB_SIZE, BOS_ID = 16, 1


def stream(num_targets: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCAB_SIZE, (num_targets + 1,), generator=generator)
    tokens[::10] = BOS_ID
    return tokens


def peeking(distance: int):
    """An evaluator whose every distribution knows the token `distance` after its own target; -1
    is the token before it, which is honest."""

    def evaluator(tokens):
        logits = torch.zeros(len(tokens) - 1, VOCAB_SIZE)
        seen = tokens[1 + distance :][: len(logits)]
        logits[torch.arange(len(seen)), seen] = 1.0
        return torch.log_softmax(logits, -1)

    return evaluator


# ---- where to look ----


@pytest.mark.parametrize(("num_targets", "window", "stride"), [(5, 8, 2), (40, 8, 3), (64, 16, 16)])
def test_geometry_agrees_with_the_evaluation_s_own_windows(num_targets, window, stride):
    """Two independent implementations: the audit must not share the code that it checks."""
    windows = sliding_windows(num_targets, window, stride)
    slices = Geometry(window, stride).slices(num_targets)
    assert [first for first, _ in slices] == windows.first_scored.tolist()
    assert [stop - first + 1 for first, stop in slices] == windows.scored.tolist()
    for (first, _), start in list(zip(slices, windows.starts, strict=True))[:-1]:
        assert context_start(Geometry(window, stride), first) == start


def test_flips_hit_every_kind_of_seam_and_repeat_with_the_seed():
    tokens, geometry = stream(200), Geometry(32, 8, lanes=3, batch_windows=4)
    plan = {"vocab_size": VOCAB_SIZE, "bos_id": BOS_ID, "geometry": geometry, "num_flips": 60}
    plan["guesses"] = torch.full((200,), 9)
    flips = plan_flips(tokens, **plan, seed=1)
    assert flips == plan_flips(tokens, **plan, seed=1) != plan_flips(tokens, **plan, seed=2)
    assert len(flips) == 60
    assert sum(flip.seam == "random" for flip in flips) == 30
    assert all(1 <= flip.position <= 200 for flip in flips)
    assert all(int(tokens[flip.position]) != flip.token for flip in flips)
    kinds = {flip.seam for flip in flips}
    assert kinds == {
        "random", "first target", "last target", "first target of a window", "document start",
        "last target of a window", "lane boundary", "batch boundary", "last window",
        "new document", "after a document start", "late in a batch", "everything from here on",
    }  # fmt: skip
    starts = sliding_windows(200, 32, 8).first_scored
    lanes = [int(starts[run.start]) for run in lane_runs(len(starts), 3)][1:]
    seams = {flip.position for flip in flips if flip.seam == "lane boundary"}
    assert seams <= {target for first in lanes for target in (first - 1, first)}


def test_random_flips_come_one_from_each_section():
    flips = plan_flips(
        stream(100),
        guesses=torch.zeros(100, dtype=torch.int64),
        vocab_size=VOCAB_SIZE,
        bos_id=BOS_ID,
        geometry=None,
        num_flips=20,
        seed=0,
    )
    positions = [flip.position for flip in flips if flip.seam == "random"]
    assert [(position - 1) // 10 for position in positions] == list(range(10))


def test_the_excerpt_holds_the_most_documents():
    tokens = torch.full((1000,), 5)
    tokens[[0, 300, 310, 320, 900]] = BOS_ID
    tokens[400] = 6  # no other excerpt of 101 tokens holds it at this position
    assert torch.equal(choose_excerpt(tokens, 100, BOS_ID), tokens[300:401])
    assert torch.equal(choose_excerpt(tokens, 5000, BOS_ID), tokens)
    ties = torch.tensor([BOS_ID, 5, BOS_ID, 6, BOS_ID, 7])
    assert choose_excerpt(ties, 2, BOS_ID).tolist() == [BOS_ID, 5, BOS_ID]


# ---- flips ----


def flip_run(evaluator, tokens, flips, references=(), noise=0.0) -> FlipRun:
    """The flips' results, judged by a limit of 1e-4 bpb at a byte a token."""
    found = run_flips(
        evaluator,
        tokens,
        references or [evaluate(evaluator, tokens)],
        flips,
        vocab_size=VOCAB_SIZE,
        bos_id=BOS_ID,
        noise_nats=noise,
    )
    return FlipRun(*found, limit_nats=1e-4 * math.log(2), limit_bpb=1e-4)


def test_reach_is_the_distance_that_a_peeking_evaluator_looks_ahead():
    tokens = stream(60)
    evaluator = peeking(7)
    flips = [Flip(position, 0, "random") for position in (3, 20, 60)]
    run = flip_run(evaluator, tokens, flips)
    table = reach_table(run)
    assert table.loc[table["changed"] > 0, "distance_tokens"].tolist() == [7]
    assert table["pairs"].tolist()[:3] == [3, 3, 3]
    check = check_flips(run)
    assert check.verdict == FAIL
    assert check.evidence["reach_tokens"] == 7
    assert check.evidence["leaking_flips"] == 2  # nothing lies seven targets before the third
    assert check_flips(flip_run(peeking(-1), tokens, flips)).verdict == PASS


def test_one_bit_is_a_change_and_nan_is_not():
    before = torch.tensor([[0.0, 1.0], [math.nan, -math.inf], [1e-45, 0.0]])
    after = torch.tensor([[0.0, 1.0 + 2**-23], [math.nan, -math.inf], [0.0, 0.0]])
    changes = largest_changes(before, after)
    assert changes[0] > 0 and changes[1] == 0 and changes[2] > 0
    assert largest_changes(before[:1], torch.full((1, 2), math.nan))[0] == UNBOUNDED_NATS


def test_a_noisy_backend_is_compared_with_its_own_noise():
    generator = torch.Generator().manual_seed(0)

    def noisy(evaluator):
        return lambda tokens: evaluator(tokens) + 1e-6 * torch.rand((), generator=generator)

    tokens, flips = stream(60), [Flip(position, 0, "random") for position in (20, 30, 40)]
    for distance, verdict in ((-1, PASS), (2, FAIL)):
        evaluator = noisy(peeking(distance))
        repeats = repeat_calls(evaluator, tokens, evaluate(evaluator, tokens), 3)
        assert 0 < repeats.noise_nats < 2e-6 and not repeats.remembers
        run = flip_run(evaluator, tokens, flips, repeats.answers, repeats.noise_nats)
        assert check_flips(run).verdict == verdict


def test_detectable_leak_rate_is_the_rate_seen_with_the_stated_confidence():
    assert detectable_leak_rate(0) is None
    for flips in (1, 12, 500):
        assert (1 - detectable_leak_rate(flips)) ** flips == pytest.approx(0.01)


# ---- null test ----


def test_the_null_test_keeps_its_false_alarm_rate_where_honest_gains_vary_most():
    """q ≠ p with heavy-tailed gains, on text from p: at most α of 2,000 runs may fail."""
    generator = np.random.default_rng(0)
    source, guess = np.array([0.9, 0.1]), np.array([0.6, 0.4])
    draws = (generator.random((2000, 200)) < source[1]).astype(int)
    gains = np.log(guess[draws] / source[draws])
    failed = sum(check_null(row, 0.05, None).verdict == FAIL for row in gains)
    assert failed <= 0.05 * 2000
    assert check_null(gains[0] + 0.3, 0.05, None).verdict == FAIL


def test_a_leak_hidden_by_losses_elsewhere_is_found():
    gains = np.concatenate([np.full(100, -1.0), np.full(100, 0.3), np.full(100, -1.0)])
    check = check_null(gains, 0.001, reported_gain_nats=0.15)
    assert check.verdict == FAIL and check.evidence["gain_nats_per_token"] < 0
    stretch = largest_gains(gains, 0.001)[1]
    assert (stretch.start, stretch.stop) == (100, 200)
    assert stretch.nats == pytest.approx(30)


def test_the_leak_is_given_as_a_share_of_the_reported_gain():
    check = check_null(np.full(500, 0.27), 0.001, reported_gain_nats=0.15)
    assert check.evidence["leaked_share_of_reported_gain"] == pytest.approx(1.8)
    assert check_null(None, 0.001, None).verdict == NOT_RUN


def test_impossible_and_undefined_scores_do_not_pass_by_accident():
    assert check_null(np.array([0.1, math.nan, 0.1]), 0.001, None).verdict == FAIL
    assert check_null(np.array([0.1, -math.inf, 0.1]), 0.001, None).verdict == PASS


def test_a_drawn_stream_follows_its_source_and_its_seed():
    log_probs = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    first = torch.tensor([0])
    tokens, drawn = draw_stream(lambda prefix: log_probs, first, 3000, seed=4)
    again, _ = draw_stream(lambda prefix: log_probs, first, 3000, seed=4)
    assert torch.equal(tokens, again)
    assert np.allclose(np.bincount(tokens[1:]) / 3000, [0.5, 0.3, 0.2], atol=0.03)
    assert np.allclose(drawn, log_probs[tokens[1:]].numpy())


# ---- arithmetic ----


def test_normalization():
    log_probs = torch.log_softmax(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), -1)
    assert check_width(log_probs, 8) is None
    assert check_width(log_probs, 9).verdict == FAIL
    assert normalization(log_probs).verdict == PASS
    assert normalization(log_probs + 1e-3).verdict == FAIL
    log_probs[2, 3] = math.nan
    check = normalization(log_probs)
    assert check.verdict == FAIL and check.evidence["excerpt"]["off_distributions"] == 1


def normalization(log_probs):
    tally = Tally(len(log_probs))
    tally.add_distributions(log_probs)
    return check_normalization({"excerpt": tally}, log_probs.shape[1], 1e-4)


def scores_at(positions, lanes=None) -> Scores:
    positions = torch.tensor(positions)
    lanes = None if lanes is None else torch.tensor(lanes)
    return Scores(torch.zeros(4, 2), positions, torch.zeros(len(positions)), lanes)


def errors_of(scores: Scores):
    tokens = torch.zeros(5, dtype=torch.int64)
    return tally_of(evaluate(lambda text: scores, tokens), tokens, BOS_ID).coverage_errors()


@pytest.mark.parametrize(
    ("positions", "lanes", "fault"),
    [
        ([1, 2, 3, 4], None, None),
        ([3, 1, 4, 2], [1, 0, 1, 0], None),
        ([1, 2, 4], None, "missing"),
        ([1, 2, 2, 3, 4], None, "repeated"),
        ([1, 2, 3, 4, 5], None, "out_of_range"),
        ([1, 3, 2, 4], None, "out_of_order"),
    ],
)
def test_coverage_of_an_evaluator_s_scores(positions, lanes, fault):
    errors = errors_of(scores_at(positions, lanes))
    for kind in ("missing", "repeated", "out_of_range", "out_of_order"):
        assert getattr(errors, kind) == (kind == fault)


def token_table(tokens: np.ndarray) -> pd.DataFrame:
    count = len(tokens) - 1
    return pd.DataFrame(
        {
            "position": np.arange(1, count + 1),
            "token": tokens[1:],
            "window": np.arange(count) // 10,
            "lane": np.arange(count) // 50,
            "nll_before": np.full(count, 2.0),
            "nll_after": np.full(count, 1.9),
            "bytes": np.full(count, 3),
            "in_own_loss": np.zeros(count, bool),
        }
    )


def evaluated(
    tmp_path,
    table: pd.DataFrame,
    tokens: np.ndarray,
    original_bytes: int | None = None,
    **metrics: float | None,
):
    path = tmp_path / "tokens.parquet"
    table.to_parquet(path)
    reported = {"val_loss": 1.9, "val_bpb": 1.9 / math.log(2) / 3} | metrics
    return read_evaluation(
        path, tokens, split_bytes=300, metrics=reported, original_bytes=original_bytes
    )


def test_the_whole_evaluation(tmp_path):
    tokens = stream(100).numpy()
    evaluation = evaluated(tmp_path, token_table(tokens), tokens)
    assert check_coverage({}, evaluation).verdict == PASS
    assert check_reported_score({}, evaluation, 1e-4).verdict == PASS
    check = check_attribution(evaluation)
    assert check.verdict == PASS
    assert check.evidence["gain_nats_per_token"] == pytest.approx(0.1)
    assert check_attribution(None).verdict == NOT_APPLICABLE


@pytest.mark.parametrize("fault", ["missing", "repeated", "often repeated", "window", "unsorted"])
def test_a_table_that_is_not_one_pass_fails(tmp_path, fault):
    tokens = stream(100).numpy()
    table = token_table(tokens)
    if fault == "missing":
        table = table.drop(index=40)
    elif fault == "repeated":
        table = pd.concat([table.iloc[:41], table.iloc[40:]])
    elif fault == "often repeated":
        table = pd.concat([table.iloc[:40], *[table.iloc[40:41]] * 257, table.iloc[41:]])
    elif fault == "window":
        table.loc[40, "window"] = 0
    else:
        table = table.iloc[::-1]
    assert check_coverage({}, evaluated(tmp_path, table, tokens)).verdict == FAIL


@pytest.mark.parametrize("fault", ["val_loss", "val_bpb", "token", "bytes"])
def test_totals_that_the_table_does_not_give_fail(tmp_path, fault):
    tokens = stream(100).numpy()
    table, metrics = token_table(tokens), {}
    if fault == "token":
        table.loc[7, "token"] += 1
    elif fault == "bytes":
        table["bytes"] += 1
        metrics["val_bpb"] = 1.9 / math.log(2) / 4
    else:
        metrics[fault] = 1.0
    evaluation = evaluated(tmp_path, table, tokens, **metrics)
    assert check_reported_score({}, evaluation, 1e-4).verdict == FAIL


def test_the_score_by_original_bytes_is_recomputed_too(tmp_path):
    tokens = stream(100).numpy()
    bpb = 190 / math.log(2) / 320
    for reported, verdict in ((bpb, PASS), (bpb * 1.001, FAIL), (None, PASS)):
        evaluation = evaluated(
            tmp_path, token_table(tokens), tokens, 320, val_bpb_original=reported
        )
        check = check_reported_score({}, evaluation, 1e-4)
        assert check.verdict == verdict
        evidence = check.evidence["whole evaluation"]
        assert evidence["original_bytes"] == 320 and evidence["split_bytes"] == 300
        assert evidence["val_bpb_original"] == pytest.approx(bpb)
        assert evidence["difference_bpb_original"] == pytest.approx(bpb - 190 / math.log(2) / 300)
        if verdict == PASS:
            assert "320 bytes before normalization" in check.sentence
            assert f"{bpb:.4f} (-0.0571)" in check.sentence
        else:
            assert "al_bpb_original is" in check.sentence


def test_attribution_splits_the_gain_exactly(tmp_path):
    tokens = stream(100).numpy()
    table = token_table(tokens)
    table.loc[:24, ["in_own_loss", "nll_after"]] = [True, 1.5]
    check = check_attribution(evaluated(tmp_path, table, tokens))
    assert check.verdict == FAIL
    assert check.evidence["share_of_targets_in_fit"] == 0.25
    assert check.evidence["gain_in_fit_nats"] == pytest.approx(12.5)
    assert check.evidence["gain_out_of_fit_nats"] == pytest.approx(7.5)
    assert check.evidence["share_of_gain_in_fit"] == pytest.approx(0.625)


def test_a_table_without_a_column_is_a_clear_error(tmp_path):
    tokens = stream(100).numpy()
    with pytest.raises(UserError, match="lacks the columns lane"):
        evaluated(tmp_path, token_table(tokens).drop(columns="lane"), tokens)


def test_budgets():
    limits = {"artifact_bytes": 16_000_000, "training_seconds": 600.0}
    used = {"artifact_bytes": 15_999_999, "training_seconds": 600.0}
    assert check_budgets(used, limits).verdict == PASS
    assert check_budgets(used | {"artifact_bytes": 16_000_001}, limits).verdict == FAIL
    assert check_budgets(used | {"training_seconds": None}, limits).verdict == NOT_RUN
    assert check_budgets({}, {}).verdict == NOT_APPLICABLE


# ---- the result ----


def result_of(*checks) -> AuditResult:
    return AuditResult(checks, reach_table(NO_FLIPS), "unknown", None, "Little.", {"seed": 1}, {})


def test_the_result_lists_what_was_not_run_and_what_does_not_apply():
    checks = [check_budgets({}, {"artifact_bytes": 1}), check_null(None, 0.001, None)]
    result = result_of(*checks).with_checks(check_attribution(None), variant="causal")
    content = result.content("causal")
    assert content["verdict"] == NOT_RUN
    assert content["not_run"] == ["budgets", "null"]
    assert content["not_applicable"] == ["attribution"]
    assert (content["variant"], content["seed"]) == ("causal", 1)
    overall = str(result).splitlines()[-1]
    assert overall.startswith(NOT_RUN) and "NOT RUN: budgets, null" in overall


def test_what_does_not_apply_stands_in_no_way_of_a_pass():
    within = check_budgets({"artifact_bytes": 1}, {"artifact_bytes": 1})
    result = result_of(within, check_attribution(None))
    assert result.verdict == PASS
    overall = str(result).splitlines()[-1]
    assert overall.startswith(PASS) and "1 of 1 applicable checks pass" in overall
    assert "NOT APPLICABLE: attribution" in overall
    over = check_budgets({"artifact_bytes": 2}, {"artifact_bytes": 1})
    assert result.with_checks(over, check_null(None, 0.001, None)).verdict == FAIL


@pytest.mark.parametrize(
    "change",
    [
        {"flips": 1},
        {"stream_tokens": 1},
        {"null_tokens": -1},
        {"noise_repeats": 0},
        {"significance": 0.0},
        {"significance": 1.0},
    ],
)
def test_wrong_settings_name_their_key(change):
    with pytest.raises(UserError, match=f"audit.{next(iter(change))}"):
        validated(AuditSettings, change, "audit")


@pytest.mark.parametrize("name", ["math", "math:nothing", "no_such_module:f", "math:pi"])
def test_a_wrong_function_name_is_a_clear_error(name):
    with pytest.raises(UserError, match="--evaluator"):
        load_callable(name, "--evaluator")
