"""`fairway compare`: two runs or two variants, what differs between them, and what it refuses."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.cli import main
from fairway.errors import UserError
from fairway.report.compare import find_side, read_sides
from fairway.report.comparison import comparison
from fairway.report.configuration import ABSENT, changed_keys
from fairway.report.statistics import document_test, paired_test, welch_test
from provenance_chain import edit
from synthetic_run import OTHER_TEXT, TWO_TRAININGS, finish, make_run, make_tokens

SEEDS = (1337, 42)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders with a `results` each: three variants, two of them on one text; two trainings."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    finish(make_run(first, SEEDS, OTHER_TEXT), SEEDS, OTHER_TEXT)
    finish(make_run(second, (42, 7), TWO_TRAININGS), (42, 7), TWO_TRAININGS)
    return first, second


@pytest.fixture
def compare(runs, monkeypatch, capsys):
    """Runs the command in the first folder; returns exit status and what it printed."""
    monkeypatch.chdir(runs[0])

    def call(*arguments: object) -> tuple[int, str]:
        status = main(["compare", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


def tables_of(first: Path | str, second: Path | str, seeds=SEEDS) -> dict[str, list[list[str]]]:
    tables = comparison(read_sides([find_side(str(first)), find_side(str(second))], seeds))
    return {table.title: table.rows for table in tables}


@pytest.fixture(scope="module")
def tables(runs):
    """Of the variants `causal` and `leaky`."""
    return tables_of(*(runs[0] / "results/quickstart" / name for name in ("causal", "leaky")))


def number(cell: str) -> float:
    return float(cell.replace("−", "-"))


def by_document(variant: str, seed: int, column: str) -> np.ndarray:
    return make_tokens(variant, seed).groupby("document")[column].sum().to_numpy()


def test_two_variants_of_a_run_are_tested_by_the_reports_statistics(tables):
    nats = {
        (name, seed): by_document(name, seed, "nll_after")
        for name in ("causal", "leaky")
        for seed in SEEDS
    }
    sizes = by_document("causal", 42, "bytes")
    for row, seeds in zip(tables["Difference over the text"], ([1337], [42], SEEDS), strict=False):
        ours, theirs = (
            np.mean([nats[name, seed] for seed in seeds], axis=0) for name in ("leaky", "causal")
        )
        found = document_test(ours, theirs, sizes)
        assert row[0] == (f"seed {seeds[0]}" if len(seeds) == 1 else "all seeds")
        assert [number(cell) for cell in row[1:3]] == pytest.approx(
            [found.estimate, found.standard_error], abs=6e-5
        )
        assert row[-1] == "B failed the audit"
    leaky, causal = (
        [nats[name, seed].sum() / math.log(2) / sizes.sum() for seed in SEEDS]
        for name in ("leaky", "causal")
    )
    ((_, _, welch_t, _, _, paired_t, _, _, _),) = tables["Difference over the seeds"]
    assert number(welch_t) == pytest.approx(welch_test(leaky, causal).t, abs=6e-3)
    assert number(paired_t) == pytest.approx(paired_test(leaky, causal).t, abs=6e-3)


def test_a_score_stands_beside_its_verdict_and_a_failing_one_is_called_invalid(compare):
    status, text = compare("quickstart/causal", "quickstart/leaky")
    assert status == 0
    assert re.search(r"^A +PASS +\d\.\d{4} ± \d\.\d{4} .* 2$", text, re.MULTILINE)
    assert re.search(r"^B +FAIL .* 2  not a valid score$", text, re.MULTILINE)


def test_it_says_which_stages_are_shared_and_why_the_others_are_not(tables):
    rows = {row[0]: row for row in tables["Stages"]}
    assert rows["Training, last step"][3:] == ["0.0000", "one run", "", ""]
    assert rows["Tokens and splits"][4] == "same bytes"
    assert rows["Test-time training (TTT)"][4] == "no"
    assert rows["Sliding evaluation with adapters"][4:] == [
        "no", "settings, gptq", "B saw validation text",
    ]  # fmt: skip


def test_it_lists_each_setting_that_differs(tables):
    rows = tables["What differs"]
    assert rows == [
        ["evaluation.adapters", '["lora", "slot"]', '["slot"]'],
        ["evaluation.adapters.slot.scope", "window", "batch"],
    ]


def test_it_counts_seconds_and_bytes(tables, runs):
    assert tables["Seconds and memory"][-1][:4] == ["All stages", "96.0", "96.0", "+0.0"]
    artifact = tables["Budgets"][0]
    found = [int(cell.removesuffix(" bytes").replace(",", "")) for cell in artifact[1:3]]
    sizes = [
        [
            (runs[0] / f"results/quickstart/seed-{seed}/{folder}/gptq/metrics.json").read_text()
            for seed in SEEDS
        ]
        for folder in ("shared", "leaky")
    ]
    assert found == [
        max(int(re.search(r'"total_bytes": (\d+)', one)[1]) for one in side) for side in sizes
    ]


def test_two_runs_are_compared_over_the_seeds_that_both_have(compare, runs):
    status, text = compare("quickstart/causal", runs[1] / "results/quickstart/fast")
    assert status == 0
    assert "\nSeeds  42\n" in text
    assert "  one run  " not in text and "without adapters" in text


def test_a_copy_has_the_same_bytes_and_settings(compare, runs, tmp_path):
    shutil.copytree(runs[0] / "results/quickstart", tmp_path / "copy")
    tables = tables_of("quickstart/causal", tmp_path / "copy/causal")
    assert {row[4] for row in tables["Stages"]} == {"same bytes"}
    assert {number(row[1]) for row in tables["Difference over the text"]} == {0.0}
    assert tables["What differs"] == []


def test_another_commit_and_version_are_told(compare, runs, tmp_path):
    copy = shutil.copytree(runs[0] / "results/quickstart", tmp_path / "copy")
    for path in copy.glob("seed-*/shared/audit/provenance.json"):
        edit(path, git_commit="b" * 40, versions={"torch": "2.13.0"})
    tables = tables_of("quickstart/causal", copy / "causal")
    assert ["version.torch", "2.11.0", "2.11.0, 2.13.0"] in tables["What differs"]
    assert tables["Stages"][-1][4:6] == ["same bytes", "commit, versions"]


def test_the_same_text_in_other_tokens_is_compared_by_the_byte(compare):
    sides = [find_side("quickstart/causal"), find_side("quickstart/leaky")]
    results = read_sides(sides, SEEDS)
    cut = {
        key: replace(
            sums, by_document=sums.by_document.assign(tokens=sums.by_document["tokens"] + 1)
        )
        for key, sums in results.tokens.items()
        if key[0] == "B"
    }
    whole, other = comparison(results), comparison(replace(results, tokens=results.tokens | cut))
    assert other[1].rows == whole[1].rows
    assert other[2].rows[0][1] == "–" and other[2].rows[0][2:] == whole[2].rows[0][2:]


def test_a_page_has_what_the_terminal_has(compare, tables, tmp_path):
    page = tmp_path / "comparison.html"
    status, text = compare("quickstart/causal", "quickstart/leaky", "--html", page)
    assert status == 0 and str(page) in text
    html = page.read_text(encoding="utf-8").replace("<wbr>", "")
    for rows in tables.values():
        for cell in (cell for row in rows for cell in row):
            assert cell.replace('"', "&#34;") in html
    assert '<span class="badge fail">' in html


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["quickstart/causal", "quickstrat"], "no run 'quickstrat'.*did you mean quickstart"),
        (["quickstart", "quickstart/leaky"], "has 3 variants: name one of causal, german, leaky"),
        (["quickstart/causal", "quickstart/leeky"], "no variant 'leeky'.*did you mean leaky"),
        (["quickstart/causal", "quickstart/german"], "have not scored the same documents: A has"),
        (["quickstart/causal", "quickstart/leaky", "--seeds", "7"], "seed 7 of .* not finished"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(compare, arguments, line):
    status, text = compare(*arguments)
    assert status == 2
    assert text.startswith("fairway: ") and text.count("\n") == 1
    assert re.search(line, text)


def test_runs_without_a_common_seed_and_unfinished_runs_are_refused(compare, runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs[0] / "results/quickstart", copy)
    report = shutil.move(copy / "report", tmp_path / "report")
    assert "report stage; run `snakemake" in compare("quickstart/causal", copy / "causal")[1]
    shutil.move(report, copy / "report")
    shutil.rmtree(copy / "seed-42/shared/gptq")
    assert "copy/seed-42/shared/gptq" in compare("quickstart/causal", copy / "causal")[1]
    other = runs[1] / "results/quickstart/fast"
    assert (
        "seed 7 of results/quickstart/causal is not finished"
        in (compare("quickstart/causal", other, "--seeds", 7)[1])
    )
    alone = make_run(tmp_path / "alone", (8,))
    path = finish(alone, (8,)) / "causal"
    assert "no seed is finished on both sides" in compare("quickstart/causal", path)[1]


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(PLAIN, PLAIN)
def test_keys_are_changed_where_and_only_where_values_differ(one, other):
    assert not list(changed_keys(one, one))
    assert bool(list(changed_keys(one, other))) == (one != other)
    mirrored = [(path, b, a) for path, a, b in changed_keys(one, other)]
    assert sorted(map(repr, mirrored)) == sorted(map(repr, changed_keys(other, one)))


def test_a_named_entry_is_compared_by_its_name():
    before = {"adapters": [{"lora": {"rank": 4}}, {"slot": {"l2": 1}}], "lanes": 8}
    after = {"adapters": [{"slot": {"l2": 2}}, {"lora": {"rank": 4}}]}
    assert list(changed_keys(before, after, "evaluation")) == [
        ("evaluation.adapters", ["lora", "slot"], ["slot", "lora"]),
        ("evaluation.adapters.slot.l2", 1, 2),
        ("evaluation.lanes", 8, ABSENT),
    ]


def test_a_side_in_error_names_what_there_is(runs, monkeypatch):
    monkeypatch.chdir(runs[1])
    with pytest.raises(UserError, match="under results, which has quickstart"):
        find_side("nothing/here")
