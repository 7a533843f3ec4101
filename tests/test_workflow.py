"""The workflow: what a change reruns, what it leaves alone, and the commands the README promises.

One tiny run is made for real; every question about it is a dry run in a copy of its folder.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from checkouts import (
    CONFIG_FILE,
    RESULTS,
    SEED,
    TEXT,
    DryRuns,
    change_config,
    copy_checkout,
    jobs_of,
    make_project,
    snakemake,
)
from fairway.data.dataset import load_dataset

ALL = "tokenize train ema ttt gptq slot_eval audit report"


def from_stage(stage: str) -> str:
    """`stage` and every stage after it."""
    return ALL[ALL.index(stage) :]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project whose results are all there; not to be changed."""
    folder = make_project(tmp_path_factory.mktemp("finished") / "project")
    snakemake(folder)
    return folder


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A project without results; not to be changed."""
    return make_project(tmp_path_factory.mktemp("empty") / "project")


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory):
    runs = DryRuns(tmp_path_factory.mktemp("dry_runs"))
    yield runs
    runs.close()


@pytest.fixture
def project(finished, tmp_path):
    """A copy of the finished project, to be changed: a moved checkout with its mtimes."""
    return shutil.copytree(finished, tmp_path / "moved", symlinks=True)


def test_the_verdicts_and_the_report_are_there(finished):
    for variant, verdict in (("causal", "PASS"), ("published", "FAIL")):
        audit = json.loads(
            (finished / RESULTS / f"seed-{SEED}/{variant}/audit/audit.json").read_text()
        )
        assert audit["verdict"] == verdict
    for name in ("report.html", "stages.parquet", "summary.parquet", "provenance.json"):
        assert (finished / RESULTS / "report" / name).stat().st_size > 0


# --- nothing changed ---------------------------------------------------------------------------


def test_a_moved_checkout_reruns_nothing(project, dry_runs):
    assert dry_runs.jobs(project) == set()


def test_touching_every_file_reruns_nothing(project, dry_runs):
    # Upstream files last, so that by their mtimes everything would be out of date.
    paths = sorted(path for path in project.rglob("*") if ".snakemake" not in path.parts)
    now = time.time()
    for age, path in enumerate(reversed(paths)):
        os.utime(path, (now + age, now + age))
    assert dry_runs.jobs(project) == set()


def test_results_copied_next_to_a_fresh_clone_rerun_nothing(finished, tmp_path, dry_runs):
    clone = copy_checkout(tmp_path / "clone")
    for name in (CONFIG_FILE, "text", "results", ".snakemake"):
        copy(finished / name, clone / name, shutil.copyfile)
    assert dry_runs.jobs(clone) == set()


def test_results_without_snakemakes_records_rerun_nothing(finished, tmp_path, dry_runs):
    """Mtimes are all that is left to go by, so they must be kept (cp -a) or restored (--touch)."""
    kept = copy_checkout(tmp_path / "kept")
    lost = copy_checkout(tmp_path / "lost")
    for name in (CONFIG_FILE, "text", "results"):
        copy(finished / name, kept / name, shutil.copy2)
        copy(finished / name, lost / name, shutil.copyfile)
    assert dry_runs.jobs(kept) == set()
    snakemake(lost, "--touch")
    assert dry_runs.jobs(lost) == set()
    change_config(lost, {"ttt": {"learning_rate": 0.001}})
    assert dry_runs.jobs(lost) == jobs_of(from_stage("ttt"))


def copy(source: Path, target: Path, copy_file: Callable) -> None:
    """A file or a folder; `shutil.copy2` keeps the mtimes of files, `shutil.copyfile` does not."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=copy_file, dirs_exist_ok=True)
    else:
        copy_file(source, target)


def test_reordered_keys_and_comments_rerun_nothing(project, dry_runs):
    for path in (project / CONFIG_FILE, project / "config.yaml"):
        config = yaml.safe_load(path.read_text())
        path.write_text("# A comment.\n" + yaml.safe_dump(reverse_keys(config), sort_keys=False))
        assert list(yaml.safe_load(path.read_text())) == list(reversed(config))
    assert dry_runs.jobs(project) == set()


def reverse_keys(value):
    if isinstance(value, dict):
        return {key: reverse_keys(value[key]) for key in reversed(value)}
    return value


