"""The report's tables, made from a synthetic run whose every number is known."""

import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fairway.errors import UserError
from fairway.files import sha256_of
from fairway.report.settings import ReportSettings
from fairway.report.tables import batch_reach_tokens, budgets_table, read_run
from fairway.report.token_sums import TEXT_PARTS, gain_nats, read_token_sums
from fairway.settings import validated
from synthetic_run import (
    BASELINE,
    BUDGETS,
    QUICKSTART,
    SEEDS,
    SETTINGS,
    load_results,
    make_report,
    make_run,
    make_tokens,
    reseal,
)


@pytest.fixture(scope="module")
def tables(finished):
    return read_run(finished[1].parent)


def test_a_runs_tables_are_read_in_python(finished, tables):
    scores = tables.stages.query("stage == 'slot_eval' and metric == 'val_bpb'")
    wide = scores.pivot(index="seed", columns="variant", values="value")
    assert wide.shape == (len(SEEDS), len(QUICKSTART))
    for name in ("stages", "summary", "comparisons", "gains", "budgets"):
        written = pd.read_parquet(finished[1] / f"{name}.parquet")
        pd.testing.assert_frame_equal(getattr(tables, name), written)


def test_an_unfinished_runs_tables_name_the_report_stage(tmp_path):
    with pytest.raises(UserError, match="stages.parquet is missing.*report"):
        read_run(tmp_path)


def test_stages_parquet_is_tidy(tables):
    stages = tables.stages
    columns = ["run", "variant", "folder", "seed", "stage", "metric", "value", "unit"]
    assert list(stages.columns) == columns
    assert not stages.duplicated(["run", "variant", "seed", "stage", "metric"]).any()
    assert set(stages["run"]) == {"quickstart"}
    score = stages[stages["metric"] == "val_bpb"]
    assert score["unit"].unique().tolist() == ["bits/byte"]
    assert len(score) == len(SEEDS) * len(QUICKSTART) * 6
    units = dict(zip(stages["metric"], stages["unit"], strict=True))
    assert units["training_seconds"] == "s" and units["peak_memory_bytes"] == "bytes"
    assert units["processes"] == "1" and units["val_loss"] == "nats/token"


def test_a_variants_rows_are_its_whole_chain_and_folders_tell_what_is_shared(tables):
    stages = tables.stages
    folders = stages.groupby(["variant", "stage"])["folder"].unique()
    for variant, own in QUICKSTART.items():
        for stage, folder in (own | {"sliding": own["slot_eval"]}).items():
            assert folders[variant, stage].tolist() == [folder]
    once = stages.drop_duplicates(["folder", "seed", "stage", "metric"])
    trained = once[(once["stage"] == "train") & (once["metric"] == "seconds")]
    assert len(trained) == len(SEEDS)
    values = stages.pivot(index=["seed", "stage", "metric"], columns="variant", values="value")
    shared = values.loc[(slice(None), ["train", "ema"]), :]
    np.testing.assert_array_equal(shared["causal"], shared["leaky"])
    assert set(tables.summary.columns) >= {"folder", "verdict"}


def test_sliding_is_the_score_before_adaptation(tables):
    stages = tables.stages.set_index(["variant", "seed", "stage", "metric"])["value"]
    tokens = make_tokens("causal", 42)
    bpb = tokens["nll_before"].sum() / math.log(2) / tokens["bytes"].sum()
    assert stages["causal", 42, "sliding", "val_bpb"] == pytest.approx(bpb)
    assert stages["causal", 42, "slot_eval", "val_bpb"] < bpb


def test_summary_parquet_holds_the_statistics_and_the_verdict(tables):
    summary = tables.summary
    losses = np.array([make_tokens("causal", seed)["nll_after"].mean() for seed in SEEDS])
    final = summary[(summary["stage"] == "slot_eval") & (summary["metric"] == "val_loss")]
    row = final[final["variant"] == "causal"].iloc[0]
    error = losses.std(ddof=1) / math.sqrt(3)
    half = 4.302652729749464 * error  # Student's t of two degrees of freedom, 97.5 %
    expected = {
        "n": 3,
        "mean": losses.mean(),
        "std": losses.std(ddof=1),
        "standard_error": error,
        "ci_low": losses.mean() - half,
        "ci_high": losses.mean() + half,
    }
    assert row[list(expected)].to_dict() == pytest.approx(expected)
    baseline = np.array(BASELINE["losses"])
    assert row["difference_nats"] == pytest.approx(losses.mean() - baseline.mean())
    variances = np.array([losses.var(ddof=1), baseline.var(ddof=1)]) / 3
    t = (losses.mean() + 0.005 - baseline.mean()) / math.sqrt(variances.sum())
    degrees = variances.sum() ** 2 / (variances**2 / 2).sum()
    assert row["welch_t"] == pytest.approx(t)
    assert row["welch_degrees_of_freedom"] == pytest.approx(degrees)
    assert row["welch_p"] == pytest.approx(stats.t.cdf(t, degrees))
    assert summary.drop(final.index)["welch_p"].isna().all()
    verdicts = summary.groupby("variant")["verdict"].agg(set)
    assert verdicts.to_dict() == {"causal": {"PASS"}, "leaky": {"FAIL"}}


