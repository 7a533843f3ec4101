"""Another workflow uses this one as a module, from a folder of its own."""

import json
import shutil

import pytest
import yaml

from checkouts import (
    ALL,
    CONFIG_FILE,
    TEXT,
    copy_checkout,
    jobs_of,
    parse_jobs,
    project_config,
    snakemake,
)
from tiny import synthetic_documents, write_jsonl

SNAKEFILE = """
configfile: "tiny.yaml"

shell.prefix("echo a rule of the importer: ; ")

module fairway:
    snakefile: "../fairway/workflow/Snakefile"
    config: config["fairway"]

use rule * from fairway as fairway_*

rule mine:
    default_target: True
    input:
        rules.fairway_all.input,
"""


@pytest.fixture(scope="module")
def importer(tmp_path_factory):
    """A folder with nothing but a Snakefile, its config and text; Fairway's copy lies beside it."""
    root = tmp_path_factory.mktemp("module")
    copy_checkout(root / "fairway")
    folder = root / "importer"
    (folder / TEXT).parent.mkdir(parents=True)
    write_jsonl(folder / TEXT, synthetic_documents(60))
    (folder / "Snakefile").write_text(SNAKEFILE)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump({"fairway": project_config()}))
    return folder


def test_everything_is_planned_with_the_importers_results_and_fairways_scripts(importer, dry_runs):
    code, output = dry_runs.run(importer, "--printshellcmds", "--cores", "2")
    assert code == 0 and parse_jobs(output) == jobs_of(ALL)
    assert "Missing output files: results/tiny/report/" in output
    assert '"$FAIRWAY_HOME/workflow/scripts/train.py"' in output
    assert str(importer.parent / "fairway") not in output.partition("Job stats")[2]


@pytest.mark.slow
def test_its_stages_are_targets_and_can_be_forced(importer, dry_runs):
    code, output = dry_runs.run(importer, "fairway_ema")
    assert code == 0 and parse_jobs(output) == jobs_of("tokenize train ema")
    code, output = dry_runs.run(importer, "--omit-from", "fairway_ttt")
    assert code == 0 and parse_jobs(output) == jobs_of("tokenize train ema")


@pytest.mark.slow
def test_a_recipe_is_found_in_fairways_folder_and_a_fault_told_in_one_line(importer, dry_runs):
    overlay = importer / "overlay.yaml"
    overlay.write_text(json.dumps({"fairway": {"recipe": "quickstart", "run": "other"}}))
    code, output = dry_runs.run(importer, "fairway_report", "--configfile", "overlay.yaml")
    assert code == 0 and "report: results/other/report/report.html" in output
    overlay.write_text(json.dumps({"fairway": {"recipe": "quikstart"}}))
    code, output = dry_runs.run(importer, "--configfile", "overlay.yaml")
    assert code != 0 and "did you mean quickstart?" in output and "Traceback" not in output


@pytest.mark.slow
def test_a_job_runs_and_a_moved_fairway_reruns_nothing(importer, tmp_path, dry_runs):
    done = snakemake(importer, "fairway_tokenize")
    assert "a rule of the importer" in done.stdout  # whose prefix is kept
    assert (importer / "results/data/tiny/manifest.json").exists()
    moved = shutil.copytree(importer.parent, tmp_path / "moved") / "importer"
    code, output = dry_runs.run(moved, "fairway_tokenize")
    assert code == 0 and parse_jobs(output) == set()
