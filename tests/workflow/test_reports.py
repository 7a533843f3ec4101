"""A run's name used again, a seed that fails, and a run made again from what its report says."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest

from checkouts import RESULTS, SEED, TEXT, copy_checkout, snakemake
from fairway.check import check
from fairway.files import sha256_of

pytestmark = pytest.mark.slow


def page_of(project: Path, folder: str = "report") -> str:
    return (project / RESULTS / folder / "report.html").read_text(encoding="utf-8")


def kept(project: Path) -> list[Path]:
    return sorted((project / RESULTS).glob("report-*"))


def test_a_report_that_says_something_else_is_never_replaced(project, monkeypatch):
    first = page_of(project)
    snakemake(project, "--forcerun", "report")
    assert not kept(project)
    done = snakemake(project, "--config", "variants=[causal]")
    (older,) = kept(project)
    assert f"a copy stays in {RESULTS}/{older.name}" in done.stderr
    assert f"an older report is kept in {RESULTS}/{older.name}" in (
        project / RESULTS / "logs/report.log"
    ).read_text(encoding="utf-8")
    assert "leaky" in page_of(project, older.name) and "leaky" in first
    page = page_of(project)
    assert f'<a href="../{older.name}/report.html">' in page and "leaky FAIL" in page
    monkeypatch.chdir(project)
    assert check(Path(RESULTS)) == {}
    snakemake(project)  # as before: its copy goes, and that of the report in between stays
    (other,) = kept(project)
    assert other != older
    assert json.loads((other / "metrics.json").read_text())["verdicts"] == {"causal": "PASS"}
    (other / "stages.parquet").write_bytes(b"damaged")
    assert [path.parent.name for path in check(Path(RESULTS))] == [other.name]


def test_a_seed_that_fails_leaves_the_others_a_report_that_says_so(project):
    in_the_way = project / RESULTS / "seed-8/shared/.checkpoints"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("no folder")
    failed = snakemake(project, "--config", "seeds=[7,8]", check=False)
    assert failed.returncode != 0
    told = "For a report of the other seeds, which says that 8 is missing: the same command with "
    (words,) = re.findall(re.escape(told) + "(.*)", failed.stderr)
    assert words == "--config 'seeds=[7]'"
    snakemake(project, "--config", "seeds=[7]", "--forcerun", "report")
    page = html.unescape(page_of(project))
    assert re.search("<li>Seed 8 is not in these numbers: its train ended with “error: .*”", page)


def test_the_commands_on_the_page_make_the_run_again(finished, tmp_path):
    page = html.unescape(page_of(finished))
    _, _, after = page.partition("<h3>How to reproduce</h3>")
    commands = re.search("<pre><code>(.*?)</code></pre>", after, re.DOTALL)[1].splitlines()
    command = "snakemake --cores 2 --replace-workflow-config --configfile reproduced.yaml"
    assert commands[-1] == command
    clone = copy_checkout(tmp_path / "clone")
    shutil.copytree((finished / TEXT).parent, (clone / TEXT).parent)
    shutil.copy(finished / RESULTS / "report/config.yaml", clone / "reproduced.yaml")
    snakemake(clone, "--replace-workflow-config", config="reproduced.yaml")
    scores = [f"seed-{SEED}/{folder}/slot_eval/tokens.parquet" for folder in ("shared", "leaky")]
    artifacts = [f"seed-{SEED}/{folder}/gptq/artifact.bin" for folder in ("shared", "leaky")]
    for name in (*scores, *artifacts):
        assert sha256_of(finished / RESULTS / name) == sha256_of(clone / RESULTS / name)
