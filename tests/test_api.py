"""The page on the Python API: its code runs as it stands there."""

import re

import pytest

from fairway.audit.result import AuditResult
from tiny import ROOT, TINY_CONFIG

PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def made(tiny_run, tiny_dataset, tmp_path_factory):
    """What the page's names stand for after its code ran, in order, on the tiny run."""
    folder = tmp_path_factory.mktemp("api")
    run = folder / "results/quickstart"
    run.mkdir(parents=True)
    (run / "seed-42").symlink_to(tiny_run / f"seed-{TINY_CONFIG['seeds'][0]}")
    (run / "report").symlink_to(tiny_run / "report")
    (folder / "results/data").mkdir()
    (folder / "results/data/embedded").symlink_to(tiny_dataset.parent)
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in BLOCKS:
            exec(compile(block, "docs/api.md", "exec"), names)
    return names


@pytest.mark.slow
def test_every_example_ran(made):
    assert len(BLOCKS) == 4
    assert {"model", "table", "result", "tables"} <= set(made)


@pytest.mark.slow
def test_an_artifact_is_a_model(made):
    assert made["model"].config.vocab_size == made["tokenizer"].vocab_size()


@pytest.mark.slow
def test_a_text_is_scored_token_by_token(made):
    table = made["table"]
    text = "To be, or not to be: that is the question."
    assert len(table) == len(made["tokenizer"].encode(text))
    assert table["bytes"].sum() == len(text)
    gains = table["gain_slot"] + table["gain_ngram"]
    assert abs((table["nll_before"] - table["nll_after"] - gains).sum()) < 1e-4


@pytest.mark.slow
def test_the_audit_passes_what_is_causal(made):
    result = made["result"]
    assert isinstance(result, AuditResult)
    assert result.names("FAIL") == []
    assert {"flip", "self_influence", "normalization"} <= set(result.names("PASS"))


@pytest.mark.slow
def test_a_runs_tables_are_read(made):
    tables = made["tables"]
    assert set(tables.stages["variant"]) == {"causal"}
    assert len(made["scores"]) == 1
    assert 0 < made["scores"]["value"].item() < 8


def test_the_pages_imports_are_those_of_its_table():
    imported = set(re.findall(r"^from (fairway\.\S+) import", "".join(BLOCKS), re.MULTILINE))
    listed = {name.rpartition(".")[0] for name in re.findall(r"`(fairway\.[\w.]+)`", PAGE)}
    assert imported <= listed
