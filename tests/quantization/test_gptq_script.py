"""The gptq stage as a user runs it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fairway.data.dataset import load_dataset
from fairway.evaluation.plain import evaluate_split
from fairway.files import sha256_of
from fairway.model.spec import BANKS, GPTConfig
from fairway.model.weights import save_model
from fairway.packing import code_bytes
from fairway.quantization.artifact import load_artifact, stream_table
from fairway.recipe import load_config
from producers import write_record
from scattered import scattered_model
from tiny import run_script

EXAMPLES = Path(__file__).parents[2] / "docs/examples"


@pytest.fixture(scope="module")
def weights(tiny_config_file, tiny_dataset, tmp_path_factory):
    """A folder as ttt leaves it, with a model that was never trained."""
    sections = load_config([tiny_config_file]).sections("causal")
    vocab_size = load_dataset(tiny_dataset).vocab_size
    config = GPTConfig(
        **dict(sections["model"]),
        vocab_size=vocab_size,
        sequence_tokens=sections["train"].sequence_tokens,
    )
    folder = tmp_path_factory.mktemp("ttt")
    save_model(folder / "weights.safetensors", scattered_model(config, deviation=0.1))
    write_record(folder, ["train"])
    return folder


@pytest.fixture(scope="module")
def stage(tiny_config_file, tiny_dataset, weights, tmp_path_factory):
    """Run the stage with changes to the config; return the process and the output folder."""

    def run(check=True, beside=None, **changes):
        folder = tmp_path_factory.mktemp("gptq")
        overlay = (beside or folder) / "overlay.yaml"
        overlay.write_text(json.dumps(changes))
        arguments = ["--config", tiny_config_file, overlay, "--variant", "causal", "--seed", 7]
        arguments += ["--tokenize", tiny_dataset.parent, "--ttt", weights, "--output", folder]
        return run_script("gptq.py", *arguments, check=check), folder

    return run


@pytest.fixture(scope="module")
def finished(stage):
    return stage()[1]


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_metrics_are_those_of_the_artifact_on_disk(finished, tiny_dataset):
    metrics = read(finished, "metrics.json")
    score = evaluate_split(
        load_artifact(finished / "artifact.bin"), load_dataset(tiny_dataset), "val"
    )
    for key, value in score.as_metrics().items():
        assert metrics[key] == value, key
    assert metrics["artifact_bytes"] == (finished / "artifact.bin").stat().st_size
    assert metrics["code_bytes"] == code_bytes()
    assert metrics["total_bytes"] == metrics["artifact_bytes"] + metrics["code_bytes"]
    table = stream_table((finished / "artifact.bin").read_bytes())
    assert metrics["codecs"] == {name: codec for name, (codec, _) in table.items()}
    assert metrics["streams"] == {name: length for name, (_, length) in table.items()}
    assert metrics["limit_bytes"] == 16_000_000 and metrics["zeros"] == 0
    assert metrics["mean_error"] < metrics["mean_error_round_to_nearest"]
    assert metrics["training_seconds"] == 0


def test_layer_table_has_a_row_for_every_matrix(finished):
    layers = pd.read_parquet(finished / "layers.parquet")
    assert layers.groupby("bank", sort=False).size().to_dict() == dict(
        zip(BANKS, (6, 6, 3, 3), strict=True)
    )
    assert np.isfinite(layers.drop(columns="bank").to_numpy(float)).all()


def test_calibration_decides_what_the_ancestry_gains(finished, stage):
    generated = read(finished, "provenance.json")
    assert generated["splits_read"] == [] and generated["splits"] == ["train"]
    assert generated["outputs"]["artifact.bin"] == sha256_of(finished / "artifact.bin")
    _, folder = stage(gptq={"calibration": "train"})
    assert read(folder, "provenance.json")["splits_read"] == ["train"]
    metrics = read(folder, "metrics.json")
    assert metrics["calibration"] == "train" and metrics["training_seconds"] > 0


def test_a_quantizer_beside_the_config_is_used(finished, stage, tmp_path):
    name = "group_int4:GroupInt4"
    (tmp_path / "group_int4.py").write_text((EXAMPLES / "group_int4.py").read_text())
    _, folder = stage(gptq={"quantizer": {name: {"group_columns": 8}}}, beside=tmp_path)
    metrics = read(folder, "metrics.json")
    assert metrics["quantizer"] == name and metrics["calibration"] is None
    assert list(metrics["streams"]) == ["float16", "float32", "int4", "int8", "scales"]
    assert metrics["artifact_bytes"] < read(finished, "metrics.json")["artifact_bytes"]
    assert np.isfinite(metrics["val_loss"])


def test_a_second_run_writes_the_same_artifact(finished, stage):
    _, again = stage()
    assert sha256_of(again / "artifact.bin") == sha256_of(finished / "artifact.bin")


def test_codes_are_zeroed_to_fit_the_budget(finished, stage):
    limit = read(finished, "metrics.json")["total_bytes"] - 200
    _, folder = stage(budgets={"artifact_bytes": limit})
    metrics = read(folder, "metrics.json")
    assert metrics["total_bytes"] <= limit and metrics["zeros"] > 0


def test_a_budget_out_of_reach_is_one_clear_line(stage):
    done, folder = stage(check=False, budgets={"artifact_bytes": 1000})
    assert done.returncode == 1 and not (folder / "artifact.bin").exists()
    assert "budgets.artifact_bytes" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_missing_weights_are_one_clear_line(tiny_config_file, tiny_dataset, tmp_path):
    arguments = ["--config", tiny_config_file, "--variant", "causal", "--seed", 7]
    arguments += ["--tokenize", tiny_dataset.parent, "--ttt", tmp_path]
    arguments += ["--output", tmp_path / "out"]
    done = run_script("gptq.py", *arguments, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "weights.safetensors is missing" in done.stderr