# --- one key changed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"data": {"val_docs": 5}}, ALL),
        ({"model": {"logit_softcap": 20.0}}, from_stage("train")),
        ({"train": {"max_steps": 13}}, from_stage("train")),
        ({"runtime": {"compile": "off"}}, "train ema ttt gptq slot_eval audit report"),
        ({"ema": {"decay": 0.5}}, from_stage("ema")),
        ({"ttt": {"learning_rate": 0.001}}, from_stage("ttt")),
        ({"gptq": {"temperature": 0.9}}, from_stage("gptq")),
        ({"budgets": {"artifact_bytes": 1_000_000}}, from_stage("gptq")),
        ({"evaluation": {"forward_windows": 1}}, from_stage("slot_eval")),
        ({"slot": {"clamp": 4.0}}, from_stage("slot_eval")),
        ({"audit": {"flips": 3}}, from_stage("audit")),
        ({"budgets": {"training_seconds": 500}}, from_stage("audit")),
        ({"report": {"significance": 0.02}}, "report"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value),
)  # fmt: skip
def test_a_changed_key_reruns_its_stage_and_what_follows(project, dry_runs, changes, stages):
    change_config(project, changes)
    assert dry_runs.jobs(project) == jobs_of(stages)


def test_a_key_that_a_variant_sets_for_itself_changes_the_others_only(project, dry_runs):
    change_config(project, {"slot": {"l2": 3.0}})
    assert dry_runs.jobs(project) == jobs_of(from_stage("slot_eval"), variants=["causal"])


def test_an_adapters_key_changes_the_variants_that_list_it(project, dry_runs):
    change_config(project, {"lora": {"rank": 3}})
    assert dry_runs.jobs(project) == jobs_of(from_stage("slot_eval"), variants=["causal"])


def test_an_adapter_that_is_taken_off_the_list_changes_that_variant_only(project, dry_runs):
    change_config(project, {"variants": {"causal": {"evaluation": {"adapters": ["slot"]}}}})
    assert dry_runs.jobs(project) == jobs_of(from_stage("slot_eval"), variants=["causal"])


def test_a_variants_own_key_changes_it_only(project, dry_runs):
    change_config(project, {"variants": {"published": {"ttt": {"epochs": 2}}}})
    assert dry_runs.jobs(project) == jobs_of(from_stage("ttt"), variants=["published"])


def test_an_added_seed_runs_only_itself(project, dry_runs):
    change_config(project, {"seeds": [SEED, 8]})
    assert dry_runs.jobs(project) == jobs_of(from_stage("train"), seed=8)


def test_an_added_variant_runs_only_itself(project, dry_runs):
    change_config(project, {"variants": {"plain": {"evaluation": {"adapters": []}}}})
    assert dry_runs.jobs(project) == jobs_of(from_stage("ttt"), variants=["plain"])


def test_changed_text_reruns_everything_and_rewritten_text_nothing(project, dry_runs):
    text = project / TEXT
    text.write_bytes(text.read_bytes())
    assert dry_runs.jobs(project) == set()
    with text.open("a") as file:
        print(json.dumps({"text": "One more document."}), file=file)
    assert dry_runs.jobs(project) == jobs_of(ALL)


# --- source code changed -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("src/fairway/data/build.py", ALL),
        ("src/fairway/model/gpt.py", from_stage("train")),
        ("src/fairway/training/trainer.py", from_stage("train")),
        ("src/fairway/training/selection.py", from_stage("ema")),
        ("src/fairway/training/ttt.py", from_stage("ttt")),
        ("src/fairway/quantization/gptq.py", from_stage("gptq")),
        ("src/fairway/evaluation/adapters/slot.py", from_stage("slot_eval")),
        ("src/fairway/evaluation/adapters/lora.py", from_stage("slot_eval")),
        ("src/fairway/audit/flip.py", from_stage("audit")),
        ("src/fairway/report/page.py", "report"),
        ("workflow/scripts/ema.py", from_stage("ema")),
    ],
)
def test_edited_code_reruns_the_stages_that_use_it(project, dry_runs, name, stages):
    edit(project / name, end="\nADDED = 1\n")
    assert dry_runs.jobs(project) == jobs_of(stages)


def test_an_edited_page_template_reruns_the_report(project, dry_runs):
    edit(project / "src/fairway/report/page.html.j2", end="<!-- edited -->\n")
    assert dry_runs.jobs(project) == jobs_of("report")


def test_new_documentation_of_every_module_reruns_nothing(project, dry_runs):
    modules = [*(project / "src").rglob("*.py"), *(project / "workflow/scripts").iterdir()]
    for path in modules:
        docstring = path.read_text().startswith('"""')
        edit(path, start='"""Other words: ' if docstring else "", end="\n# A comment.\n")
    for path in [project / "Snakefile", *(project / "workflow/rules").iterdir()]:
        edit(path, end="\n\n# A comment.\n")
    assert dry_runs.jobs(project) == set()


