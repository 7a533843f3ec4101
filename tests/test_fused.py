"""The fused kernels against the plain formulation and float64, on a GPU or in the interpreter."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_model import CONFIG

from evaluators import SMALL, changed
from fairway.evaluation.adapters.lora import RowLora
from fairway.model import gpt
from fairway.model.gpt import GPT, PROJECTIONS
from fairway.quantization.integers import fake_quantize_int6
from tiny import ROOT

pytest.importorskip("triton")
from fairway.model.fused import forward_backward as fused
from fairway.model.fused.forward_backward import Layer as fused_layer
from fairway.model.fused.loss import cross_entropy
from fairway.model.fused.residual import rms_norm, rms_norm_backward
from fairway.training.gradients import launched, replayed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}

# Widths that no tile divides; encoder and decoder halves with and without a block of their own.
CONFIGS = {
    "odd": replace(CONFIG, width=36, heads=6, kv_heads=3),
    "even": replace(CONFIG, layers=4, value_layers=(0,)),
    "no value embedding": replace(CONFIG, layers=3, value_layers=()),
    "all dimensions rotated": replace(CONFIG, layers=2, value_layers=(1,), rotary_dimensions=6),
}


def random_model(config: gpt.GPTConfig, kernel_kind: str) -> GPT:
    model = GPT(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.kernels = kernel_kind
    return model.to(DEVICE)


def batch(rows: int = 3, length: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 50, (rows, length + 1), generator=generator).to(DEVICE)
    return tokens[:, :-1], tokens[:, 1:]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture
def copied_keys(monkeypatch):
    """Every query head with a key of its own, as flash-attn-4 gets them, from any backend."""
    monkeypatch.setattr(fused, "key_copies", lambda backend, queries_per_key: queries_per_key)


@pytest.mark.parametrize("transform", [None, fake_quantize_int6], ids=["", "late QAT"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_the_plain_ones(name, transform):
    compare_losses_and_gradients(name, transform)


@pytest.mark.parametrize("name", ["odd", "even"])
def test_loss_and_gradients_with_copied_keys_are_the_plain_ones(name, copied_keys):
    assert CONFIGS[name].heads == 2 * CONFIGS[name].kv_heads
    compare_losses_and_gradients(name, None)


def compare_losses_and_gradients(name, transform):
    found = {}
    for kind in ("plain", "fused"):
        model = random_model(CONFIGS[name], kind)
        model.matrix_transform = transform
        loss = model.loss(*batch())
        (2 * loss).backward()
        found[kind] = loss.detach(), {n: p.grad for n, p in model.named_parameters()}
    torch.testing.assert_close(found["fused"][0], found["plain"][0], rtol=1e-6, atol=0)
    for parameter, plain in found["plain"][1].items():
        if plain is None:  # nothing of this parameter exists in this configuration
            continue
        error = (found["fused"][1][parameter] - plain).norm() / plain.norm()
        assert error < 2e-5, f"{parameter}: {error}"


def test_evaluation_shares_keys(copied_keys, monkeypatch):
    heads = []

    def watched(queries, keys, values, *options):
        heads.append((queries.shape[2], keys.shape[2], values.shape[2]))
        return attend(queries, keys, values, *options)

    attend = fused.attend
    monkeypatch.setattr(fused, "attend", watched)
    model, (tokens, targets) = random_model(CONFIGS["odd"], "fused"), batch()
    model.loss(tokens, targets)
    assert set(heads) == {(6, 6, 6)}
    heads.clear()
    with torch.no_grad():
        model(tokens)
    assert set(heads) == {(6, 3, 3)}


def test_logits_of_all_places_and_of_the_last_ones():
    tokens, _ = batch()
    with torch.no_grad():
        plain, fused = (random_model(CONFIG, kind) for kind in ("plain", "fused"))
        expected = plain(tokens)
        torch.testing.assert_close(fused(tokens), expected, **TOLERANCE)
        torch.testing.assert_close(fused(tokens, 9), expected[:, 9:], **TOLERANCE)


ADAPTED = {
    "the default": ("up",),
    "what has no kernel of its own": ("down",),
    "every matrix": tuple(PROJECTIONS),
}


def additions(model: GPT, projections=("up",), **changes) -> RowLora:
    """Of three rows, random in both factors."""
    settings = changed(SMALL, adapters=("lora",), projections=projections, **changes).lora
    found = RowLora(model, 3, settings, seed=1)
    found.values += 0.3 * random(*found.values.shape, seed=2)
    return found


@pytest.mark.parametrize("name", ADAPTED)
def test_rows_own_additions_and_their_gradients_are_the_plain_ones(name):
    tokens, targets = batch()
    share, found = torch.full((3, 5), 0.2, device=DEVICE), {}
    for kind in ("plain", "fused"):
        lora = additions(random_model(CONFIG, kind), ADAPTED[name])
        logits = [lora.logits(tokens, place) for place in (0, 9)]
        found[kind] = (*logits, lora._gradient(lora.values, tokens, targets[:, -5:], share))
    for fused_one, plain in zip(found["fused"], found["plain"], strict=True):
        assert (fused_one - plain).norm() < 2e-5 * plain.norm()


def test_adapted_scales_are_left_to_the_plain_formulation():
    tokens, _ = batch()
    found = [
        additions(random_model(CONFIG, kind), scales=True).logits(tokens, 0)
        for kind in ("plain", "fused")
    ]
    assert torch.equal(*found)


@pytest.mark.skipif(DEVICE == "cpu", reason="attention on a CPU repeats itself anyway")
@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_what_rows_learn_in_half_precision_repeats_itself_to_the_bit(kind):
    model = random_model(replace(CONFIG, width=64, heads=4, kv_heads=2), kind)
    model.compute_dtype = torch.bfloat16
    tokens, targets = batch(rows=3, length=600)
    learned = []
    for _ in range(3):
        lora = additions(model)
        lora.learn(tokens, targets, torch.ones_like(targets, dtype=torch.bool))
        learned.append(lora.values)
    assert all(torch.equal(values, learned[0]) for values in learned)
    assert not torch.are_deterministic_algorithms_enabled()


def test_evaluation_keeps_no_activations(monkeypatch):
    kept = []
    monkeypatch.setattr(fused, "Layer", lambda *parts: kept.append(fused_layer(*parts)) or kept[-1])
    with torch.no_grad():
        random_model(CONFIG, "fused")(batch()[0])
    alive = [layer for layer in kept[1::2] if layer.qkv is not None or layer.activation is not None]
    assert len(kept) == 2 * CONFIG.layers and not alive


def test_later_tokens_change_no_earlier_logit_to_the_bit():
    model, (tokens, _) = random_model(CONFIG, "fused"), batch()
    with torch.no_grad():
        before = model(tokens)
        tokens[1, 7] = (tokens[1, 7] + 1) % 50
        after = model(tokens)
    changed = (before != after).any(-1)
    assert not changed[1, :7].any() and changed[1, 7:].all()
    assert not changed[0].any() and not changed[2].any(), "rows must not meet"


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_replayed_gradients_are_the_launched_ones():
    model, (x, y) = random_model(CONFIG, "fused"), batch(rows=4)
    replay, launch = replayed(model), launched(model.loss)
    found = []
    for backward in (launch, replay, replay):
        for transform in (None, fake_quantize_int6, None):
            model.matrix_transform = transform
            losses = [float(backward(x[rows], y[rows], 0.5)) for rows in (slice(0, 2), slice(2, 4))]
            gradients = [p.grad.clone() for p in model.parameters()]
            found.append((losses, gradients))
            for parameter in model.parameters():
                parameter.grad = None
    for again in (3, 6):
        for (launches, expected), (losses, gradients) in zip(found, found[again:], strict=False):
            assert losses == pytest.approx(launches, rel=1e-6)
            torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_gradients_add_up_over_micro_batches():
    model, (x, y) = random_model(CONFIG, "fused"), batch(rows=4)
    model.loss(x, y).backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for rows in (slice(0, 2), slice(2, 4)):
        (0.5 * model.loss(x[rows], y[rows])).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], **TOLERANCE)


def test_cross_entropy_far_from_zero_against_float64():
    scores = 40 * random(9, 50)
    targets = torch.arange(9, device=DEVICE) * 5
    reference = scores.double().requires_grad_()
    capped = 30 * torch.tanh(reference / 30)
    expected = F.cross_entropy(capped, targets, reduction="none")
    expected.sum().backward()
    losses = cross_entropy(scores, targets, 30.0)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.double(), reference.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_norm_of_any_number_of_rows_against_float64(rows):
    x, gradient, residual = (random(rows, 40, seed=seed) for seed in range(3))
    reference = x.double().requires_grad_()
    expected = F.rms_norm(reference, (40,), eps=gpt.NORM_EPSILON)
    expected.backward(gradient.double())
    normed, inverse = rms_norm(x)
    torch.testing.assert_close(normed.double(), expected.detach(), **TOLERANCE)
    found = rms_norm_backward(gradient, normed, inverse, residual)
    torch.testing.assert_close(found.double(), reference.grad + residual, **TOLERANCE)


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_without_spilling():
    """In its own process: the interpreter must not have replaced the compiler."""
    command = [sys.executable, str(ROOT / "tests/compile_kernels.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=compiler_environment()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) >= 15
    spilling = [line for line in lines if not line.endswith(" 0 bytes spilled")]
    assert not spilling, spilling


def compiler_environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return {**environment, "PYTHONPATH": str(ROOT / "src")}
