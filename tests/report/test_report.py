"""The report, made from a synthetic run whose every number is known."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from fairway.errors import UserError
from fairway.report import token_sums
from fairway.report.format import compact, joined, probability, signed
from fairway.report.statistics import describe, welch_gain
from fairway.report.tables import Budgets, batch_reach_tokens, budgets_table
from synthetic_run import (
    FAILING,
    SEEDS,
    SETTINGS,
    VARIANTS,
    load_results,
    make_run,
    make_tokens,
    run_script,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and its report's folder."""
    root = make_run(tmp_path_factory.mktemp("run"))
    return root, run_script(root)


def test_stages_parquet_is_tidy(finished):
    stages = pd.read_parquet(finished[1] / "stages.parquet")
    columns = ["run", "variant", "seed", "stage", "metric", "value", "unit"]
    assert list(stages.columns) == columns
    assert not stages.duplicated(columns[:5]).any()
    assert set(stages["run"]) == {"quickstart"}
    shared = stages[stages["variant"] == "shared"]
    assert set(shared["stage"]) == {"train", "ema"}
    score = stages[stages["metric"] == "val_bpb"]
    assert score["unit"].unique().tolist() == ["bits/byte"]
    assert len(score) == 3 * (2 + 2 * 4)
    units = dict(zip(stages["metric"], stages["unit"], strict=True))
    assert units["training_seconds"] == "s" and units["peak_memory_bytes"] == "bytes"
    assert units["processes"] == "1" and units["val_loss"] == "nats/token"


def test_sliding_is_the_score_before_adaptation(finished):
    stages = pd.read_parquet(finished[1] / "stages.parquet").set_index(
        ["variant", "seed", "stage", "metric"]
    )["value"]
    tokens = make_tokens("causal", 42)
    bpb = tokens["nll_before"].sum() / math.log(2) / tokens["bytes"].sum()
    assert stages["causal", 42, "sliding", "val_bpb"] == pytest.approx(bpb)
    assert stages["causal", 42, "slot", "val_bpb"] < bpb


def test_summary_parquet_holds_the_statistics_and_the_verdict(finished):
    summary = pd.read_parquet(finished[1] / "summary.parquet")
    losses = [make_tokens("causal", seed)["nll_after"].mean() for seed in SEEDS]
    final = summary[(summary["stage"] == "slot") & (summary["metric"] == "val_loss")]
    row = final[final["variant"] == "causal"].iloc[0]
    expected = describe(losses)
    for name in ("n", "mean", "std", "standard_error", "ci_low", "ci_high"):
        assert row[name] == pytest.approx(getattr(expected, name))
    test = welch_gain(losses, SETTINGS["report"]["baseline"]["losses"], 0.005)
    assert row["difference_nats"] == pytest.approx(test.difference)
    assert row["welch_p"] == pytest.approx(test.p)
    assert summary.drop(final.index)["welch_p"].isna().all()
    verdicts = summary.groupby("variant")["verdict"].agg(lambda column: set(column.dropna()))
    assert verdicts.to_dict() == {"shared": set(), "causal": {"PASS"}, "published": {"FAIL"}}


def test_the_budget_counts_the_code_with_the_artifact(finished):
    limits = Budgets(artifact_bytes=600_000, training_seconds=600, evaluation_seconds=600)
    table = budgets_table(load_results(finished[0]), limits)
    artifact = table[table["budget"] == "artifact_bytes"]
    assert (artifact["used"] > 123_456 + 512_345 - 1).all() and (artifact["limit"] == 600_000).all()


def test_the_reach_of_a_batch_is_that_of_the_slices_before_its_last(finished):
    results = load_results(finished[0])
    assert batch_reach_tokens(results, "causal") is None
    assert batch_reach_tokens(results, "published") == 31 * 32
    key = ("published", results.seeds[0], "slot")
    older = {"slot": {"scope": "batch", "batch_windows": 8, "stride_tokens": 64}}
    provenance = results.provenance | {key: results.provenance[key] | {"settings": older}}
    assert batch_reach_tokens(replace(results, provenance=provenance), "published") == 7 * 64
    without_slot = {"evaluation": {"adapters": ["lora", "ngram"], "stride_tokens": 64}, "lora": {}}
    provenance[key] = provenance[key] | {"settings": without_slot}
    assert batch_reach_tokens(replace(results, provenance=provenance), "published") is None


