"""The slot_eval stage as a program: its table, its figures, its ranks and its complaints."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from fairway.data.dataset import load_dataset, read_split
from fairway.model.spec import GPTConfig
from fairway.quantization.artifact import quantizable, storable
from fairway.quantization.integers import round_to_nearest
from fairway.recipe import load_config
from producers import write_artifact, write_record
from scattered import scattered_model
from tiny import run_script


def write_random_artifact(folder, model_settings, vocab_size: int) -> None:
    """A gptq folder whose model has random weights everywhere."""
    config = GPTConfig(vocab_size=vocab_size, sequence_tokens=32, **dict(model_settings))
    model = scattered_model(config, deviation=0.1)
    quantized = {
        name: round_to_nearest(matrices, bits=6) for name, matrices in quantizable(model).items()
    }
    write_artifact(folder / "artifact.bin", model.config, storable(model, quantized))
    write_record(folder, ["train"])


@pytest.fixture(scope="module")
def model_settings(tiny_config_file):
    return load_config([tiny_config_file]).sections("causal")["model"]


@pytest.fixture(scope="module")
def artifact(model_settings, tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq")
    write_random_artifact(folder, model_settings, load_dataset(tiny_dataset).vocab_size)
    return folder


@pytest.fixture(scope="module")
def evaluate(tiny_config_file, tiny_dataset, artifact, tmp_path_factory):
    def run(variant="causal", processes=1, artifact=artifact, check=True):
        output = tmp_path_factory.mktemp("slot_eval")
        done = run_script(
            "slot_eval.py",
            *("--config", tiny_config_file, "--variant", variant, "--seed", 7),
            *("--tokenize", tiny_dataset.parent, "--gptq", artifact, "--output", output),
            processes=processes,
            check=check,
        )
        return done, output

    return run


@pytest.fixture(scope="module")
def causal(evaluate):
    return evaluate("causal")[1]


@pytest.fixture(scope="module")
def leaky(evaluate):
    return evaluate("leaky")[1]


def test_each_target_has_one_row(causal, tiny_dataset):
    tokens = read_split(load_dataset(tiny_dataset), "val")
    table = pd.read_parquet(causal / "tokens.parquet")
    assert table["position"].tolist() == list(range(1, len(tokens)))
    assert np.array_equal(table["token"], tokens[1:])
    assert table["document"].iloc[0] == 0 and table["document"].iloc[-1] == 3
    starts = table["position"][table["document"].diff() > 0]
    assert (tokens[starts] == load_dataset(tiny_dataset).bos_id).all()
    assert table.dtypes.astype(str).to_dict() == {
        "position": "int64",
        "document": "int32",
        "token": "int32",
        "window": "int32",
        "lane": "int16",
        "nll_before": "float64",
        "nll_after": "float64",
        "bytes": "int16",
        "in_own_loss": "bool",
        "gain_lora": "float64",
        "gain_slot": "float64",
        "gain_ngram": "float64",
    }


def test_the_metrics_are_sums_over_the_table(causal, tiny_dataset):
    table = pd.read_parquet(causal / "tokens.parquet")
    metrics = json.loads((causal / "metrics.json").read_text())
    assert metrics["val_loss"] == pytest.approx(table["nll_after"].mean(), rel=1e-12)
    bits = table["nll_after"].sum() / math.log(2) / table["bytes"].sum()
    assert metrics["val_bpb"] == pytest.approx(bits, rel=1e-12)
    original = metrics["original_bytes"]
    assert original == load_dataset(tiny_dataset).original_bytes > 0
    by_original = metrics["val_bpb"] * metrics["bytes"] / original
    assert metrics["val_bpb_original"] == pytest.approx(by_original, rel=1e-12)
    assert metrics["gain_nats"] == pytest.approx(
        metrics["val_loss_before"] - metrics["val_loss"], abs=1e-12
    )
    for name in ("gain_lora", "gain_slot", "gain_ngram"):
        assert metrics[f"{name}_nats"] == pytest.approx(table[name].mean(), abs=1e-12) != 0
    assert metrics["adapters"] == [
        {"name": "lora", "title": "LoRA", "kernels": "plain"},
        {"name": "slot", "title": "SLOT", "kernels": "plain"},
        {"name": "ngram", "title": "n-gram cache", "kernels": "plain"},
    ]
    assert not metrics["shares_batches"]
    assert metrics["windows"] == table["window"].nunique()
    assert 0 < metrics["adapter_seconds"] < metrics["evaluation_seconds"]
    assert metrics["mean_iterations"] > 0
    assert metrics["cuda_graphs"] is False  # without a GPU
    assert not table["in_own_loss"].any()
    provenance = json.loads((causal / "provenance.json").read_text())
    assert provenance["splits"] == ["train"] and provenance["splits_read"] == []


@pytest.mark.parametrize(
    ("variant", "adapters"), [("causal", ["lora", "slot", "ngram"]), ("leaky", ["slot"])]
)
def test_the_gains_are_what_the_adapters_took_off_each_loss(variant, adapters, request):
    table = pd.read_parquet(request.getfixturevalue(variant) / "tokens.parquet")
    gains = table.filter(like="gain_")
    assert gains.columns.tolist() == [f"gain_{name}" for name in adapters]
    assert (gains != 0).any().all()
    taken_off = table["nll_before"] - table["nll_after"]
    np.testing.assert_allclose(gains.sum(axis=1), taken_off, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["causal", pytest.param("leaky", marks=pytest.mark.slow)])
def test_two_processes_write_the_same_table_as_one(evaluate, variant, request):
    alone = request.getfixturevalue(variant)
    done, together = evaluate(variant, processes=2)
    pd.testing.assert_frame_equal(
        pd.read_parquet(alone / "tokens.parquet"),
        pd.read_parquet(together / "tokens.parquet"),
        check_exact=True,
    )
    assert json.loads((together / "metrics.json").read_text())["processes"] == 2
    assert "window" in done.stderr  # the progress bar


def test_the_leaky_variant_is_marked_where_it_leaks(leaky):
    table = pd.read_parquet(leaky / "tokens.parquet")
    assert table["in_own_loss"].mean() > 0.3
    metrics = json.loads((leaky / "metrics.json").read_text())
    assert [adapter["name"] for adapter in metrics["adapters"]] == ["slot"]
    assert metrics["shares_batches"]


def test_a_shard_that_was_edited_is_refused(evaluate, tiny_dataset):
    """One token is another; its header, its length and all ids are as they should be."""
    shard = tiny_dataset.parent / "val_000000.bin"
    original = shard.read_bytes()
    try:
        shard.write_bytes(original[:-2] + bytes([original[-2] ^ 1, original[-1]]))
        done, output = evaluate(check=False)
    finally:
        shard.write_bytes(original)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{shard} has changed since it was made" in done.stderr
    assert not (output / "tokens.parquet").exists()


def test_an_artifact_of_another_vocabulary_is_refused(evaluate, model_settings, tmp_path):
    write_random_artifact(tmp_path, model_settings, vocab_size=300)
    done, _ = evaluate(artifact=tmp_path, check=False)
    assert done.returncode == 1
    assert "vocabulary of 300" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_artifact_is_refused(evaluate, tmp_path):
    done, _ = evaluate(artifact=tmp_path, check=False)
    assert done.returncode == 1
    assert "gptq" in done.stderr and "Traceback" not in done.stderr
