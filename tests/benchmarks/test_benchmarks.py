"""The benchmarks run, agree and give figures; how fast anything is, no test asks."""

import json
import math
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
import yaml

from fairway.data.dataset import load_dataset
from fairway.quantization.artifact import quantizable, storable
from fairway.quantization.integers import round_to_nearest
from fairway.recipe import complete, load_config
from fairway.settings import merge
from producers import write_artifact
from scattered import scattered_model
from tiny import ROOT
from trainings import SMALL, run_here

BENCHMARKS = ROOT / "benchmarks"
STAGES = (
    "train", "optimizer", "sliding", "slot_window", "slot_batch", "adapters", "ttt",
    "self_generation", "hessians", "gptq", "artifact",
)  # fmt: skip

sys.path.append(str(BENCHMARKS))
import bench_data  # noqa: E402


def run_program(name, *arguments):
    """Run a program in this process, which has imported torch already."""
    stdout, stderr, code = StringIO(), StringIO(), 0
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            run_here(str(BENCHMARKS / name), *arguments)
        except SystemExit as exit:
            code = exit.code
    return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


def run_benchmarks(dataset, config, *arguments):
    return run_program(
        "run.py", "--device", "cpu", "--size", "quickstart", "--repeats", 1, "--train-steps", 3,
        "--dataset", dataset, "--config", *config, *arguments,
    )  # fmt: skip


@pytest.fixture(scope="session")
def overlays(tiny_config_file, tmp_path_factory):
    """The tiny configuration, and batches of as few windows as its two lanes make."""
    path = tmp_path_factory.mktemp("overlay") / "batches.yaml"
    path.write_text("evaluation: {adapters: {slot: {batch_windows: 4}}}\n", encoding="utf-8")
    return [tiny_config_file, path]


@pytest.fixture(scope="session")
def finished(tiny_dataset, overlays, tmp_path_factory):
    """The run of every stage, and the JSON that it wrote."""
    output = tmp_path_factory.mktemp("benchmarks") / "bench.json"
    done = run_benchmarks(tiny_dataset, overlays, "--output", output)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done, json.loads(output.read_text())


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_gives_figures_and_agrees(finished, stage):
    _, document = finished
    rows = [row for row in document["rows"] if row["stage"] == stage]
    assert rows
    figures = [row[key] for row in rows for key in ("fast", "baseline", "ratio", "ceiling_share")]
    assert all(math.isfinite(figure) and figure > 0 for figure in figures if figure is not None)
    agreements = [check for row in rows for check in row["agreements"]]
    assert agreements or stage == "optimizer"
    assert all(check["difference"] <= check["tolerance"] for check in agreements)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_run_says_what_it_ran_on(finished):
    done, document = finished
    assert document["device"] == "CPU" and document["failed_stages"] == []
    assert not document["bars_apply"]
    assert document["ceilings"]["matmul_flops_per_second"] > 0
    assert {row["kernels"] for row in document["rows"]} == {"plain"}
    table = done.stdout[done.stdout.index("of ceiling") :]
    assert all(stage in table for stage in STAGES)
    assert "DISAGREES" not in table and "not judged here" in table


@pytest.mark.slow
@pytest.mark.nightly
def test_a_model_that_is_not_the_submissions_is_measured_without_a_baseline(
    tiny_dataset, overlays, tmp_path
):
    overlay, output = tmp_path / "features.yaml", tmp_path / "bench.json"
    overlay.write_text("model: {bigram_buckets: 0, smear: input, skip_gates: true}\n")
    stages = ["--stages", "train,sliding", "--output", output]
    done = run_benchmarks(tiny_dataset, [*overlays, overlay], *stages)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(output.read_text())["rows"]
    assert [row["stage"] for row in rows] == ["train", "train", "sliding"]
    assert all(row["baseline"] is None and row["ratio"] is None for row in rows)
    agreements = [check["what"] for row in rows for check in row["agreements"]]
    assert len(agreements) == 3, "with the plain formulation"
    refused = run_benchmarks(tiny_dataset, [*overlays, overlay], "--stages", "ttt")
    assert refused.returncode == 1 and "has other parts" in refused.stdout


@pytest.mark.slow
@pytest.mark.nightly
def test_every_adapter_is_measured_alone_and_with_the_others(finished):
    _, document = finished
    rows = [row for row in document["rows"] if row["stage"] == "adapters"]
    assert rows[0]["bars"][0]["text"] == ">= 13,000 tokens/s"
    assert len(rows[0]["agreements"]) == 4
    start = "time over sliding alone, "
    times = {row["measure"].removeprefix(start): row["fast"] for row in rows[1:]}
    composed = "lora + slot + ngram"
    assert list(times) == ["none", "ngram", "slot", "lora", composed] and times["none"] == 1
    assert rows[1]["note"] == "gain 0.00000 nats a token"
    assert all(f"{name} " in rows[5]["note"] for name in ("(lora", ", slot", ", ngram"))


