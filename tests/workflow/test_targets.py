"""Choosing what to run: stages, files and settings on the command line; what is shipped runs."""

import re
import subprocess
from importlib.util import find_spec

import pytest
import yaml

from checkouts import (
    ALL,
    CONFIG_FILE,
    FOLDERS,
    RESULTS,
    SEED,
    from_stage,
    jobs_of,
    make_project,
    parse_jobs,
    snakemake,
)
from fairway.data.dataset import load_dataset
from fairway.stages import STAGES, stages_of_a_run
from tiny import ROOT
from warm_python import warm_python

# --- stages and files --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptq", "run_gptq"])
def test_a_forced_stage_takes_what_follows_along(finished, dry_runs, name):
    """By its name, or by its jobs' rule, alone or with a target."""
    assert dry_runs.jobs(finished, "--forcerun", name) == jobs_of(from_stage("gptq"))
    jobs = dry_runs.jobs(finished, "slot_eval", "--forcerun", name)
    assert jobs == jobs_of("gptq slot_eval")


@pytest.mark.parametrize("name", ["tokenize", "report"])
def test_a_forced_stage_of_a_dataset_or_a_run(finished, dry_runs, name):
    assert dry_runs.jobs(finished, "--forcerun", name) == jobs_of(from_stage(name))


def test_a_run_ends_with_a_stage_or_before_one(empty, dry_runs):
    assert dry_runs.jobs(empty, "--until", "ema") == jobs_of("tokenize train ema")
    assert dry_runs.jobs(empty, "--omit-from", "gptq") == jobs_of("tokenize train ema ttt")


def test_a_stages_target_asks_for_all_of_its_files(empty, dry_runs):
    """As the table of stages has them, and its jobs make exactly those."""
    names = [stage.name for stage in stages_of_a_run()]
    code, output = dry_runs.run(empty, *names, "--configfile", CONFIG_FILE)
    assert code == 0
    blocks = dict(re.findall(r"^(?:local)?rule (\w+):\n    input: (.*)$", output, re.MULTILINE))
    outputs = re.findall(r"^Reason: Missing output files: ([^;\n]*)", output, re.MULTILINE)
    made = {path for line in outputs for path in line.split(", ")}
    for stage in stages_of_a_run():
        if stage.per == "dataset":
            expected = {"results/data/tiny", "results/data/tiny.manifest.json"}
        else:
            folders = [f"{RESULTS}/{stage.name}"]
            if stage.per == "variant":
                folders = [
                    f"{RESULTS}/seed-{SEED}/{folder}/{stage.name}"
                    for folder, first in FOLDERS.items()
                    if ALL.index(stage.name) >= ALL.index(first)
                ]
            expected = {f"{folder}/{name}" for folder in folders for name in stage.files}
        assert set(blocks[stage.name].split(", ")) == expected
        assert expected <= made


@pytest.mark.parametrize("target", ["tokenize", "train", "ema", "gptq", "slot_eval"])
def test_a_stage_brings_what_it_needs_and_no_more(empty, dry_runs, target):
    assert dry_runs.jobs(empty, target) == jobs_of(ALL[: ALL.index(target) + len(target)])


def test_the_audit_needs_no_report_and_the_report_everything(empty, dry_runs):
    assert dry_runs.jobs(empty, "audit") == jobs_of(ALL.removesuffix(" report"))
    assert dry_runs.jobs(empty, "report") == dry_runs.jobs(empty) == jobs_of(ALL)


def test_a_seed_on_the_command_line_narrows(empty, dry_runs):
    jobs = dry_runs.jobs(empty, "ttt", "--config", "seeds=[42]")
    assert jobs == jobs_of("tokenize train ema ttt", seed=42)


def test_a_file_is_a_target(empty, dry_runs):
    path = f"{RESULTS}/seed-42/leaky/gptq/artifact.bin"
    jobs = dry_runs.jobs(empty, path)
    assert jobs == jobs_of("tokenize train ema", {"shared": "train"}, seed=42) | jobs_of(
        "ttt gptq", {"leaky": "ttt"}, seed=42
    )


# --- settings on the command line --------------------------------------------------------------


@pytest.mark.parametrize("run", ["2026-11-24", "2023_11", "010", "1e5"])
def test_a_runs_folder_is_what_was_typed(empty, dry_runs, run):
    code, output = dry_runs.run(
        empty, "report", "--configfile", CONFIG_FILE, "--config", f"run={run}"
    )
    assert code == 0 and f"report: results/{run}/report/report.html" in output


def test_a_files_text_is_what_was_written_too(empty, dry_runs):
    """In YAML 1.1, which Snakemake reads, 2023_11 is 202311 and 010 is 8."""
    (empty / "written.yaml").write_text("run: 2023_11\nseeds: [010]\nvariants: {leaky: null}\n")
    code, output = dry_runs.run(empty, "--configfile", CONFIG_FILE, "written.yaml")
    assert code == 0 and "report: results/2023_11/report/report.html" in output
    assert parse_jobs(output) == jobs_of(ALL, {"shared": "train"}, seed=10)


def test_text_on_the_command_line_is_what_each_key_makes_of_it(empty, dry_runs):
    jobs = dry_runs.jobs(
        empty, "--config", "run=tiny", "seeds=[010]", "variants=[causal]", "recipe=null",
        'runtime={"compile": "on"}', 'train={"max_seconds": null, "matrix_learning_rate": 1e-3}',
        'evaluation={"adapters": {"lora": {"rank": 3}, "ngram": null}}',
    )  # fmt: skip
    assert jobs == jobs_of(ALL, {"shared": "train"}, seed=10)