def test_the_budgets_count_the_code_and_the_seconds_of_their_stages(finished, tables):
    used = tables.budgets.set_index(["variant", "seed", "budget"])
    limits = used["limit"].groupby("budget").unique()
    assert {name: [limit] for name, limit in BUDGETS.items()} == {
        name: limits[name].tolist() for name in BUDGETS
    }
    artifact = used.xs("artifact_bytes", level="budget")["used"]
    assert (artifact > 123_456 + 512_345 - 1).all()
    for variant in QUICKSTART:
        training = used.loc[(variant, 42, "training_seconds"), "used"]
        assert training == pytest.approx(0.8 * (34.0 + 9.0))  # train and ttt
        evaluation = used.loc[(variant, 42, "evaluation_seconds"), "used"]
        assert evaluation == pytest.approx(0.9 * 21.0)  # slot_eval, not the other stages' second
    results = load_results(finished[0])
    key = ("leaky", 42, "audit")
    budgets = {"budgets": BUDGETS | {"artifact_bytes": 601}}
    other = results.provenance[key].model_copy(update={"settings": budgets})
    changed = budgets_table(replace(results, provenance=results.provenance | {key: other}))
    assert changed.query("limit == 601")[["variant", "seed"]].to_numpy().tolist() == [["leaky", 42]]


def test_the_reach_of_a_batch_is_that_of_the_slices_before_its_last(finished):
    results = load_results(finished[0])
    assert batch_reach_tokens(results, "causal") is None
    assert batch_reach_tokens(results, "leaky") == 31 * 32
    key = ("leaky", results.seeds[0], "slot_eval")

    def with_adapters(adapters):
        settings = {"evaluation": {"adapters": adapters, "stride_tokens": 64}}
        entry = results.provenance[key].model_copy(update={"settings": settings})
        return replace(results, provenance=results.provenance | {key: entry})

    eight = with_adapters([{"lora": {}}, {"mine:Slot": {"scope": "batch", "batch_windows": 8}}])
    assert batch_reach_tokens(eight, "leaky") == 7 * 64
    assert batch_reach_tokens(with_adapters([{"lora": {}}, {"ngram": {}}]), "leaky") is None


def test_comparisons_parquet_pairs_the_documents(tables):
    sides = ["variant", "stage", "reference_variant", "reference_stage"]
    rows = tables.comparisons.set_index(sides)
    assert set(rows.index) == {
        ("causal", "slot_eval", "causal", "sliding"),
        ("leaky", "slot_eval", "leaky", "sliding"),
        ("leaky", "slot_eval", "causal", "slot_eval"),
    }
    assert len(rows) == len(QUICKSTART) * (len(SEEDS) + 1) + 1
    score = {}
    for variant in QUICKSTART:
        tokens = [make_tokens(variant, seed) for seed in SEEDS]
        nats = np.mean([table["nll_after"].sum() for table in tokens])
        score[variant] = nats / math.log(2) / tokens[0]["bytes"].sum()
    leak = rows.loc[("leaky", "slot_eval", "causal", "slot_eval")]
    assert leak["estimate"] == pytest.approx(score["leaky"] - score["causal"])
    assert leak["documents"] == 24 and leak["ci_high"] < 0


def test_one_seed_and_no_baseline_are_null_not_a_crash(tmp_path):
    make_run(tmp_path, seeds=(42,))
    folder = make_report(
        tmp_path, seeds=(42,), settings=SETTINGS | {"baseline": None}, figures=False
    )
    summary = pd.read_parquet(folder / "summary.parquet")
    assert (summary["n"] == 1).all()
    empty = ["std", "standard_error", "ci_low", "ci_high", "difference_nats", "welch_t", "welch_p"]
    assert summary[empty].isna().all(axis=None)
    comparisons = pd.read_parquet(folder / "comparisons.parquet")
    between = comparisons[comparisons["variant"] != comparisons["reference_variant"]]
    assert between[["welch_p", "paired_p"]].isna().all(axis=None)
    assert between["difference_nats"].notna().all()
    page = (folder / "report.html").read_text()
    assert "No baseline is configured" in page
    assert ">nan" not in page.lower()