def test_the_adapters_measured_follow_the_config():
    from bench_adapters import adapter_lists

    assert adapter_lists(["lora"]) == {"none": [], "lora": ["lora"]}
    assert adapter_lists([]) == {"none": []}


@pytest.mark.parametrize(("chunk_tokens", "windows"), [(64, 6), (256, 8), (512, 8), (1024, 16)])
def test_every_lane_learns_in_whole_chunks(chunk_tokens, windows):
    from bench_adapters import windows_per_lane
    from context import load_recipe

    evaluation = load_recipe("pr1350").sections("causal")["evaluation"]
    lora = {"chunk_tokens": chunk_tokens, "context_tokens": 1024}
    assert windows_per_lane(evaluation.changed(adapters=[{"lora": lora}])) == windows


def test_an_unknown_stage_is_refused(tiny_dataset, overlays):
    done = run_benchmarks(tiny_dataset, overlays, "--stages", "train,nonsense")
    assert done.returncode == 2
    assert "unknown stage nonsense: choose from train" in done.stderr


def test_the_baseline_is_the_same_function():
    """Every parameter away from its initial value: logits and all gradients of the banks."""
    from baseline import bank_gradients, from_fairway

    model = scattered_model(SMALL, deviation=0.1)
    baseline = from_fairway(model)
    tokens = torch.randint(
        SMALL.vocab_size, (3, SMALL.sequence_tokens + 1), generator=torch.Generator().manual_seed(1)
    )
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    torch.testing.assert_close(baseline(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    model.loss(inputs, targets).backward()
    baseline.loss(inputs, targets).backward()
    ours, theirs = bank_gradients(model), bank_gradients(baseline)
    for name, gradient in ours.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-3, atol=1e-6)
    count = sum(parameter.numel() for parameter in baseline.parameters())
    assert count == sum(parameter.numel() for parameter in model.parameters())


def test_the_baselines_optimizer_takes_the_librarys_step():
    """Clipping, Muon, AdamW and the average: one step of each from the same gradients."""
    from baseline import from_fairway
    from baseline_training import BaselineAverages, BaselineOptimizer
    from context import load_recipe

    from fairway.training.averaging import WeightAverages
    from fairway.training.trainer import optimizer_of

    settings = load_recipe("quickstart").sections("causal")["train"]
    model = scattered_model(SMALL, deviation=0.1)
    baseline = from_fairway(model)
    averages = WeightAverages(model, [0.9], 50, 0.0), BaselineAverages(baseline, [0.9])
    tokens = torch.randint(
        SMALL.vocab_size, (2, SMALL.sequence_tokens + 1), generator=torch.Generator().manual_seed(1)
    )
    for one in (model, baseline):
        one.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    library = optimizer_of(model, settings)
    library.step(1.0, settings.muon_momentum)
    BaselineOptimizer(baseline, settings).step()
    averages[0].update(0, 1.0)
    averages[1].update()
    expected = from_fairway(model).state_dict()
    for name, value in baseline.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        averages[1].averages[0.9]["mlp_up_bank"],
        averages[0].ema["ema_0.9"]["mlp_up_bank"],
        rtol=1e-3,
        atol=1e-4,
    )


def test_operations_per_token_at_the_reference_submissions_size():
    """By hand: 6 · 25.95 M of matrices, 3 M of the head, 69 M of causal attention."""
    from ceilings import matrix_parameters, train_flops_per_token, window_flops
    from context import load_recipe, model_config

    sections = load_recipe("pr1350").sections("causal")
    config = model_config(sections["model"], sections["train"], vocab_size=1024)
    assert matrix_parameters(config) == 25_952_256
    flops = train_flops_per_token(config)
    assert flops == pytest.approx(6 * 25.95e6 + 3.1e6 + 69.2e6, rel=1e-3)
    assert window_flops(config, 2048, 2048) == pytest.approx(2048 * flops / 3)
    assert 0.9 < window_flops(config, 2048, 64) / window_flops(config, 2048, 2048) < 0.95
    twice = config.changed(recurrent_layers=tuple(range(config.layers)), recurrence_passes=2)
    assert train_flops_per_token(twice) - flops == pytest.approx(flops - 6 * 1024 * 512)


