"""What the report says of adaptation: the change, its adapters and where they gain."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from fairway.errors import UserError
from fairway.report.statistics import least_p
from synthetic_run import (
    QUICKSTART,
    SEEDS,
    load_results,
    make_report,
    make_run,
    make_tokens,
    reseal,
)


@pytest.fixture(scope="module")
def report(finished):
    """The folder of a finished run's report."""
    return finished[1]


def test_each_seed_is_held_against_its_own_sliding_window(report):
    stages = pd.read_parquet(report / "stages.parquet")
    value = stages.set_index(["variant", "seed", "stage", "metric"])["value"].sort_index()
    for variant in QUICKSTART:
        for seed in SEEDS:
            found = value[variant, seed, "slot_eval"]
            difference = found["val_bpb"] - value[variant, seed, "sliding", "val_bpb"]
            assert found["change_bpb"] == pytest.approx(difference)
            assert found["change_bpb_ci_low"] < difference < found["change_bpb_ci_high"] < 0
            assert least_p(24) <= found["change_bpb_p"] < 0.001  # 24 documents, all of which gain
            assert 0 < found["change_bpb_standard_error"] < -difference
    units = dict(zip(stages["metric"], stages["unit"], strict=True))
    assert units["change_bpb_ci_low"] == "bits/byte" and units["change_bpb_p"] == "1"
    summary = pd.read_parquet(report / "summary.parquet")
    kept = {
        "change_bpb",
        "gain_nats",
        "gain_lora_bpb",
        "gain_lora_nats",
        "gain_slot_bpb",
        "gain_slot_nats",
    }
    about = summary["metric"].str.startswith(("change_", "gain_"))
    assert set(summary.loc[about, "metric"]) == kept


def test_the_adapters_gains_add_up_to_the_change(report):
    stages = pd.read_parquet(report / "stages.parquet")
    value = stages.set_index(["variant", "seed", "stage", "metric"])["value"].sort_index()
    for seed in SEEDS:
        found, table = value["causal", seed, "slot_eval"], make_tokens("causal", seed)
        gained = found["gain_lora_bpb"] + found["gain_slot_bpb"]
        assert gained == pytest.approx(-found["change_bpb"])
        assert found["gain_lora_nats"] == pytest.approx(table["gain_lora"].mean())
        lora = table["gain_lora"].sum() / math.log(2) / table["bytes"].sum()
        assert found["gain_lora_bpb"] == pytest.approx(lora)
        assert "gain_lora_bpb" not in value["leaky", seed, "slot_eval"]


def test_gains_parquet_splits_them_by_position_in_the_document(report):
    gains = pd.read_parquet(report / "gains.parquet")
    assert set(gains["first_token"]) == {0, 64, 128, 256, 512, 1024}
    adapters = gains.groupby("variant")["adapter"].agg(set)
    assert adapters.to_dict() == {"causal": {"all", "lora", "slot"}, "leaky": {"all", "slot"}}
    of_seed = gains[(gains["variant"] == "causal") & (gains["seed"] == 42)]
    wide = of_seed.pivot(index="first_token", columns="adapter", values="gain_nats")
    np.testing.assert_allclose(wide["lora"] + wide["slot"], wide["all"])
    assert wide["lora"].is_monotonic_increasing
    table = make_tokens("causal", 42)
    whole = of_seed[of_seed["adapter"] == "all"]
    assert whole["tokens"].sum() == len(table)
    saved = (whole["tokens"] * whole["gain_nats"]).sum()
    assert saved == pytest.approx((table["nll_before"] - table["nll_after"]).sum())


def rewrite_tokens(root, seed, change):
    """Replace one token table of `causal` by `change` of it."""
    path = root / f"results/quickstart/seed-{seed}/shared/slot_eval/tokens.parquet"
    change(pd.read_parquet(path)).to_parquet(path)
    reseal(path)


def rewrite_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    reseal(path)


def test_gains_that_do_not_add_up_are_refused(tmp_path):
    make_run(tmp_path, seeds=(42,))
    rewrite_tokens(tmp_path, 42, lambda t: t.assign(gain_lora=t["gain_lora"] + 1))
    with pytest.raises(UserError, match="gains by adapter of 1.03.* together"):
        load_results(tmp_path, seeds=(42,))


def test_adapters_that_the_metrics_do_not_list_are_refused(tmp_path):
    make_run(tmp_path, seeds=(42,))
    rewrite_tokens(tmp_path, 42, lambda t: t.drop(columns="gain_lora"))
    with pytest.raises(UserError, match=r"\['slot'\], its metrics.json lists \['lora', 'slot'\]"):
        load_results(tmp_path, seeds=(42,))


def test_seeds_with_other_adapters_are_refused(tmp_path):
    make_run(tmp_path, seeds=(42, 2025))
    rewrite_tokens(tmp_path, 2025, lambda t: t.drop(columns="gain_lora"))
    metrics = tmp_path / "results/quickstart/seed-2025/shared/slot_eval/metrics.json"
    rewrite_json(metrics, adapters=[{"name": "slot", "title": "SLOT", "kernels": "plain"}])
    with pytest.raises(UserError, match=r"\['slot'\], the first seed's of \['lora', 'slot'\]"):
        load_results(tmp_path, seeds=(42, 2025))


def test_an_adapter_is_called_by_the_title_that_it_gives_itself(tmp_path):
    make_run(tmp_path, seeds=(42,))
    rewrite_tokens(tmp_path, 42, lambda t: t.rename(columns={"gain_lora": "gain_cache"}))
    metrics = tmp_path / "results/quickstart/seed-42/shared/slot_eval/metrics.json"
    titles = {"cache": "Unigram cache", "slot": "SLOT"}
    listed = [{"name": name, "title": title, "kernels": "plain"} for name, title in titles.items()]
    rewrite_json(metrics, adapters=listed)
    folder = make_report(tmp_path, seeds=(42,), figures=False)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert ">Adapted by Unigram cache and SLOT <" in page and ">+ Unigram cache</th>" in page
    stages = pd.read_parquet(folder / "stages.parquet")
    assert "gain_cache_bpb" in set(stages["metric"])


@pytest.mark.parametrize(
    ("track", "told"),
    [
        ("fixed", "fixed (the model&#39;s own predictions)"),
        ("adaptive", "adaptive (the evaluator changes its predictions as it reads)"),
    ],
)
def test_the_track_is_named_beside_its_verdict(tmp_path, track, told):
    make_run(tmp_path, seeds=(42,))
    base = tmp_path / "results/quickstart/seed-42/shared"
    if track == "fixed":
        rewrite_tokens(tmp_path, 42, plain)
        loss = make_tokens("causal", 42)["nll_before"].mean()
        rewrite_json(base / "slot_eval/metrics.json", val_loss=loss, adapters=[])
        rewrite_json(base / "audit/audit.json", track=track)
    page = (make_report(tmp_path, seeds=(42,), figures=False) / "report.html").read_text()
    assert re.search(rf"PASS</span> <span class=\"detail\">{track}</span>", page)
    assert (">Without adapters <" in page) == (track == "fixed")
    assert f"Track: {told}." in page


def plain(table):
    """The table of an evaluation without adapters."""
    without = table.drop(columns=[name for name in table if name.startswith("gain_")])
    return without.assign(nll_after=table["nll_before"])
