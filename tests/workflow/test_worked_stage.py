"""The worked example of a stage, docs/examples/plot_stage.patch, in a copy of a finished run."""

import os
import re
import shutil
import subprocess

import pandas as pd
import pytest

from checkouts import FOLDERS, RESULTS, SEED, jobs_of, parse_jobs, snakemake
from tiny import ROOT
from warm_python import warm_python

PATCH = ROOT / "docs/examples/plot_stage.patch"
OWN = {f"weights_plot {SEED} {folder}" for folder in FOLDERS}


@pytest.fixture(scope="module")
def patched(finished, tmp_path_factory):
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("stage") / "project", symlinks=True)
    # Outside of any repository, or git would ignore paths that are not below its root.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", str(PATCH)], cwd=folder, env=environment, check=True)
    return folder


def test_it_is_a_row_a_rule_file_and_a_script():
    changed = re.findall(r"^\+\+\+ b/(\S+)", PATCH.read_text(encoding="utf-8"), re.MULTILINE)
    assert changed == [
        "src/fairway/stages.py",
        "workflow/rules/weights_plot.smk",
        "workflow/scripts/weights_plot.py",
    ]


@pytest.mark.slow
def test_it_runs_by_its_name_and_reruns_nothing_but_the_report(patched, dry_runs):
    # Run first of all: the other test makes its products.
    jobs = dry_runs.jobs(patched, "weights_plot")
    assert jobs == OWN
    assert dry_runs.jobs(patched) == OWN | {"report"}
    assert dry_runs.jobs(patched, "--forcerun", "gptq", "--until", "weights_plot") == OWN | jobs_of(
        "gptq"
    )


@pytest.mark.slow
def test_its_rules_are_clean(patched):
    for command in (
        [warm_python(), "-m", "snakemake", "--lint"],
        [warm_python(), "-m", "snakefmt", "--check", "workflow"],
    ):
        done = subprocess.run(command, cwd=patched, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_it_draws_and_the_report_lists_its_seconds(patched, dry_runs):
    done = snakemake(patched)
    assert parse_jobs(done.stderr) == OWN | {"report"}
    for folder in FOLDERS:
        path = patched / RESULTS / f"seed-{SEED}/{folder}/weights_plot/plot.svg"
        assert "<svg" in path.read_text()
    stages = pd.read_parquet(patched / RESULTS / "report/stages.parquet")
    rows = stages[(stages.stage == "weights_plot") & (stages.metric == "seconds")]
    assert set(rows.variant) == {"causal", "leaky"} and (rows.value > 0).all()
    figure = (patched / RESULTS / "report/figures/stage_times.svg").read_text()
    assert "weights_plot, leaky" in figure
    assert dry_runs.jobs(patched) == set()
