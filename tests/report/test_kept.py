"""Older reports: which are kept, which go again, and what a page says of them."""

import json

import pytest

from fairway.files import write_json
from fairway.metrics import checked_metrics
from fairway.provenance import write_provenance
from fairway.report.kept import drop_equal, keep, kept_reports
from fairway.report.origin import kept_table

ABOUT = {
    "seeds": [42], "scores": {"causal": 2.0091}, "verdicts": {"causal": "PASS"},
    "settings_sha256": "a" * 64,
}  # fmt: skip


def write(report, **changes):
    """A report's records; returns what it is about."""
    about = ABOUT | changes
    common = {"stage": "report", "seed": None, "folder": None, "seconds": 1.0, "device": "cpu"}
    metrics = checked_metrics(
        common | {"processes": 1, "peak_memory_bytes": 1, "phase_seconds": {}} | about
    )
    report.mkdir(parents=True, exist_ok=True)
    write_json(report / "metrics.json", metrics)
    written = [report / "metrics.json"]
    write_provenance(
        report, stage="report", settings={}, inputs={}, outputs=written, splits_read=[]
    )
    return about


@pytest.fixture
def report(tmp_path):
    return tmp_path / "run/report"


def test_an_unfinished_report_is_not_kept(report):
    assert keep(report) is None
    write(report)
    (report / "provenance.json").unlink()
    assert keep(report) is None and not kept_reports(report)


def test_a_copy_is_named_by_its_content_and_made_once(report):
    write(report)
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    first = keep(report)
    assert keep(report) == first and len(list(report.parent.iterdir())) == 2
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    write(report, seeds=[42, 7])
    assert keep(report) != first


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": [42, 1337]},
        {"scores": {"causal": 2.0092}},
        {"scores": {"causal": 2.0091, "leaky": 2.0}},
        {"verdicts": {"causal": "FAIL"}},
        {"settings_sha256": "b" * 64},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_copy_stays_where_the_new_report_says_anything_else(report, change):
    write(report)
    older = keep(report)
    (one,) = drop_equal(report, write(report, **change))
    assert one.folder == older and one.about["seeds"] == [42]


def test_a_copy_that_says_the_same_goes_again(report):
    about = write(report)
    keep(report)
    assert drop_equal(report, about) == [] and list(report.parent.iterdir()) == [report]


def test_the_latest_is_told_first_and_of_an_earlier_version_the_folder(report):
    for seed in (1, 2):
        write(report, seeds=[seed], scores={"causal": 2.0, "leaky": 1.0}, verdicts={
            "causal": "PASS", "leaky": "FAIL",
        })  # fmt: skip
        keep(report)
    first = next(one for one in kept_reports(report) if one.about["seeds"] == [1])
    values = json.loads((first.folder / "metrics.json").read_text())
    (first.folder / "metrics.json").write_text(
        json.dumps({k: values[k] for k in ("stage", "seed")})
    )
    rows = kept_table(kept_reports(report)).rows
    assert [row[1:] for row in rows] == [["2", "causal 2.0000 PASS, leaky FAIL"], ["", ""]]
    assert rows[1][0] == first.folder.name