@pytest.mark.parametrize("batch_rows", [997, 12_000])
def test_token_sums_do_not_depend_on_the_batches(tmp_path, batch_rows):
    table = make_tokens("leaky", 42)
    path = tmp_path / "tokens.parquet"
    table.to_parquet(path)
    sums = read_token_sums(path, batch_rows)
    by_document = table.groupby("document")["nll_after"].sum()
    np.testing.assert_allclose(sums.by_document["nats_after"], by_document)
    begins = table.groupby("document")["position"].transform("min").where(table["document"] > 0, 0)
    early = table[table["position"] - begins < 64]
    first = sums.by_document_position.loc[0]
    assert first["tokens"] == len(early)
    assert first["nats_before"] == pytest.approx(early["nll_before"].sum())
    assert first["gain_slot"] == pytest.approx(early["gain_slot"].sum())
    assert len(sums.by_text_part) == TEXT_PARTS
    assert set(sums.by_text_part["tokens"]) == {600}
    own = table[table["in_own_loss"]]
    gain = (own["nll_before"] - own["nll_after"]).mean()
    assert gain_nats(sums.by_own_loss)[True] == pytest.approx(gain)


@pytest.mark.parametrize(
    ("missing", "stage"),
    [
        ("shared/train/metrics.json", "train"),
        ("shared/train/metrics.parquet", "train"),
        ("shared/gptq/provenance.json", "gptq"),
        ("shared/slot_eval/tokens.parquet", "slot_eval"),
        ("leaky/audit/audit.json", "audit"),
        ("leaky/audit/reach.parquet", "audit"),
    ],
)
def test_a_missing_file_names_itself_and_its_stage(finished, missing, stage):
    root = finished[0]
    path = root / "results/quickstart/seed-42" / missing
    hidden = path.with_suffix(".hidden")
    path.rename(hidden)
    try:
        with pytest.raises(UserError, match=f"{re.escape(str(path))} is missing.*{stage}`"):
            load_results(root)
    finally:
        hidden.rename(path)


def test_a_token_table_of_another_run_is_refused(tmp_path):
    make_run(tmp_path, seeds=(42,))
    path = tmp_path / "results/quickstart/seed-42/shared/slot_eval/tokens.parquet"
    make_tokens("causal", 43).to_parquet(path)
    with pytest.raises(UserError, match=r"tokens.parquet has changed since it was made"):
        load_results(tmp_path, seeds=(42,))
    reseal(path)
    with pytest.raises(UserError, match="metrics.json says"):
        load_results(tmp_path, seeds=(42,))


def test_a_token_table_without_its_columns_is_refused(tmp_path):
    path = tmp_path / "tokens.parquet"
    make_tokens("causal", 42).drop(columns="in_own_loss").to_parquet(path)
    with pytest.raises(UserError, match="lacks the columns in_own_loss"):
        read_token_sums(path)


def test_one_failing_seed_fails_the_variant(finished):
    results = load_results(finished[0])
    audits = dict(results.audits)
    audits["causal", 2025] = audits["leaky", 2025]
    mixed = replace(results, audits=audits)
    assert (results.verdict("causal"), mixed.verdict("causal")) == ("PASS", "FAIL")
    assert mixed.checks_with("causal", "FAIL") == ["flip", "lineage"]


def test_the_report_tells_what_it_read_and_wrote(finished):
    read = load_results(finished[0]).files
    assert all(sha256_of(path) == digest for path, digest in read.items())
    assert sum(path.name == "provenance.json" for path in read) == 3 * (6 + 4)
    assert sum(path.name == "manifest.json" for path in read) == 1
    assert sum(path.name == "tokens.parquet" for path in read) == 6
    assert sum(path.match("train/metrics.parquet") for path in read) == 3
    made = {path.name for path in finished[1].rglob("*") if path.is_file()}
    assert {"report.html", "stages.parquet", "summary.parquet", "leak.svg"} <= made


def test_the_settings_are_complete_and_checked():
    assert ReportSettings().model_dump() == {
        "against": None,
        "baseline": None,
        "minimum_gain_nats": 0.005,
        "significance": 0.01,
    }
    for wrong, told in (
        ({"baseline": {"name": "x", "losses": []}}, "report.baseline.losses: found"),
        ({"baseline": {"name": "x", "losses": [math.inf]}}, "report.baseline.losses.0: found inf"),
        ({"baseline": {"name": "x", "losses": [0.0]}}, "report.baseline.losses.0: found 0.0"),
        ({"significance": 1.0}, "report.significance: found 1.0"),
        ({"baselines": None}, "unknown key baselines; did you mean baseline"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            validated(ReportSettings, wrong, "report")
