"""Optimiser, averages, schedule, and the training stage: resumed, interrupted, distributed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_model import CONFIG

from fairway.errors import UserError
from fairway.files import sha256_of
from fairway.model.gpt import GPT
from fairway.training.averaging import WeightAverages, tracker_weights
from fairway.training.checkpoint import Checkpoints, exclusive
from fairway.training.muon import BankShards, orthogonalise, update_scale
from fairway.training.optimizers import Optimizer, parameter_groups
from fairway.training.schedule import learning_rate_scale, muon_momentum
from tiny import ROOT, SCRIPTS, run_script


def train(config_file, dataset, folder, seed=7, processes=1, check=True):
    return run_script(
        "train.py", "--config", config_file, "--dataset", dataset, "--seed", seed,
        "--output", folder / "train", "--checkpoints", folder / "checkpoints",
        processes=processes, check=check,
    )  # fmt: skip


def changed_config(tiny_config, path, **train):
    path.write_text(yaml.safe_dump({**tiny_config, "train": {**tiny_config["train"], **train}}))
    return path


@pytest.fixture(scope="module")
def trained(tiny_config_file, tiny_dataset, tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_config_file, tiny_dataset, folder)
    return folder / "train"


@given(st.integers(1, 5), st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_orthogonalised_singular_values_lie_in_the_newton_schulz_band(n, rows, columns, seed):
    matrices = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(seed))
    values = torch.linalg.svdvals(orthogonalise(matrices, steps=10))
    # Square Gaussian matrices can be nearly singular: only what starts well above zero is lifted.
    start = torch.linalg.svdvals(matrices)
    lifted = values[start > 0.02 * matrices.norm(dim=(-2, -1))[:, None]]
    assert values.max() < 1.3 and lifted.min() > 0.5


def test_muon_step_equals_the_formula():
    bank = torch.nn.Parameter(torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0)))
    gradient = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1))
    before, shards = bank.detach().clone(), BankShards(bank, rank=0, world_size=1)
    with torch.no_grad():
        for _ in range(2):
            shards.step(
                gradient, learning_rate=0.1, momentum=0.9, weight_decay=0.5, newton_schulz_steps=5
            )
    momentum, expected = torch.zeros_like(gradient), before
    for _ in range(2):
        momentum = 0.9 * momentum + gradient
        update = orthogonalise(gradient + 0.9 * momentum, 5)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * np.sqrt(2.0) * update
    torch.testing.assert_close(bank.detach(), expected)
    assert update_scale(4, 8) == 1.0


def optimizer_of(model: GPT) -> Optimizer:
    return Optimizer(
        model,
        learning_rates={"matrix": 0.1, "embedding": 0.1, "scalar": 0.1},
        betas=(0.9, 0.95), weight_decay=0.0, newton_schulz_steps=5, gradient_clip=1.0,
    )  # fmt: skip


def test_every_parameter_is_in_exactly_one_group_and_moves():
    model = GPT(CONFIG, seed=0)
    groups = parameter_groups(model)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    optimizer = optimizer_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0, 0.9)
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_without_value_layers_trains():
    model = GPT(replace(CONFIG, value_layers=()), seed=0)
    optimizer = optimizer_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.arange(20).view(1, -1)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step(1.0, 0.9)
    unmoved = {
        name for name, value in model.state_dict().items() if torch.equal(before[name], value)
    }
    assert {"value_embedding", "value_projection"} <= unmoved and "smear_gate" not in unmoved
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_gradients_are_clipped_by_their_global_norm():
    model = GPT(CONFIG, seed=0)
    optimizer = Optimizer(
        model, learning_rates={}, betas=(0.9, 0.95), weight_decay=0.0,
        newton_schulz_steps=5, gradient_clip=0.3,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    shards = {name: bank.reduce_gradient() for name, bank in optimizer.banks.items()}
    total = sum(parameter.numel() for parameter in model.parameters())
    expected = 0.3 / np.sqrt(4 * total)
    assert optimizer._clip_factor(shards).item() == pytest.approx(expected, rel=1e-4)


def test_averages_equal_their_definition():
    model = torch.nn.Linear(3, 2)
    averages = WeightAverages(model, [0.9, 0.5], swa_every_steps=2, swa_scale=0.5)
    ema, seen = model.weight.detach().clone(), []
    for step in range(6):
        with torch.no_grad():
            model.weight.add_(step + 1.0)
        averages.update(step, learning_rate_scale=1 - step / 5)
        ema = 0.9 * ema + 0.1 * model.weight.detach()
        if (step + 1) % 2 == 0 and 1 - step / 5 < 0.5:
            seen.append(model.weight.detach().clone())
    tensors = averages.state_tensors()
    torch.testing.assert_close(tracker_weights(tensors, "ema_0.9")["weight"], ema)
    torch.testing.assert_close(tracker_weights(tensors, "swa")["weight"], torch.stack(seen).mean(0))
    assert tracker_weights(tensors, "ema_0.7") is None


def test_learning_rate_schedule_by_steps_and_by_time():
    by_step = dict(max_steps=100, max_seconds=None, warmdown_steps=40)
    assert learning_rate_scale(0, 0.0, **by_step) == 1.0
    assert learning_rate_scale(80, 0.0, **by_step) == pytest.approx(0.5)
    by_time = dict(max_steps=10**6, max_seconds=600.0, warmdown_steps=40)
    # A step takes 1 s: the warmdown begins 40 s before the end.
    assert learning_rate_scale(500, 500.0, **by_time) == 1.0
    assert learning_rate_scale(580, 580.0, **by_time) == pytest.approx(0.5)
    assert learning_rate_scale(610, 610.0, **by_time) == 0.0
    assert muon_momentum(750, start=0.92, end=0.99, warmup_steps=1500) == pytest.approx(0.955)
    assert muon_momentum(9999, start=0.92, end=0.99, warmup_steps=1500) == 0.99


def test_training_learns_and_reports(trained):
    curve = pd.read_parquet(trained / "metrics.parquet")
    assert list(curve.columns) == ["step", "loss", "lr_scale", "seconds", "tokens"]
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


def test_a_finished_run_is_not_trained_again(tiny_config_file, tiny_dataset, tmp_path):
    train(tiny_config_file, tiny_dataset, tmp_path)
    written = (tmp_path / "train/weights.safetensors").stat().st_mtime_ns
    done = train(tiny_config_file, tiny_dataset, tmp_path)
    assert "remove it to train again" in done.stderr
    assert (tmp_path / "train/weights.safetensors").stat().st_mtime_ns == written
    (tmp_path / "train/averages.safetensors").unlink()
    train(tiny_config_file, tiny_dataset, tmp_path)
    assert (tmp_path / "train/weights.safetensors").stat().st_mtime_ns > written


def interrupt(tiny_config, tiny_dataset, folder, number):
    """Start a run, signal it after its first checkpoints, return its output."""
    config = changed_config(tiny_config, folder / "config.json", checkpoint_seconds=0.01)
    command = [
        sys.executable, str(SCRIPTS / "train.py"), "--config", str(config), "--seed", "7",
        "--dataset", str(tiny_dataset), "--output", str(folder / "train"),
        "--checkpoints", str(folder / "checkpoints"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not list((folder / "checkpoints").glob("*/step-*3")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    return process, process.communicate(timeout=60)[1], config


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_to_the_same_bytes(
    trained, tiny_config, tiny_dataset, tmp_path, number
):
    process, output, config = interrupt(tiny_config, tiny_dataset, tmp_path, number)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), output
    assert not (tmp_path / "train/weights.safetensors").exists()
    if number != signal.SIGKILL:
        assert output.count("checkpoint of step") >= 2
    done = train(config, tiny_dataset, tmp_path)
    assert "resumed after step" in done.stderr
    for name in ("weights.safetensors", "averages.safetensors"):
        assert sha256_of(tmp_path / "train" / name) == sha256_of(trained / name)
    curve = pd.read_parquet(tmp_path / "train/metrics.parquet")
    assert curve.step.tolist() == list(range(1, 13)) and curve.seconds.is_monotonic_increasing
    assert not list((tmp_path / "checkpoints").glob("*/step-*"))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_to_the_same_losses(
    trained, tiny_config, tiny_config_file, tiny_dataset, tmp_path, processes
):
    train(tiny_config_file, tiny_dataset, tmp_path, processes=processes)
    one, many = (
        pd.read_parquet(folder / "metrics.parquet") for folder in (trained, tmp_path / "train")
    )
    np.testing.assert_allclose(many.loss, one.loss, rtol=2e-4)
    metrics = json.loads((tmp_path / "train/metrics.json").read_text())
    assert metrics["processes"] == processes


def test_a_batch_that_processes_do_not_divide_is_refused(tiny_config, tiny_dataset, tmp_path):
    config = changed_config(tiny_config, tmp_path / "c.json", batch_tokens=96)
    done = train(config, tiny_dataset, tmp_path, processes=2, check=False)
    assert done.returncode != 0
    assert "train.batch_tokens 96 is 3 sequences, which 2 processes do not divide" in done.stderr


def test_a_diverging_run_stops_and_names_the_last_good_checkpoint(
    tiny_config, tiny_dataset, tmp_path
):
    config = changed_config(
        tiny_config, tmp_path / "c.json",
        embedding_learning_rate=1e38, gradient_clip=1e30, checkpoint_seconds=1e-9,
    )  # fmt: skip
    done = train(config, tiny_dataset, tmp_path, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: training loss is nan at step") and "step-0000" in last
    assert "Traceback" not in done.stderr


def test_two_checkpoints_are_kept_and_a_damaged_one_is_not_counted(tmp_path):
    checkpoints = Checkpoints(tmp_path, "a" * 64)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": torch.full((2,), float(step))}, {"seconds": step})
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["step-00000002", "step-00000003"]
    newest = checkpoints.folder / "step-00000003/tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    (checkpoints.folder / ".partial-00000004").mkdir()
    tensors, state = checkpoints.load_latest()
    assert state["step"] == 2 and tensors["x"].tolist() == [2.0, 2.0]
    assert Checkpoints(tmp_path, "b" * 64).load_latest() is None


def test_a_second_process_waits_for_the_lock(tmp_path):
    code = (
        "import sys, time; from fairway.training.checkpoint import exclusive\n"
        f"with exclusive({str(tmp_path)!r}): print('held', flush=True); time.sleep(1.5)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    assert holder.stdout.readline() == b"held\n"
    started = time.monotonic()
    with exclusive(tmp_path):
        assert holder.poll() is not None or time.monotonic() - started > 0.5
    holder.wait()


def test_ema_decay_is_chosen_on_training_text(trained, tiny_config_file, tiny_dataset, tmp_path):
    run_script(
        "ema.py", "--config", tiny_config_file, "--dataset", tiny_dataset, "--train", trained,
        "--seed", 7, "--output", tmp_path / "ema",
    )  # fmt: skip
    metrics = json.loads((tmp_path / "ema/metrics.json").read_text())
    losses = metrics["selection_losses"]
    assert set(losses) == {"ema_0.9", "ema_0.5"}
    assert metrics["average"] == min(losses, key=losses.get)
    chosen = load_file(tmp_path / "ema/weights.safetensors")
    tracked = tracker_weights(load_file(trained / "averages.safetensors"), metrics["average"])
    assert all(torch.equal(chosen[name], tracked[name]) for name in chosen)
    provenance = json.loads((tmp_path / "ema/provenance.json").read_text())
    assert provenance["splits"] == ["train"]


def test_an_untracked_average_is_refused(trained, tiny_config, tiny_dataset, tmp_path):
    config = tmp_path / "c.json"
    config.write_text(json.dumps({**tiny_config, "ema": {"decay": 0.123}}))
    done = run_script(
        "ema.py", "--config", config, "--dataset", tiny_dataset, "--train", trained,
        "--seed", 7, "--output", tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "ema.decay 0.123 is not tracked" in done.stderr


def test_unwritable_results_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="choose another `results` folder"),
        exclusive(tmp_path / "file/folder"),
    ):
        pass