def test_the_page_says_what_a_pass_means(finished):
    text = (finished[1] / "report.html").read_text(encoding="utf-8")
    assert text.count("12 replacements in an excerpt of 4,000 targets") == len(VARIANTS)


def test_comparisons_parquet_pairs_the_documents(finished):
    rows = pd.read_parquet(finished[1] / "comparisons.parquet").set_index(["name", "reference"])
    assert set(rows.index) == {
        ("causal slot", "causal sliding"),
        ("published slot", "published sliding"),
        ("published slot", "causal slot"),
    }
    assert len(rows) == len(VARIANTS) * (len(SEEDS) + 1) + 1
    score = {}
    for variant in VARIANTS:
        tables = [make_tokens(variant, seed) for seed in SEEDS]
        nats = np.mean([table["nll_after"].sum() for table in tables])
        score[variant] = nats / math.log(2) / tables[0]["bytes"].sum()
    leak = rows.loc[("published slot", "causal slot")]
    assert leak["estimate"] == pytest.approx(score["published"] - score["causal"])
    assert leak["documents"] == 24 and leak["ci_high"] < 0


def test_one_seed_and_no_baseline_are_null_not_a_crash(tmp_path):
    make_run(tmp_path, seeds=(42,))
    settings = SETTINGS | {"report": SETTINGS["report"] | {"baseline": None}}
    folder = run_script(tmp_path, seeds=(42,), settings=settings)
    summary = pd.read_parquet(folder / "summary.parquet")
    assert (summary["n"] == 1).all()
    empty = ["std", "standard_error", "ci_low", "ci_high", "difference_nats", "welch_t", "welch_p"]
    assert summary[empty].isna().all(axis=None)
    page = (folder / "report.html").read_text()
    assert "No baseline is configured" in page
    assert ">nan" not in page.lower()


@pytest.mark.parametrize("batch_rows", [997, 12_000])
def test_token_sums_do_not_depend_on_the_batches(tmp_path, monkeypatch, batch_rows):
    table = make_tokens("published", 42)
    path = tmp_path / "tokens.parquet"
    table.to_parquet(path)
    monkeypatch.setattr(token_sums, "BATCH_ROWS", batch_rows)
    sums = token_sums.read_token_sums(path)
    by_document = table.groupby("document")["nll_after"].sum()
    np.testing.assert_allclose(sums.by_document["nats_after"], by_document)
    begins = table.groupby("document")["position"].transform("min").where(table["document"] > 0, 0)
    early = table[table["position"] - begins < 64]
    first = sums.by_document_position.loc[0]
    assert first["tokens"] == len(early)
    assert first["nats_before"] == pytest.approx(early["nll_before"].sum())
    assert first["gain_slot"] == pytest.approx(early["gain_slot"].sum())
    assert len(sums.by_stream_part) == token_sums.STREAM_PARTS
    assert set(sums.by_stream_part["tokens"]) == {600}
    own = table[table["in_own_loss"]]
    gain = (own["nll_before"] - own["nll_after"]).mean()
    assert token_sums.gain_nats(sums.by_own_loss)[True] == pytest.approx(gain)


