"""Variants against each other: what they share, what is compared, and pages of many."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fairway.errors import UserError
from fairway.report.format import signed
from fairway.report.scores import differences_by_stage_table, headline_table
from fairway.report.settings import ReportSettings
from fairway.report.tables import comparisons_table, make_tables, read_run, variants_by_text
from fairway.stages import STAGES as TABLE
from fairway.stages import Stage
from synthetic_run import (
    OTHER_TEXT,
    QUICKSTART,
    STAGES,
    SWEEP,
    TWO_TRAININGS,
    layout,
    load_results,
    make_report,
    make_run,
    make_tokens,
    reseal,
)

TWO_SEEDS = (1337, 42)


def between_variants(comparisons):
    return comparisons[comparisons["variant"] != comparisons["reference_variant"]]


def pairs(comparisons):
    rows = between_variants(comparisons)
    return set(zip(rows["variant"], rows["reference_variant"], strict=True))


def read_page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def two_trainings(tmp_path_factory):
    root = make_run(tmp_path_factory.mktemp("run"), TWO_SEEDS, TWO_TRAININGS)
    return make_report(root, TWO_SEEDS, TWO_TRAININGS, settings={}, figures=False)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = make_run(tmp_path_factory.mktemp("run"), TWO_SEEDS, SWEEP)
    return root, make_report(root, TWO_SEEDS, SWEEP)


def test_two_training_variants_are_tested_over_seeds_and_over_documents(two_trainings):
    comparisons = read_run(two_trainings.parent).comparisons
    row = between_variants(comparisons).iloc[0]
    assert (row["variant"], row["reference_variant"]) == ("fast", "slow")
    tokens = {name: [make_tokens(name, seed) for seed in TWO_SEEDS] for name in ("fast", "slow")}
    fast, slow = (
        np.array([table["nll_after"].mean() for table in tokens[name]]) for name in tokens
    )
    assert row["difference_nats"] == pytest.approx(fast.mean() - slow.mean())
    variances = np.array([fast.var(ddof=1), slow.var(ddof=1)]) / 2
    t = (fast.mean() - slow.mean()) / math.sqrt(variances.sum())
    degrees = variances.sum() ** 2 / (variances**2).sum()
    assert row["welch_t"] == pytest.approx(t)
    assert row["welch_degrees_of_freedom"] == pytest.approx(degrees)
    assert row["welch_p"] == pytest.approx(2 * stats.t.sf(abs(t), degrees))
    gaps = fast - slow
    paired = gaps.mean() / (abs(gaps[0] - gaps[1]) / 2)  # of two: std / √2 is half the distance
    assert row["paired_t"] == pytest.approx(paired)
    assert row["paired_degrees_of_freedom"] == 1
    assert row["paired_p"] == pytest.approx(1 - 2 * math.atan(abs(paired)) / math.pi)
    nats = [sum(table["nll_after"].sum() for table in tokens[name]) / 2 for name in tokens]
    total_bytes = tokens["fast"][0]["bytes"].sum()
    assert row["estimate"] == pytest.approx((nats[0] - nats[1]) / math.log(2) / total_bytes)
    page = read_page(two_trainings)
    assert f"{row['difference_nats']:+.4f}".replace("-", "−") in page
    assert "No baseline is configured" in page
    assert "Shared by" not in page


def test_variants_that_share_nothing_have_their_own_rows_of_every_stage(two_trainings):
    stages = read_run(two_trainings.parent).stages
    for variant in TWO_TRAININGS:
        own = stages[stages["variant"] == variant]
        assert set(own["stage"]) == {*STAGES, "sliding"}
        assert set(own["folder"]) == {variant}
    trained = stages[(stages["stage"] == "train") & (stages["metric"] == "val_bpb")]
    assert trained["value"].nunique() == len(TWO_TRAININGS) * len(TWO_SEEDS)


def test_a_shared_stage_stands_once_on_the_page_and_counts_once(tmp_path):
    folders = layout(a=(), b=("audit",), c=STAGES[3:], leaky=STAGES[2:])
    root = make_run(tmp_path, TWO_SEEDS, folders)
    results = load_results(root, TWO_SEEDS, folders)
    assert results.stages_by_sharers() == {
        ("a", "b", "c", "leaky"): ["train", "ema"],
        ("a", "b", "c"): ["ttt"],
        ("a", "b"): ["gptq", "slot_eval"],
        ("a",): ["audit"],
        ("b",): ["audit"],
        ("c",): ["gptq", "slot_eval", "audit"],
        ("leaky",): ["ttt", "gptq", "slot_eval", "audit"],
    }
    assert results.tokens["a", 42] is results.tokens["b", 42]
    page = read_page(make_report(root, TWO_SEEDS, folders, figures=False))
    assert "Shared by all variants, not audited by itself" in page
    assert "Shared by 3 variants in shared, not audited by itself" in page
    assert page.count(">Training, last step<") == 1
    assert len(re.findall(r">Test-time training \(TTT\)[ <]", page)) == 2
    # a and b have one score but an audit each: the score is shown beside either verdict.
    assert page.count(">Adapted by LoRA and SLOT <") == 3
    audits = 4 * 14.0
    others = (34.0 + 9.0) + 2 * 9.0 + 3 * (9.0 + 21.0)
    assert f"The audits took {audits / others:.0%} of what the other stages took" in page


def test_variants_of_another_text_are_shown_but_not_compared(tmp_path):
    root = make_run(tmp_path, TWO_SEEDS, OTHER_TEXT)
    folder = make_report(root, TWO_SEEDS, OTHER_TEXT, figures=False)
    comparisons = pd.read_parquet(folder / "comparisons.parquet")
    assert pairs(comparisons) == {("leaky", "causal")}
    assert set(comparisons["variant"]) == set(OTHER_TEXT)
    page = read_page(folder)
    assert (
        "Only variants that scored the same documents are compared: causal and leaky; german."
        in page
    )
    assert "embedded, german" in page


def test_one_variants_seeds_must_have_scored_the_same_text(tmp_path):
    make_run(tmp_path, TWO_SEEDS, QUICKSTART)
    results = load_results(tmp_path, TWO_SEEDS, QUICKSTART)
    sums = results.tokens["causal", 42]
    longer = replace(sums, by_document=sums.by_document.assign(bytes=sums.by_document["bytes"] + 1))
    mixed = replace(results, tokens=results.tokens | {("causal", 42): longer})
    with pytest.raises(UserError, match="variant causal, seed 42 scored other text"):
        variants_by_text(mixed)


def test_another_vocabulary_on_the_same_documents_is_compared_by_the_byte(tmp_path):
    make_run(tmp_path, TWO_SEEDS, QUICKSTART)
    results = load_results(tmp_path, TWO_SEEDS, QUICKSTART)
    whole = between_variants(comparisons_table(results, "causal")).iloc[0]
    cut = {}
    for (variant, seed), sums in results.tokens.items():
        tokens = sums.by_document["tokens"] + (variant == "leaky")
        by_document = sums.by_document.assign(tokens=tokens)
        cut[variant, seed] = replace(sums, by_document=by_document)
    row = between_variants(comparisons_table(replace(results, tokens=cut), "causal")).iloc[0]
    assert math.isnan(row["difference_nats"]) and not math.isnan(whole["difference_nats"])
    for name in ("estimate", "p", "welch_t", "welch_p", "paired_t", "paired_p"):
        assert row[name] == whole[name]


@pytest.mark.parametrize("name", [None, "leaky", "causal-dampening_fraction_3"])
def test_variants_are_compared_with_the_one_that_is_named(sweep, name):
    results = load_results(sweep[0], TWO_SEEDS, SWEEP)
    settings = ReportSettings(against=name)
    against = name or next(iter(SWEEP))
    assert pairs(make_tables(results, settings).comparisons) == {
        (other, against) for other in SWEEP if other != against
    }


def test_a_variant_that_there_is_not_is_refused_with_the_nearest(sweep):
    results = load_results(sweep[0], TWO_SEEDS, SWEEP)
    with pytest.raises(UserError, match="report.against: no variant 'leeky'.*did you mean leaky"):
        make_tables(results, ReportSettings(against="leeky"))


def test_a_sweep_is_a_row_a_variant_the_best_first_and_what_failed_last(sweep):
    results, settings = load_results(sweep[0], TWO_SEEDS, SWEEP), ReportSettings()
    tables = make_tables(results, settings)
    against = next(iter(SWEEP))
    table = headline_table(results, tables, settings, against)
    names = [row[0] for row in table.rows]
    assert sorted(names) == sorted(SWEEP) and names[-1] == "leaky"
    scores = tables.stages.query("stage == 'slot_eval' and metric == 'val_bpb'")
    means = scores.groupby("variant")["value"].mean()
    assert names[:-1] == list(means.drop("leaky").sort_values().index)
    rows = {row[0]: dict(zip(table.heads, row, strict=True)) for row in table.rows}
    used = tables.budgets.groupby(["variant", "budget"])["used"]
    between = between_variants(tables.comparisons).set_index("variant")
    for variant in set(SWEEP) - {against, "leaky"}:
        row = rows[variant]
        assert row["#Training, s"] == f"{used.mean()[variant, 'training_seconds']:,.1f}"
        assert row["#Evaluation, s"] == f"{used.mean()[variant, 'evaluation_seconds']:,.1f}"
        assert row["#Artifact, bytes"] == f"{used.max()[variant, 'artifact_bytes']:,.0f}"
        estimate = signed(between.loc[variant, "estimate"])
        assert row["#Difference"].startswith(estimate + " ")
    assert "not a valid score" in rows["leaky"]["#val_bpb"]


def test_differences_at_each_stage_say_what_is_shared(sweep):
    results = load_results(sweep[0], TWO_SEEDS, SWEEP)
    first, second, *_ = SWEEP
    table = differences_by_stage_table(results, first)
    row = next(row for row in table.rows if row[0] == second)
    shown = dict(zip(table.heads, row, strict=True))
    assert [shown[f"#{stage}"] for stage in ("train", "ema", "ttt")] == ["equal"] * 3
    gaps = [
        results.metrics[second, seed, "gptq"]["val_bpb"]
        - results.metrics[first, seed, "gptq"]["val_bpb"]
        for seed in TWO_SEEDS
    ]
    error = np.std(gaps, ddof=1) / math.sqrt(2)
    assert shown["#gptq"] == f"{signed(np.mean(gaps))} ± {error:.4f}"


def test_a_page_of_many_variants_folds_the_audits_that_passed(sweep):
    page = read_page(sweep[1]).replace("<wbr>", "")
    assert page.count("<details>") == 5 and page.count("<details open>") == 1
    assert re.search(r"<details open>\s*<summary>leaky", page)
    figures = {path.stem for path in (sweep[1] / "figures").iterdir()}
    assert len(figures) == 7
    for variant in SWEEP:
        assert page.count(f"<strong>{variant}</strong>") == 1


def test_what_does_not_apply_is_neither_failing_nor_missing(tmp_path):
    make_run(tmp_path, TWO_SEEDS, QUICKSTART)
    for seed in TWO_SEEDS:
        path = tmp_path / f"results/quickstart/seed-{seed}/shared/audit/audit.json"
        audit = json.loads(path.read_text())
        audit["checks"][-1]["verdict"] = "NOT APPLICABLE"
        path.write_text(json.dumps(audit))
        reseal(path)
    page = read_page(make_report(tmp_path, TWO_SEEDS, QUICKSTART, figures=False))
    assert "and passed every check of its audit (a leak at 54% of tokens would" in page
    assert page.count("Not run: Null test.") == 1  # of leaky
    assert page.count(">NOT APPLICABLE</span>") == len(TWO_SEEDS)


@pytest.fixture
def pruning():
    """A row of the user's own in the table of stages, between gptq and slot_eval."""
    before = dict(TABLE)
    TABLE.clear()
    for name, stage in before.items():
        if name == "slot_eval":
            TABLE["prune"] = Stage(
                "prune", "Pruned artifact", sections=(), needs=("gptq",), products=(), scores=True
            )
        TABLE[name] = stage
    yield
    TABLE.clear()
    TABLE.update(before)


def test_a_stage_of_the_users_own_is_reported_by_its_row_alone(tmp_path, pruning):
    folders = {name: own | {"prune": own["gptq"]} for name, own in QUICKSTART.items()}
    root = make_run(tmp_path, TWO_SEEDS, folders)
    results = load_results(root, TWO_SEEDS, folders)
    scored = ["train", "ema", "ttt", "gptq", "prune", "sliding", "slot_eval"]
    assert results.score_stages == scored
    folder = make_report(root, TWO_SEEDS, folders, figures=False)
    page = read_page(folder)
    assert page.count(">Pruned artifact<") == len(folders)
    stages = read_run(folder.parent).stages
    assert set(stages.loc[stages["stage"] == "prune", "metric"]) >= {"val_bpb", "seconds"}
