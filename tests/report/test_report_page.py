"""report.html: what it says, where, and that it needs nothing but itself."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from fairway.report.content import byte_notes
from fairway.report.format import compact, joined, probability, signed
from synthetic_run import (
    FAILING,
    QUICKSTART,
    SEEDS,
    load_results,
    make_report,
    make_run,
    make_tokens,
    reseal,
)


def test_the_page_says_what_a_pass_means(finished):
    text = (finished[1] / "report.html").read_text(encoding="utf-8")
    assert text.count("12 replacements in an excerpt of 4,000 targets") == len(QUICKSTART)


def test_what_the_text_is_too_small_for_stands_above_the_score(finished, tmp_path):
    assert '<ul class="cautions">' not in (finished[1] / "report.html").read_text(encoding="utf-8")
    make_run(tmp_path, (42,))
    warning = "The validation text has 3 documents: that is few."
    manifest = tmp_path / "results/data/embedded/manifest.json"
    metrics = tmp_path / "results/quickstart/seed-42/leaky/slot_eval/metrics.json"
    for path, change in ((manifest, {"warnings": [warning]}), (metrics, {"windows": 1})):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    reseal(metrics)
    page = (make_report(tmp_path, (42,), figures=False) / "report.html").read_text()
    above, _, _ = page.partition('<table class="headline">')
    assert above.count(f"<li>{warning}</li>") == 1  # of both variants
    assert "leaky was scored in 1 window: " in above and "causal was scored in" not in above


def test_overlap_and_original_bytes_stand_beside_the_score(finished, tmp_path):
    page = (finished[1] / "report.html").read_text(encoding="utf-8")
    assert "0 of 24 validation documents occur in the training text (0 exactly, 0 nearly)" in page
    assert "The text had 36,090 bytes before normalization" in page
    make_run(tmp_path, (42,))
    manifest = tmp_path / "results/data/embedded/manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"overlap": None, "original": None}))
    for path in (tmp_path / "results/quickstart/seed-42").glob("*/*/metrics.json"):
        reseal(path)
    page = (make_report(tmp_path, (42,), figures=False) / "report.html").read_text()
    assert "<dt>Overlap</dt><dd>not checked</dd>" in page
    assert "How many bytes the text had before normalization is not known." in page


def test_text_that_tokens_decode_to_exactly(finished):
    results = load_results(finished[0])
    nothing = {"lost_bytes": 0, "added_bytes": 0, "changed_documents": 0}
    exact = {
        variant: manifest.model_copy(
            update={
                "original": manifest.original.model_copy(
                    update={"validation": manifest.original.validation.model_copy(update=nothing)}
                )
            }
        )
        for variant, manifest in results.manifests.items()
    }
    (note,) = byte_notes(replace(results, manifests=exact))
    assert note == "Tokens decode to the text exactly as it was, all 36,090 bytes of it."


class PageReader(HTMLParser):
    """Collects text with the elements that are open around it, and checks that they nest."""

    VOID = ("meta", "img", "br", "wbr", "link")

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
    rows = summary[(summary["folder"] == "leaky") & (summary["metric"] == "val_bpb")]
    final = rows[rows["stage"] == "slot_eval"]["value"]
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
    assert len(with_score) == 3  # the headline, of its stage, of its last adapter
    assert all("PASS" in row for row in with_score)


def test_the_page_needs_nothing_but_itself_and_leads_to_what_it_is_made_from(finished, page):
    tags = {tag for tag, _ in page.attributes}
    assert not tags & {"script", "link", "iframe"}
    images = [attributes for tag, attributes in page.attributes if tag == "img"]
    assert len(images) == 7
    for image in images:
        assert image["src"].startswith("data:image/svg+xml;base64,") and image["alt"]
    links = [attributes["href"] for tag, attributes in page.attributes if tag == "a"]
    anchors = {attributes.get("id") for _, attributes in page.attributes}
    assert all(link[1:] in anchors for link in links if link.startswith("#"))
    files = {link for link in links if not link.startswith("#")}
    assert all((finished[1] / link).is_file() for link in files)
    names = {link.rpartition("/")[2] for link in files}
    assert names >= {"audit.json", "provenance.json", "metrics.json", "summary.md", "config.yaml"}


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes(finished):
    root, first = finished
    kept = {path.name: path.read_bytes() for path in (first / "figures").iterdir()}
    page = (first / "report.html").read_bytes()
    again = make_report(root)
    assert page == (again / "report.html").read_bytes()
    assert kept == {path.name: path.read_bytes() for path in (again / "figures").iterdir()}


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


def test_the_least_p_that_a_method_can_give_is_a_bound():
    least = 1 / 10_001
    assert (probability(least, least), probability(2 * least, least)) == ("≤ 0.0001", "0.0002")


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


def luminance(color):
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_has_enough_contrast_in_light_and_dark(finished):
    """WCAG's 4.5, of failed and muted numbers too, on each ground that they stand on."""
    style = (finished[1] / "report.html").read_text(encoding="utf-8").partition("</style>")[0]
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root {(.*?)}", style)
    )
    texts = set(re.findall(r"(?<![a-z-])color: var\(--([a-z-]+)\)", style))
    assert texts >= {"ink", "muted", "pass", "fail", "link"}
    assert not re.findall(r"(?<![a-z-])color: (?!var|inherit)", style)
    assert re.search(r"\ns { color: var\(--muted\)", style)
    for colors in (light, dark):
        grounds = {name: ("paper", "faint") for name in texts}
        grounds |= {name: ("paper", "faint", f"{name}-back") for name in ("pass", "fail")}
        grounds["muted"] = ("paper", "faint", "open-back")
        for name, others in grounds.items():
            for other in others:
                pair = sorted(luminance(colors[one]) for one in (name, other))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (name, other)
