"""The report, made from a synthetic run whose every number is known."""

import json
import math
import re
import runpy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fairway.errors import UserError
from fairway.report import token_sums
from fairway.report.results import read_results
from fairway.report.statistics import describe, welch_gain
from fairway.report.wording import probability, signed

SEEDS = (1337, 42, 2025)
VARIANTS = ("causal", "published")
SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "workflow/scripts/report.py"))
SETTINGS = {
    "report": {
        "baseline": {"name": "last record", "losses": [2.5512, 2.5498, 2.5520]},
        "minimum_gain_nats": 0.005,
        "significance": 0.01,
    },
    "budgets": {"artifact_bytes": 16_000_000, "training_seconds": 600, "evaluation_seconds": 600},
}
PASSING = {
    "flip": "12 tokens were replaced one at a time, and no earlier distribution changed.",
    "lineage": "The artifact's ancestry holds training text only.",
    "coverage": "Every target was scored exactly once, in order: 12,000 (whole evaluation).",
}
FAILING = {
    "flip": "9 of 12 tokens, when replaced, changed the distribution of an earlier target.",
    "lineage": "The artifact's ancestry holds validation text: ttt trained on val.",
}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_tokens(variant, seed, rows=12_000, documents=24):
    """A token table in which `published` gains on the targets in their own loss."""
    generator = np.random.default_rng(seed)
    position = np.arange(1, rows + 1)
    text = np.random.default_rng(7)  # the same text and difficulty for every seed and variant
    document = np.searchsorted(
        np.sort(text.choice(np.arange(2, rows), documents - 1, replace=False)), position, "right"
    )
    difficulty = text.gamma(2.0, 1.3, rows)
    before = difficulty + generator.normal(0, 0.3, rows) + 0.002 * generator.normal()
    own = np.zeros(rows, dtype=bool)
    gain = generator.normal(0.002, 0.05, rows)
    if variant == "published":
        own = (position // 32) % 32 != 0
        gain = np.where(own, generator.normal(0.22, 0.3, rows), generator.normal(-0.33, 0.3, rows))
        before = before - 0.05
    byte_counts = text.integers(1, 6, rows)
    return pd.DataFrame(
        {
            "position": position.astype(np.int64),
            "document": document.astype(np.int32),
            "token": text.integers(4, 1024, rows).astype(np.int32),
            "window": (position // 32).astype(np.int32),
            "lane": np.zeros(rows, np.int16),
            "nll_before": before,
            "nll_after": before - gain,
            "bytes": byte_counts.astype(np.int16),
            "in_own_loss": own,
        }
    )


def common_metrics(stage, seed, variant, loss, seconds, bytes_per_token=3.0):
    return {
        "stage": stage,
        "seed": seed,
        "variant": variant,
        "val_loss": loss,
        "val_bpb": loss / math.log(2) / bytes_per_token,
        "tokens": 12_000,
        "bytes": 36_000,
        "seconds": seconds,
        "training_seconds": seconds * 0.8 if stage in ("train", "ttt") else 0.0,
        "evaluation_seconds": seconds * 0.9 if stage == "slot" else 1.0,
        "device": "cpu (x86_64, 2 threads)",
        "attention_backend": "sdpa",
        "peak_memory_bytes": 900_000_000,
        "processes": 1,
    }


def write_stage(folder, metrics, splits, settings):
    write_json(folder / "metrics.json", metrics)
    versions = {"python": "3.11.9", "torch": "2.11.0", "numpy": "2.1.0"}
    provenance = {"settings": settings, "splits": splits, "git_commit": "a" * 40}
    write_json(folder / "provenance.json", provenance | {"versions": versions})


def write_shared(base, seed, generator):
    for stage, loss, seconds in (("train", 2.72, 34.0), ("ema", 2.66, 4.0)):
        metrics = common_metrics(stage, seed, None, loss + generator.normal(0, 0.004), seconds)
        write_stage(base / stage, metrics, ["train"], {"train": {"steps": 300}})
    step = np.arange(0, 300, 2)
    loss = 2.7 + 4.2 * np.exp(-step / 40) + generator.normal(0, 0.05, len(step))
    curve = {
        "step": step,
        "loss": loss,
        "lr_scale": np.clip((300 - step) / 150, 0, 1),
        "seconds": step * 0.1,
        "tokens": step * 4096,
    }
    pd.DataFrame(curve).to_parquet(base / "train" / "metrics.parquet")


def write_variant(base, variant, seed, generator):
    leaks = variant == "published"
    splits = ["train", "val"] if leaks else ["train"]
    noise = generator.normal(0, 0.003, 2)
    losses = {"ttt": 2.60 - 0.1 * leaks + noise[0], "gptq": 2.63 - 0.1 * leaks + noise[1]}
    for stage, loss in losses.items():
        metrics = common_metrics(stage, seed, variant, loss, 9.0 + generator.random())
        if stage == "gptq":
            metrics["artifact_bytes"] = 512_345 + int(generator.integers(0, 4000))
        write_stage(base / stage, metrics, splits, {stage: {"epochs": 2}})
    tokens = make_tokens(variant, seed)
    (base / "slot").mkdir(parents=True)
    tokens.to_parquet(base / "slot" / "tokens.parquet", row_group_size=5000)
    loss = tokens["nll_after"].mean()
    metrics = common_metrics("slot", seed, variant, loss, 21.0)
    metrics["val_bpb"] = tokens["nll_after"].sum() / math.log(2) / tokens["bytes"].sum()
    write_stage(base / "slot", metrics, splits, {"slot": {"scope": "batch" if leaks else "window"}})
    write_audit(base / "audit", variant, seed, leaks, splits)


def write_audit(folder, variant, seed, leaks, splits):
    checks = []
    for name, sentence in PASSING.items():
        fails = leaks and name in FAILING
        sentence = FAILING[name] if fails else sentence
        verdict = "FAIL" if fails else "PASS"
        checks.append({"name": name, "verdict": verdict, "sentence": sentence, "evidence": {}})
    reason = "No model to draw text from was given."
    checks.append({"name": "null", "verdict": "NOT RUN", "sentence": reason, "evidence": {}})
    record = {"checks": checks, "track": "adaptive", "detectable_leak_rate_99": 0.206}
    write_json(folder / "audit.json", record | {"verdict": "FAIL" if leaks else "PASS"})
    distance = np.arange(4000)
    changed = np.where((distance < 1024) & leaks, 10 - distance // 103, 0)
    reach = {"distance_tokens": distance, "pairs": 12, "changed": changed}
    pd.DataFrame(reach | {"largest_change_nats": changed * 0.1}).to_parquet(
        folder / "reach.parquet"
    )
    metrics = {"stage": "audit", "seed": seed, "variant": variant, "seconds": 14.0}
    write_stage(folder, metrics | {"device": "cpu (x86_64, 2 threads)"}, splits, {})


def make_run(root, seeds=SEEDS):
    """A finished run of `seeds` and both variants under `root`/results."""
    for seed in seeds:
        generator = np.random.default_rng(seed)
        base = root / "results" / "quickstart" / f"seed-{seed}"
        write_shared(base, seed, generator)
        for variant in VARIANTS:
            write_variant(base / variant, variant, seed, generator)
    write_json(root / "results/data/embedded/metrics.json", {"stage": "tokenize", "seconds": 3.0})
    return root


def run_script(root, seeds=SEEDS, settings=SETTINGS, output="report"):
    folder = root / "results" / "quickstart"
    arguments = ["--settings", json.dumps(settings), "--run-folder", str(folder)]
    arguments += ["--data-folder", str(root / "results/data/embedded")]
    arguments += ["--seeds", *map(str, seeds), "--variants", *VARIANTS]
    SCRIPT["main"]([*arguments, "--output", str(folder / output)])
    return folder / output


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and its report's folder."""
    root = make_run(tmp_path_factory.mktemp("run"))
    return root, run_script(root)


def load_results(root, seeds=SEEDS):
    folder = root / "results"
    return read_results(
        folder / "quickstart", folder / "data/embedded", list(seeds), list(VARIANTS)
    )


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


def test_comparisons_parquet_pairs_the_documents(finished):
    rows = pd.read_parquet(finished[1] / "comparisons.parquet").set_index(["name", "reference"])
    assert set(rows.index) == {
        ("causal slot", "causal sliding"),
        ("published slot", "published sliding"),
        ("published slot", "causal slot"),
    }
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
    early = table[table["position"] - begins < 16]
    first = sums.by_document_position.loc[0]
    assert first["tokens"] == len(early)
    assert first["nats_before"] == pytest.approx(early["nll_before"].sum())
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
    [(0.0123, "0.012"), (3.2e-7, "3.2 × 10^−7"), (0.9996, "> 0.99"), (math.nan, "–")],
)
def test_a_p_value_has_two_significant_digits(value, text):
    assert probability(value) == text


def test_a_tiny_difference_has_no_sign():
    assert (signed(-0.00001), signed(-0.0021), signed(0.3)) == ("0.0000", "−0.0021", "+0.3000")