class PageReader(HTMLParser):
    """Collects text with the elements that are open around it, and checks that they nest."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((data, tuple(self.open)))


@pytest.fixture(scope="module")
def page(finished):
    reader = PageReader()
    reader.feed((finished[1] / "report.html").read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def test_a_failed_score_is_struck_everywhere_it_appears(finished, page):
    summary = pd.read_parquet(finished[1] / "stages.parquet")
    rows = summary[(summary["variant"] == "published") & (summary["metric"] == "val_bpb")]
    final = rows[rows["stage"] == "slot"]["value"]
    numbers = {f"{value:.4f}" for value in [*rows["value"], final.mean()]}
    seen = [(text, around) for text, around in page.texts for one in numbers if one in text]
    assert len(seen) >= len(numbers)
    assert all("s" in around for _, around in seen)
    assert any("not a valid score" in text for text, _ in page.texts)
    assert all(sentence in "".join(text for text, _ in page.texts) for sentence in FAILING.values())


def test_a_valid_score_stands_beside_its_verdict(finished):
    text = (finished[1] / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr.*?</tr>", text, flags=re.DOTALL)
    losses = [make_tokens("causal", seed) for seed in SEEDS]
    values = [one["nll_after"].sum() / math.log(2) / one["bytes"].sum() for one in losses]
    with_score = [row for row in rows if f"{np.mean(values):.4f}" in row]
    assert len(with_score) == 2
    assert all("PASS" in row for row in with_score)


def test_the_page_needs_nothing_but_itself(page):
    tags = {tag for tag, _ in page.attributes}
    assert not tags & {"script", "link", "iframe"}
    images = [attributes for tag, attributes in page.attributes if tag == "img"]
    assert len(images) == 6
    for image in images:
        assert image["src"].startswith("data:image/svg+xml;base64,") and image["alt"]
    links = [attributes["href"] for tag, attributes in page.attributes if tag == "a"]
    anchors = {attributes.get("id") for _, attributes in page.attributes}
    assert all(link.startswith("#") and link[1:] in anchors for link in links)


def test_the_same_results_give_the_same_bytes(finished):
    root, first = finished
    kept = {path.name: path.read_bytes() for path in (first / "figures").iterdir()}
    page = (first / "report.html").read_bytes()
    again = run_script(root)
    assert page == (again / "report.html").read_bytes()
    assert kept == {path.name: path.read_bytes() for path in (again / "figures").iterdir()}


@pytest.mark.parametrize(
    ("missing", "stage"),
    [
        ("quickstart/seed-42/train/metrics.json", "train"),
        ("quickstart/seed-42/train/metrics.parquet", "train"),
        ("quickstart/seed-42/causal/gptq/provenance.json", "gptq"),
        ("quickstart/seed-42/causal/slot/tokens.parquet", "slot_eval"),
        ("quickstart/seed-42/published/audit/audit.json", "audit"),
        ("quickstart/seed-42/published/audit/reach.parquet", "audit"),
        ("data/embedded/metrics.json", "tokenize"),
    ],
)
def test_a_missing_file_names_itself_and_its_stage(finished, missing, stage):
    root = finished[0]
    path = root / "results" / missing
    hidden = path.with_suffix(".hidden")
    path.rename(hidden)
    try:
        with pytest.raises(UserError, match=f"{re.escape(str(path))} is missing.*{stage}`"):
            load_results(root)
    finally:
        hidden.rename(path)


def test_a_token_table_of_another_run_is_refused(tmp_path):
    make_run(tmp_path, seeds=(42,))
    slot = tmp_path / "results/quickstart/seed-42/causal/slot"
    make_tokens("causal", 43).to_parquet(slot / "tokens.parquet")
    with pytest.raises(UserError, match="metrics.json says"):
        load_results(tmp_path, seeds=(42,))


def test_a_token_table_without_its_columns_is_refused(tmp_path):
    path = tmp_path / "tokens.parquet"
    make_tokens("causal", 42).drop(columns="in_own_loss").to_parquet(path)
    with pytest.raises(UserError, match="lacks the columns in_own_loss"):
        token_sums.read_token_sums(path)


def test_one_failing_seed_fails_the_variant(finished):
    results = load_results(finished[0])
    audits = dict(results.audits)
    audits["causal", 2025] = audits["published", 2025]
    mixed = replace(results, audits=audits)
    assert (results.verdict("causal"), mixed.verdict("causal")) == ("PASS", "FAIL")
    assert mixed.checks_with("causal", "FAIL") == ["flip", "lineage"]


def test_the_reports_provenance_names_what_it_read(finished):
    record = json.loads((finished[1] / "provenance.json").read_text())
    assert sum(path.endswith("tokens.parquet") for path in record["inputs"]) == 6
    assert {"report.html", "stages.parquet", "summary.parquet"} <= set(record["outputs"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123, "0.012"),
        (1 / 10_001, "0.0001"),
        (3.2e-7, "3.2 × 10^−7"),
        (0.9996, "> 0.99"),
        (math.nan, "–"),
    ],
)
def test_a_p_value_has_two_significant_digits(value, text):
    assert probability(value) == text


@pytest.mark.parametrize(
    ("value", "kilo", "text"),
    [(950, 1000, "950"), (1234, 1000, "1.2k"), (62_021_846, 1000, "62M"), (2048, 1024, "2k")],
)
def test_counts_on_an_axis_are_short(value, kilo, text):
    assert compact(value, kilo) == text


def test_words_are_joined():
    lists = ([], ["a"], ["a", "b"], ["a", "b", "c"])
    assert [joined(one) for one in lists] == ["", "a", "a and b", "a, b and c"]


def test_a_tiny_difference_has_no_sign():
    assert (signed(-0.00001), signed(-0.0021), signed(0.3)) == ("0.0000", "−0.0021", "+0.3000")
