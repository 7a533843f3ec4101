"""Variants: what they share, what a change of one reruns, and how the report compares them."""

import pandas as pd
import pytest

from checkouts import (
    ALL,
    SEED,
    change_config,
    from_stage,
    jobs_of,
    make_project,
    read_config,
    snakemake,
    write_config,
)

FASTER = {"train": {"matrix_learning_rate": 0.05}}


def test_an_added_variant_runs_what_it_changes_and_nothing_else(project, dry_runs):
    change_config(project, {"variants": {"fast": FASTER}})
    assert dry_runs.jobs(project) == jobs_of(from_stage("train"), {"fast": "train"})
    change_config(project, {"variants": {"fast": {"evaluation": {"adapters": []}}}})
    assert dry_runs.jobs(project, "slot_eval") == jobs_of(
        "train ema ttt gptq slot_eval", {"fast": "train"}
    )
    write_config(project, {**read_config(project), "variants": {"causal": {}, "leaky": {}}})
    # Leaky is as causal now: it shares all of its stages.
    assert dry_runs.jobs(project) == {"report"}


def test_a_variant_that_is_dropped_reruns_the_report(project, dry_runs):
    change_config(project, {"variants": {"leaky": None}})
    assert dry_runs.jobs(project) == {"report"}


def test_a_variants_own_key_changes_it_only(project, dry_runs):
    change_config(project, {"variants": {"leaky": {"ttt": {"epochs": 2}}}})
    assert dry_runs.jobs(project) == jobs_of(from_stage("ttt"), {"leaky": "ttt"})


def test_a_key_that_a_variant_sets_for_itself_changes_the_others_only(project, dry_runs):
    change_config(project, {"ttt": {"data": "none"}})
    assert dry_runs.jobs(project) == jobs_of(from_stage("ttt"), {"shared": "train"})


def test_a_variant_with_a_dataset_of_its_own(project, dry_runs):
    change_config(project, {"variants": {"fewer": {"data": {"name": "fewer", "val_docs": 2}}}})
    assert dry_runs.jobs(project) == jobs_of(ALL, {"fewer": "train"})


def test_a_sweep_shares_the_stages_before_its_key(project, dry_runs):
    change_config(project, {"sweep": {"gptq.dampening_fraction": [0.002, 0.005, 0.01]}})
    swept = {f"dampening_fraction_{value}": "gptq" for value in (0.002, 0.01)}
    # The second of the three is the default.
    expected = jobs_of(from_stage("gptq"), swept) | jobs_of(
        from_stage("gptq"), {f"leaky-{name}": "gptq" for name in swept}
    )
    assert dry_runs.jobs(project) == expected


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two ways of training, two seeds each, in one command."""
    folder = make_project(tmp_path_factory.mktemp("variants") / "project", seeds=[1, 2])
    change_config(folder, {"evaluation": {"adapters": {"lora": None, "ngram": None}}})
    variants = {"causal": {}, "fast": FASTER}
    write_config(folder, {**read_config(folder), "variants": variants})
    snakemake(folder, "report")
    return folder


@pytest.mark.slow
def test_the_report_compares_training_variants_over_seeds(compared):
    report = compared / "results/tiny/report"
    found = pd.read_parquet(report / "comparisons.parquet")
    row = found[(found.variant == "fast") & (found.reference_variant == "causal")]
    row = row[row.seed.isna()].dropna(subset=["welch_p"])
    assert len(row) == 1
    assert row.paired_degrees_of_freedom.item() == 1
    for name in ("difference_nats", "welch_t", "welch_p", "paired_t", "paired_p"):
        assert pd.notna(row[name].item())
    assert len(list(compared.glob("results/tiny/seed-*/*/train/weights.safetensors"))) == 4


@pytest.mark.slow
def test_other_orders_of_seeds_rerun_nothing(compared, dry_runs):
    arguments = ("--config", "seeds=[2,1]")
    assert dry_runs.jobs(compared, *arguments) == set()
    assert dry_runs.jobs(compared, "--config", f"seeds=[2,1,{SEED}]", "sweep={}") == jobs_of(
        from_stage("train"), {"shared": "train", "fast": "train"}
    )
