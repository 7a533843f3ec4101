"""Training and averaging as stages: learned, resumed, interrupted, distributed."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fairway.data.dataset import load_dataset
from fairway.errors import UserError
from fairway.evaluation import plain
from fairway.evaluation.plain import SplitScore, evaluate_split
from fairway.files import sha256_of
from fairway.model.gpt import GPT
from fairway.model.weights import load_model
from fairway.recipe import load_config
from fairway.settings import validated
from fairway.training.checkpoint import tensors_under, with_prefix
from fairway.training.curve import read_curve_file
from fairway.training.selection import EMASettings, select_average
from fairway.training.trainer import TrainSettings, check_batch
from tiny import ROOT, SCRIPTS, run_script
from trainings import SMALL, run_here, train_arguments

COLUMNS = ["step", "loss", "lr_scale", "seconds", "tokens", "held_out_bpb"]


def train(config_file, manifest, folder, seed=7):
    run_here("train.py", *train_arguments(config_file, manifest, folder, seed))


def changed_config(tiny_config, path, **train):
    path.write_text(yaml.safe_dump({**tiny_config, "train": {**tiny_config["train"], **train}}))
    return path


def test_training_learns_and_reports(trained):
    curve = pd.read_parquet(trained / "metrics.parquet")
    assert list(curve.columns) == COLUMNS
    assert curve.step.tolist() == list(range(1, 13))
    assert curve.loss.iloc[-1] < curve.loss.iloc[0] - 0.3
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["attention_backend"] == "sdpa" and metrics["train_tokens"] == 12 * 256
    provenance = json.loads((trained / "provenance.json").read_text())
    assert provenance["splits"] == ["train"]
    written = sha256_of(trained / "weights.safetensors")
    assert provenance["outputs"]["weights.safetensors"] == written


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    trained, tiny_config_file, tiny_dataset, tmp_path
):
    train(tiny_config_file, tiny_dataset, tmp_path / "same")
    train(tiny_config_file, tiny_dataset, tmp_path / "other", seed=8)
    weights = sha256_of(trained / "weights.safetensors")
    assert sha256_of(tmp_path / "same/train/weights.safetensors") == weights
    assert sha256_of(tmp_path / "other/train/weights.safetensors") != weights


def test_a_finished_run_is_not_trained_again(tiny_config_file, tiny_dataset, tmp_path, capsys):
    train(tiny_config_file, tiny_dataset, tmp_path)
    capsys.readouterr()
    written = (tmp_path / "train/weights.safetensors").stat().st_mtime_ns
    identity = json.loads((tmp_path / "train/metrics.json").read_text())["identity"]
    left = tmp_path / "checkpoints" / identity[:16] / "metrics.jsonl"
    left.parent.mkdir()
    left.touch()  # as by one that was killed at its very end
    train(tiny_config_file, tiny_dataset, tmp_path)
    assert "remove it to train again" in capsys.readouterr().err
    assert not left.parent.exists()
    assert (tmp_path / "train/weights.safetensors").stat().st_mtime_ns == written
    (tmp_path / "train/averages.safetensors").unlink()
    train(tiny_config_file, tiny_dataset, tmp_path)
    assert (tmp_path / "train/weights.safetensors").stat().st_mtime_ns > written


def start(tiny_config, tiny_dataset, folder):
    """A run with its first checkpoints, and its config."""
    config = changed_config(
        tiny_config, folder / "config.json", checkpoint_seconds=0.01, held_out_seconds=1e-6
    )
    arguments = train_arguments(config, tiny_dataset, folder)
    command = [sys.executable, str(SCRIPTS / "train.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not list((folder / "checkpoints").glob("*/step-*3")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)
    return process, config


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_to_the_same_bytes(
    trained, tiny_config, tiny_dataset, tmp_path, capsys, number
):
    """Nor does held-out text that it measures, which the other run did not, change its weights."""
    process, config = start(tiny_config, tiny_dataset, tmp_path)
    (live,) = (tmp_path / "checkpoints").glob("*/metrics.jsonl")
    before = read_curve_file(live, "train").rows
    process.send_signal(number)
    output = process.communicate(timeout=60)[1]
    so_far = read_curve_file(live, "train")
    assert so_far.settings["train"]["max_steps"] == 12
    assert before and before == so_far.rows[: len(before)]
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), output
    assert not (tmp_path / "train/weights.safetensors").exists()
    if number != signal.SIGKILL:
        assert output.count("checkpoint of step") >= 2
    train(config, tiny_dataset, tmp_path)
    assert "resumed after step" in capsys.readouterr().err
    for name in ("weights.safetensors", "averages.safetensors"):
        assert sha256_of(tmp_path / "train" / name) == sha256_of(trained / name)
    curve = pd.read_parquet(tmp_path / "train/metrics.parquet")
    assert list(curve.columns) == COLUMNS
    assert curve.step.tolist() == list(range(1, 13)) and curve.seconds.is_monotonic_increasing
    assert curve.held_out_bpb.notna().all()
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.slow
def test_a_frozen_run_that_was_taken_over_writes_nothing(
    trained, tiny_config, tiny_dataset, tmp_path, capsys
):
    process, config = start(tiny_config, tiny_dataset, tmp_path)
    process.send_signal(signal.SIGSTOP)
    train(config, tiny_dataset, tmp_path)
    assert f"process {process.pid} is stopped and is taken over" in capsys.readouterr().err
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    process.send_signal(signal.SIGCONT)
    line = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 1
    assert line.startswith("error: another process has taken over ")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    for name in ("weights.safetensors", "averages.safetensors"):
        assert sha256_of(tmp_path / "train" / name) == sha256_of(trained / name)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_to_the_same_losses(
    trained, tiny_config, tiny_dataset, tmp_path, processes
):
    config = changed_config(tiny_config, tmp_path / "config.json", held_out_seconds=1e-6)
    arguments = train_arguments(config, tiny_dataset, tmp_path)
    run_script("train.py", *arguments, processes=processes)
    one, many = (
        pd.read_parquet(folder / "metrics.parquet") for folder in (trained, tmp_path / "train")
    )
    np.testing.assert_allclose(many.loss, one.loss, rtol=2e-4)
    assert one.held_out_bpb.isna().all() and many.held_out_bpb.notna().all()
    metrics = json.loads((tmp_path / "train/metrics.json").read_text())
    assert metrics["processes"] == processes


def test_a_batch_that_processes_do_not_divide_is_refused():
    settings = TrainSettings(sequence_tokens=32, batch_tokens=96, micro_batch_sequences=4)
    check_batch(settings, world_size=3)
    with pytest.raises(UserError, match=r"train.batch_tokens 96 is 3 sequences, which 2 processes"):
        check_batch(settings, world_size=2)
    with pytest.raises(UserError, match=r"micro_batch_sequences 4 does not divide the 6 sequences"):
        check_batch(settings.changed(batch_tokens=384), world_size=2)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"batch_tokens": 100}, "train.sequence_tokens 2048 does not divide train.batch_tokens"),
        ({"ema_decays": [0.9, 0.9]}, "train.ema_decays: found .* expected each entry once"),
        ({"adam_betas": [0.9]}, "train.adam_betas: found .* at least 2"),
        ({"max_seconds": 0}, "train.max_seconds: found 0, expected more than 0"),
        ({"gradient_clp": 1}, "unknown key gradient_clp; did you mean gradient_clip"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        validated(TrainSettings, changes, "train")


def test_a_diverging_run_stops_and_names_the_last_good_checkpoint(
    tiny_config, tiny_dataset, tmp_path, capsys
):
    config = changed_config(
        tiny_config, tmp_path / "c.json",
        embedding_learning_rate=1e38, gradient_clip=1e30, checkpoint_seconds=1e-9,
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        train(config, tiny_dataset, tmp_path)
    assert ended.value.code == 1
    output = capsys.readouterr().err
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: training loss is nan at step") and "step-0000" in last
    assert "Traceback" not in output


def test_held_out_bpb_is_that_of_the_weights_as_they_are(
    tiny_config, tiny_dataset, tmp_path, capsys
):
    config = changed_config(
        tiny_config, tmp_path / "c.json",
        held_out_seconds=1e-6, held_out_tokens=300, log_every_steps=100,
    )  # fmt: skip
    train(config, tiny_dataset, tmp_path)
    measured = pd.read_parquet(tmp_path / "train/metrics.parquet").held_out_bpb
    model = load_model(tmp_path / "train/weights.safetensors", torch.device("cpu"))
    score = evaluate_split(model, load_dataset(tiny_dataset), "selection", most_tokens=300)
    assert score.tokens == 299
    assert len(measured) == 12 and measured.iloc[-1] == score.as_metrics()["val_bpb"]
    assert "held-out bpb of step 12: " in capsys.readouterr().err


def test_held_out_text_is_measured_where_the_clock_passes_a_multiple(
    tiny_config, tiny_dataset, tmp_path
):
    config = changed_config(tiny_config, tmp_path / "c.json", held_out_seconds=0.05)
    train(config, tiny_dataset, tmp_path)
    curve = pd.read_parquet(tmp_path / "train/metrics.parquet")
    marks = curve.seconds // 0.05
    assert curve.held_out_bpb.notna().tolist() == (marks > marks.shift(fill_value=0)).tolist()


def test_a_held_out_bpb_that_is_not_finite_ends_the_training(
    tiny_config, tiny_dataset, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(plain, "evaluate_split", lambda *_, **__: SplitScore(math.nan, 10, 10))
    config = changed_config(tiny_config, tmp_path / "c.json", held_out_seconds=1e-6)
    with pytest.raises(SystemExit):
        train(config, tiny_dataset, tmp_path)
    assert "error: held-out bpb is nan at step 1: lower the " in capsys.readouterr().err


def test_ema_decay_is_chosen_on_training_text(trained, averaged):
    metrics = json.loads((averaged / "metrics.json").read_text())
    losses = metrics["selection_losses"]
    assert set(losses) == {"ema_0.9", "ema_0.5"}
    assert metrics["average"] == min(losses, key=losses.get)
    chosen = load_file(averaged / "weights.safetensors")
    tracked = tensors_under(load_file(trained / "averages.safetensors"), metrics["average"])
    assert all(torch.equal(chosen[name], tracked[name]) for name in chosen)
    provenance = json.loads((averaged / "provenance.json").read_text())
    assert provenance["splits"] == ["train"]


def test_a_decay_that_is_not_tracked_is_refused(tiny_config, tmp_path):
    config = tmp_path / "c.json"
    config.write_text(json.dumps({**tiny_config, "ema": {"decay": 0.123}}))
    with pytest.raises(UserError, match=r"ema.decay 0.123 is not tracked: .* \[0.9, 0.5\]"):
        load_config([config])


def test_an_average_that_train_did_not_keep_is_refused():
    model = GPT(SMALL)
    averages = with_prefix("ema_0.9", model.state_dict())
    settings = EMASettings(kind="swa")
    with pytest.raises(UserError, match="no average 'swa' was tracked; train kept ema_0.9"):
        select_average(model, averages, settings, read_selection_tokens=list)
    assert select_average(model, averages, EMASettings(decay=0.9), list) == ("ema_0.9", {})
    assert select_average(model, averages, EMASettings(kind="none"), list) == ("last", {})