def test_settings_on_the_command_line_go_over_the_files(finished, dry_runs):
    arguments = ("--config", 'evaluation={"adapters": {"lora": {"rank": 3}}}')
    assert dry_runs.jobs(finished, *arguments) == jobs_of(
        from_stage("slot_eval"), {"shared": "train"}
    )
    # Later files over earlier ones, entry by entry of the named list.
    (finished / "other.yaml").write_text("evaluation: {adapters: {slot: {l2: 14}, ngram: null}}")
    code, output = dry_runs.run(finished, "--configfile", CONFIG_FILE, "other.yaml")
    assert code == 0
    assert parse_jobs(output) == jobs_of(from_stage("slot_eval"), {"shared": "train"})


@pytest.mark.parametrize(
    "recipe",
    [
        "quickstart",
        "one_gpu",
        *(
            pytest.param(one, marks=pytest.mark.many)
            for one in ("pr1350", "frontier", "frontier_one_gpu")
        ),
    ],
)
def test_a_users_file_goes_over_each_recipe(empty, dry_runs, recipe):
    """A recipe is named, or given as a file of its own; both are the same run."""
    touch_texts(empty)
    (empty / "mine.yaml").write_text("seeds: [1]\nvariants: {leaky: null}\nttt: {epochs: 3}\n")
    named = f"recipe={recipe}"
    commands = [
        ("--configfile", "mine.yaml", "--config", named),
        ("--configfile", f"config/{recipe}.yaml", "mine.yaml"),
    ]
    if recipe == "quickstart":  # which config.yaml names
        commands.append(("--configfile", "mine.yaml"))
    plans = []
    for command in commands:
        code, output = dry_runs.run(empty, "ttt", *command, "--printshellcmds")
        assert code == 0
        plans.append(re.findall(r"^Shell command: (.*PYTHONPATH=.*)$", output, re.MULTILINE))
    assert len(plans[0]) == 4 and all(plan == plans[0] for plan in plans)
    assert f"results/{recipe}/seed-1/shared/ttt" in plans[0][-1] and '"epochs": 3' in plans[0][-1]


def touch_texts(folder):
    """The text that the recipe one_gpu expects of its user."""
    for name in ("data/validation.jsonl.xz", "data/train.jsonl.xz"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


# --- what is shipped ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cores", "2"],
        ["--cores", "2", "--snakefile", "workflow/Snakefile"],
        ["--cores", "2", "--config", "recipe=one_gpu"],
        ["--cores", "2", "--config", "recipe=frontier_one_gpu"],
        ["--cores", "2", "--configfile", "config/pr1350.yaml"],
        ["--workflow-profile", "gpu", "--config", "gpus={machine: 8}", "recipe=pr1350"],
        ["--workflow-profile", "gpu", "--config", "gpus={machine: 8}", "recipe=frontier"],
        ["--workflow-profile", "slurm", "--config", "gpus={machine: 8}", "recipe=pr1350"],
    ],
    ids=[
        "config",
        "snakefile",
        "one_gpu",
        "frontier_one_gpu",
        "pr1350",
        "gpu",
        "frontier",
        "slurm",
    ],
)
def test_every_shipped_configuration_and_profile_plans_its_run(empty, dry_runs, arguments):
    if "slurm" in arguments and find_spec("snakemake_executor_plugin_slurm") is None:
        arguments = [*arguments, "--executor", "local"]
    touch_texts(empty)
    code, output = dry_runs.run(empty, "--printshellcmds", *arguments)
    assert code == 0
    variants = 1 if "frontier" in arguments[-1] else 2
    # 3 seeds of 2 stages and of 4 for each variant; tokenize, report and all.
    assert re.search(rf"^total +{3 * (2 + 4 * variants) + 3}$", output, re.MULTILINE)
    launched = output.count('-m fairway.allot 8 "$FAIRWAY_HOME/')
    # train once, slot_eval for each variant.
    assert launched == (3 * (1 + variants) if "--workflow-profile" in arguments else 0)


def test_profiles_name_the_rules_of_stages():
    for path in ROOT.glob("profiles/*/*.yaml"):
        profile = yaml.safe_load(path.read_text())
        for key in ("set-resources", "set-threads"):
            assert {f"run_{stage}" for stage in STAGES} >= set(profile.get(key, {})), path


@pytest.mark.parametrize(
    "command",
    [
        ["snakemake", "--lint"],
        ["snakefmt", "--check", "Snakefile", "workflow"],
    ],
    ids=["lint", "snakefmt"],
)
def test_the_rules_are_clean(empty, command):
    command = [warm_python(), "-m", *command]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_snakemakes_own_report_has_the_captions(finished, tmp_path):
    snakemake(finished, "--report", str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    for caption in (
        "Fairway trains a language model",
        "whole result on one page",
        "The audit of",
    ):
        assert caption in page


@pytest.mark.slow
def test_a_second_project_takes_the_dataset_from_the_cache(tmp_path, dry_runs):
    cache = tmp_path / "cache"
    cache.mkdir()
    first, second = (make_project(tmp_path / name) for name in ("first", "second"))
    for folder in (first, second):
        arguments = ("tokenize", "--cache", "run_tokenize")
        snakemake(folder, *arguments, SNAKEMAKE_OUTPUT_CACHE=str(cache))
    shard = "results/data/tiny/train_000000.bin"
    assert (first / shard).samefile(second / shard)
    assert cache in (second / shard).resolve().parents
    assert not (second / "results/logs/tokenize_tiny.log").read_text()
    assert load_dataset(second / "results/data/tiny/manifest.json").vocab_size == 320
    assert dry_runs.jobs(second, "tokenize") == set()