def test_a_disagreement_is_named_and_nan_is_one():
    from results import Agreement, Row, disagreements, table

    checks = (Agreement("loss", math.nan, 1.0), Agreement("weights", 0.0, 0.0))
    row = Row("train", "tokens/s", 1.0, agreements=checks)
    assert disagreements([row]) == ["train: loss"]
    assert "differs by nan, allowed 1: DISAGREES" in table([row], bars_apply=True)


@pytest.fixture
def with_artifact(tiny_dataset, tiny_config_file, tmp_path):
    """Runs a program on held-out text and the artifact of a random model."""
    from context import model_config

    sections = load_config([tiny_config_file]).sections("causal")
    vocab_size = load_dataset(tiny_dataset).vocab_size
    model = scattered_model(model_config(sections["model"], sections["train"], vocab_size), 0.1)
    banks = {name: round_to_nearest(bank, bits=6) for name, bank in quantizable(model).items()}
    write_artifact(tmp_path / "artifact.bin", model.config, storable(model, banks))

    def run(program, *arguments):
        return run_program(
            program, "--dataset", tiny_dataset, "--config", tiny_config_file,
            "--artifact", tmp_path / "artifact.bin", *arguments,
        )  # fmt: skip

    return run


def test_adapters_are_tuned_on_training_text(with_artifact):
    overlays = (
        "{evaluation: {adapters: []}}",
        "{evaluation: {adapters: {lora: {learning_rate: 0.003}}}}",
    )
    tries = ["--tokens", 400, *(word for overlay in overlays for word in ("--try", overlay))]
    done = with_artifact("tune_adapters.py", *tries)
    assert done.returncode == 0, done.stderr
    assert "gain_lora_nats" in done.stdout and "tokens_per_second" in done.stdout
    wrong = with_artifact(
        "tune_adapters.py", *tries, "--try", "{evaluation: {adapters: {lora: {rank: 0}}}}"
    )
    assert wrong.returncode == 1 and "evaluation.adapters.lora.rank" in wrong.stderr
    assert not wrong.stdout, "all settings are checked before any is tried"


def test_ngram_weights_are_fitted_on_training_text(with_artifact, tiny_config):
    done = with_artifact("fit_ngram.py", "--split", "adaptation")
    assert done.returncode == 0, done.stderr
    gains = [float(gain) for gain in re.findall(r": gain (-?[0-9.]+) nats", done.stdout)]
    assert len(gains) == 2 and gains[1] > gains[0], (
        "fitted weights gain more where they were fitted"
    )
    found = yaml.safe_load(done.stdout[done.stdout.index("evaluation:") :])
    evaluation = complete(merge(tiny_config, found)).sections("causal")["evaluation"]
    settings = next(one.settings for one in evaluation.adapters if one.name == "ngram")
    assert settings.model_dump(mode="json") == found["evaluation"]["adapters"]["ngram"]
    short = with_artifact("fit_ngram.py", "--tokens", 20)
    assert short.returncode == 1 and "raise --tokens" in short.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, or its interpreter")
def test_kernels_are_timed_one_by_one(monkeypatch):
    done = run_program("kernels.py", "--sequences", 1, "--only", "mlp: up,forward")
    assert done.returncode == 0, done.stderr[-3000:]
    timed = dict(re.findall(r"^(.+): (\d+\.\d+) ms$", done.stdout, re.MULTILINE))
    assert {"mlp: up and activation", "attention, sdpa: forward"} <= set(timed)
    assert not any("norm" in name for name in timed)
    assert all(float(milliseconds) > 0 for milliseconds in timed.values())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    refused = run_program("kernels.py", "--device", "cpu")
    assert refused.returncode != 0 and "runtime.kernels is 'fused'" in refused.stderr


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """Shards of 20 MB as a dataset, and a validation text of 20,000 tokens."""
    folder = tmp_path_factory.mktemp("synthetic")
    bench_data.write_synthetic_shards(folder / "shards", 0.02)
    bench_data.tokenize(folder)
    bench_data.write_scored_text(folder, 20_000)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "train", "ema", "ttt", "gptq", "slot_eval", "audit", "windows", "n-gram index",
        "scores and table", "report's sums", "audit of the table", "overlap",
    ],
)  # fmt: skip
def test_what_data_costs_is_measured(synthetic, name):
    done = run_program("bench_data.py", "--measure", name, "--folder", synthetic)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["seconds"] > 0 and found["share"] > 0 and found["peak"] >= 0


def test_data_of_no_size_is_refused():
    done = run_program("bench_data.py")
    assert done.returncode == 2 and "name --gigabytes or --validation-tokens" in done.stderr