def edit(path: Path, start: str = "", end: str = "") -> None:
    """Put text before and after what a file holds; `start` replaces its opening quotes."""
    text = path.read_text()
    path.write_text(start + text.removeprefix('"""' if start else "") + end)


# --- choosing what to run ----------------------------------------------------------------------


def test_a_forced_stage_takes_what_follows_along(finished, dry_runs):
    jobs = dry_runs.jobs(finished, "--forcerun", "quantise_gptq")
    assert jobs == jobs_of(from_stage("gptq"))


def test_forcing_a_target_is_refused_with_its_rule(finished, dry_runs):
    code, output = dry_runs.run(finished, "--forcerun", "ttt", "--configfile", CONFIG_FILE)
    assert code != 0 and "--forcerun ttt: force its rule, adapt_ttt, instead" in output


@pytest.mark.parametrize("target", ["tokenize", "train", "ema", "ttt", "gptq", "slot_eval"])
def test_a_stage_brings_what_it_needs_and_no_more(empty, dry_runs, target):
    assert dry_runs.jobs(empty, target) == jobs_of(ALL[: ALL.index(target) + len(target)])


def test_the_audit_needs_no_report_and_the_report_everything(empty, dry_runs):
    assert dry_runs.jobs(empty, "audit") == jobs_of(ALL.removesuffix(" report"))
    assert dry_runs.jobs(empty, "report") == dry_runs.jobs(empty) == jobs_of(ALL)


def test_a_seed_on_the_command_line_narrows(empty, dry_runs):
    jobs = dry_runs.jobs(empty, "ttt", "--config", "seeds=[42]")
    assert jobs == jobs_of("tokenize train ema ttt", seed=42)


def test_a_file_is_a_target(empty, dry_runs):
    path = f"{RESULTS}/seed-42/causal/gptq/artifact.bin"
    jobs = dry_runs.jobs(empty, path)
    assert jobs == jobs_of("tokenize train ema ttt gptq", seed=42, variants=["causal"])


# --- what is shipped ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cores", "2"],
        ["--cores", "2", "--configfile", "config/record.yaml"],
        ["--workflow-profile", "gpu", "--configfile", "config/record.yaml"],
        ["--workflow-profile", "slurm", "--configfile", "config/record.yaml"],
    ],
    ids=["config", "record", "gpu", "slurm"],
)
def test_every_shipped_configuration_and_profile_plans_its_run(empty, dry_runs, arguments):
    if "slurm" in arguments and find_spec("snakemake_executor_plugin_slurm") is None:
        arguments = [*arguments, "--executor", "local"]
    code, output = dry_runs.run(empty, "--printshellcmds", *arguments)
    assert code == 0
    # 3 seeds of 2 stages and of 4 for each of 2 variants; tokenize, report and all.
    assert re.search(r"^total +33$", output, re.MULTILINE)
    launched = output.count("torchrun --standalone --nproc_per_node=8 $FAIRWAY_HOME")
    # train once, ttt and slot_eval for each variant.
    assert launched == (3 * 5 if "--workflow-profile" in arguments else 0)


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "snakemake", "--lint"],
        [sys.executable, "-m", "snakefmt", "--check", "Snakefile", "workflow"],
    ],
    ids=["lint", "snakefmt"],
)
def test_the_rules_are_clean(empty, command):
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_snakemakes_own_report_has_the_captions(finished, tmp_path):
    snakemake(finished, "--report", str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    for caption in (
        "Fairway trains a language model",
        "whole result on one page",
        "The audit of variant",
    ):
        assert caption in page


def test_a_second_project_takes_the_dataset_from_the_cache(tmp_path, dry_runs):
    cache = tmp_path / "cache"
    cache.mkdir()
    first, second = (make_project(tmp_path / name) for name in ("first", "second"))
    for folder in (first, second):
        arguments = ("tokenize", "--cache", "tokenize_text")
        snakemake(folder, *arguments, SNAKEMAKE_OUTPUT_CACHE=str(cache))
    shard = "results/data/tiny/train_000000.bin"
    assert (first / shard).samefile(second / shard)
    assert cache in (second / shard).resolve().parents
    assert not (second / "results/logs/tokenize_tiny.log").read_text()
    assert load_dataset(second / "results/data/tiny/manifest.json").vocab_size == 320
    assert dry_runs.jobs(second, "tokenize") == set()
