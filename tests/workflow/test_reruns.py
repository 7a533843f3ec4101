"""What a change reruns, and what it leaves alone: dry runs in copies of a finished project."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from checkouts import (
    ALL,
    CONFIG_FILE,
    RESULTS,
    SEED,
    TEXT,
    change_config,
    copy_checkout,
    from_stage,
    jobs_of,
    read_config,
    snakemake,
    write_config,
)
from fairway.data.shards import read_shard, write_shard

SHARED = {"shared": "train"}
"""The variant `causal` lies there."""


def test_the_verdicts_and_the_report_are_there(finished):
    for folder, verdict in (("shared", "PASS"), ("leaky", "FAIL")):
        audit = json.loads(
            (finished / RESULTS / f"seed-{SEED}/{folder}/audit/audit.json").read_text()
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


@pytest.mark.slow
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
        ({"runtime": {"compile": "off"}}, from_stage("train")),
        ({"ema": {"decay": 0.5}}, from_stage("ema")),
        ({"ttt": {"learning_rate": 0.001}}, from_stage("ttt")),
        ({"gptq": {"temperature": 0.9}}, from_stage("gptq")),
        ({"budgets": {"artifact_bytes": 1_000_000}}, from_stage("gptq")),
        ({"evaluation": {"forward_windows": 1}}, from_stage("slot_eval")),
        ({"audit": {"flips": 3}}, from_stage("audit")),
        ({"budgets": {"training_seconds": 500}}, from_stage("audit")),
        ({"report": {"significance": 0.02}}, "report"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value),
)  # fmt: skip
def test_a_changed_key_reruns_its_stage_and_what_follows(project, dry_runs, changes, stages):
    change_config(project, changes)
    assert dry_runs.jobs(project) == jobs_of(stages)


def test_an_adapters_key_changes_the_variants_that_leave_the_list_alone(project, dry_runs):
    change_config(project, {"evaluation": {"adapters": {"slot": {"l2": 3.0}}}})
    assert dry_runs.jobs(project) == jobs_of(from_stage("slot_eval"), SHARED)


def test_an_adapter_that_is_taken_off_changes_the_variants_that_leave_the_list_alone(
    project, dry_runs
):
    change_config(project, {"evaluation": {"adapters": {"lora": None}}})
    assert dry_runs.jobs(project) == jobs_of(from_stage("slot_eval"), SHARED)


def test_other_words_for_the_same_rerun_nothing(project, dry_runs):
    """A whole number for a decimal one, a list for names, another order of seeds and variants."""
    config = read_config(project)
    lora, slot, _ = config["evaluation"]["adapters"]
    slot["slot"] |= {"l2": 14, "clamp": 5}
    config["evaluation"]["adapters"] = [lora, slot, {"ngram": None}]
    config["train"]["matrix_learning_rate"] = "25e-3"
    config["train"]["max_seconds"] = "null"
    write_config(project, config)
    assert dry_runs.jobs(project) == set()


def test_an_added_seed_runs_only_itself(project, dry_runs):
    change_config(project, {"seeds": [8, SEED]})
    assert dry_runs.jobs(project) == jobs_of(from_stage("train"), seed=8)


def test_changed_text_reruns_everything_and_rewritten_text_nothing(project, dry_runs):
    text = project / TEXT
    text.write_bytes(text.read_bytes())
    assert dry_runs.jobs(project) == set()
    with text.open("a") as file:
        print(json.dumps({"text": "One more document."}), file=file)
    assert dry_runs.jobs(project) == jobs_of(ALL)


@pytest.mark.slow
def test_an_added_or_a_changed_shard_reruns_everything(finished, tmp_path, dry_runs):
    """`source: shards` uses a folder in place; here it is the finished dataset's own."""
    project = copy_checkout(tmp_path / "shards")
    shutil.copytree(finished / "results/data/tiny", project / "given")
    data = {
        "name": "given", "source": "shards", "folder": "given",
        "tokenizer": "given/tokenizer.model", "vocab_size": 320,
        "selection_tokens": 512, "adaptation_tokens": 1024,
    }  # fmt: skip
    write_config(project, {**read_config(finished), "data": data})
    snakemake(project, "tokenize")
    assert dry_runs.jobs(project, "tokenize") == set()
    (shard,) = (project / "given").glob("val_*.bin")
    shutil.copyfile(shard, project / "given/val_000001.bin")
    assert dry_runs.jobs(project, "tokenize") == {"tokenize"}
    (project / "given/val_000001.bin").unlink()
    assert dry_runs.jobs(project, "tokenize") == set()
    tokens = read_shard(shard).copy()
    tokens[-1] += 1
    write_shard(shard, tokens)
    assert dry_runs.jobs(project) == jobs_of(ALL)


# --- a product is gone --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target", "jobs"),
    [
        (f"{RESULTS}/seed-{SEED}/shared/train/averages.safetensors", "train", "train 7 shared"),
        (f"{RESULTS}/seed-{SEED}/leaky/gptq/artifact.bin", "gptq", "gptq 7 leaky"),
        (f"{RESULTS}/seed-{SEED}/shared/slot_eval/metrics.json", "slot_eval", "slot_eval 7 shared"),
        (f"{RESULTS}/seed-{SEED}/leaky/audit/reach.parquet", "audit", "audit 7 leaky"),
        (f"{RESULTS}/report/gains.parquet", "report", "report"),
        ("results/data/tiny.manifest.json", "tokenize", "tokenize"),
    ],
)
def test_a_product_that_is_gone_is_made_again(project, dry_runs, name, target, jobs):
    (project / name).unlink()
    assert dry_runs.jobs(project, target) == {jobs}


# --- source code changed -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("src/fairway/data/build.py", ALL),
        ("src/fairway/quantization/quantizers/gptq.py", from_stage("gptq")),
        ("workflow/scripts/ttt.py", from_stage("ttt")),
    ],
)
def test_edited_code_reruns_the_stages_that_use_it(project, dry_runs, name, stages):
    """Which stages use which module is test_code_hash.py's."""
    edit(project / name, end="\nADDED = 1\n")
    assert dry_runs.jobs(project) == jobs_of(stages)


@pytest.mark.parametrize("name", ["page", "base"])
def test_an_edited_page_template_reruns_the_report(project, dry_runs, name):
    edit(project / f"src/fairway/report/{name}.html.j2", end="<!-- edited -->\n")
    assert dry_runs.jobs(project) == jobs_of("report")


@pytest.mark.slow
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
