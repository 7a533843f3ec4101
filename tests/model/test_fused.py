"""The fused kernels against the plain formulation and float64, on a GPU or in the interpreter.

The interpreter's time is that of the tokens and blocks, so there are few of both.
"""

import os
import re
import subprocess
import sys
import weakref
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from evaluators import SMALL as EVALUATION
from evaluators import adapter_settings, changed
from fairway.evaluation.adapters.lora import BatchedLora
from fairway.model.functional import NORM_EPSILON
from fairway.model.gpt import GPT
from fairway.model.spec import PROJECTIONS, GPTConfig
from tiny import ROOT
from trainings import SMALL

pytest.importorskip("triton")
from fairway.model.fused import forward_backward as fused
from fairway.model.fused import loss as head_loss
from fairway.model.fused.loss import cross_entropy
from fairway.model.fused.residual import rms_norm, rms_norm_backward
from fairway.training.gradients import eager_backward, graphed_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
BACKENDS = {"plain": None, "fused": fused}

# Widths that no tile divides; encoder and decoder halves with and without a block of their own.
CONFIG = SMALL.changed(layers=3, value_layers=(1, 2), width=12, heads=2, kv_heads=1, mlp_width=20)
FEATURES = CONFIG.changed(
    value_layers=(2,),
    activation_slope=0.3,
    head_gate_dimensions=5,
    smear="input",
    smear_dimensions=7,
    skip_gates=True,
    recurrent_layers=(1, 2),
    recurrence_passes=2,
    asymmetric_softcap=True,
    logit_softcap=1.5,  # Logits are small here, and caps far above them have next to no gradient.
    document_masks=True,
    bos_id=39,  # within two sequences of `batch`
)
SHORT = CONFIG.changed(layers=2, value_layers=(1,), rotary_dimensions=6)
CONFIGS = {
    "odd": CONFIG.changed(width=36, heads=6, kv_heads=3),
    "even": CONFIG.changed(layers=4, value_layers=(0,), bigram_buckets=0),
    "no value embedding": CONFIG.changed(value_layers=(), smear="none"),
    "all dimensions rotated": SHORT,
    "all features": FEATURES,
    "features without bigrams": FEATURES.changed(
        layers=2,
        value_layers=(),
        bigram_buckets=0,
        recurrent_layers=(0,),
        recurrence_passes=3,
        activation_slope=0.0,
    ),
}


def random_model(config: GPTConfig, kernels: str) -> GPT:
    model = GPT(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.backend = BACKENDS[kernels]
    return model.to(DEVICE)


def batch(rows: int = 3, length: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 50, (rows, length + 1), generator=generator).to(DEVICE)
    return tokens[:, :-1], tokens[:, 1:]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def halved(name: str, bank: torch.Tensor) -> torch.Tensor:
    """Straight-through rounding to halves, which stands for a quantizer's."""
    return bank + ((2 * bank).round() / 2 - bank).detach()


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_the_plain_ones(name):
    # Three rows are more tokens than there are programs for them, so that these loop.
    compare_losses_and_gradients(name, rows=3 if name in ("even", "all features") else 2)


def test_loss_and_gradients_in_late_qat_are_the_plain_ones():
    compare_losses_and_gradients("all dimensions rotated", fake_quantize=halved)


def test_loss_and_gradients_before_blocks_recur_are_the_plain_ones():
    """The skips that only more steps would take up are left out."""
    compare_losses_and_gradients("all features", recurs=False)


def test_loss_and_gradients_with_copied_keys_are_the_plain_ones():
    """Every query head gets a key of its own, as flash-attn-4 wants them, from any backend."""
    assert CONFIGS["odd"].heads == 2 * CONFIGS["odd"].kv_heads
    compare_losses_and_gradients("odd", key_copies=2)


def test_loss_and_gradients_of_a_single_sequence_are_the_plain_ones(monkeypatch):
    """Its attention's gradients may lie in memory head by head. And its scores come in slices."""
    monkeypatch.setattr(head_loss, "SCORES_AT_ONCE", 2 * SMALL.vocab_size)
    compare_losses_and_gradients("all dimensions rotated", rows=1)


def compare_losses_and_gradients(name, rows=2, **attributes):
    found = {}
    for kernels in BACKENDS:
        model = random_model(CONFIGS[name], kernels)
        for attribute, value in attributes.items():
            setattr(model, attribute, value)
        loss = model.loss(*batch(rows))
        (2 * loss).backward()
        found[kernels] = loss.detach(), {n: p.grad for n, p in model.named_parameters()}
    torch.testing.assert_close(found["fused"][0], found["plain"][0], rtol=1e-6, atol=0)
    for parameter, plain in found["plain"][1].items():
        error = (found["fused"][1][parameter] - plain).norm() / plain.norm()
        assert error < 2e-5, f"{parameter}: {error}"


class AttentionHeads(TorchFunctionMode):
    """Notes the query, key and value heads that attention is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is F.scaled_dot_product_attention:
            self.seen.add(tuple(part.shape[1] for part in arguments))
        return function(*arguments, **(options or {}))


def test_evaluation_shares_keys():
    model, (tokens, targets) = random_model(CONFIG, "fused"), batch(rows=1)
    model.key_copies = 2
    with AttentionHeads() as training:
        model.loss(tokens, targets)
    with AttentionHeads() as evaluation, torch.no_grad():
        model(tokens)
    assert training.seen == {(2, 2, 2)} and evaluation.seen == {(2, 1, 1)}


def test_logits_of_all_positions_and_of_the_last_ones():
    tokens, _ = batch()
    with torch.no_grad():
        plain, fused = (random_model(FEATURES, kernels) for kernels in BACKENDS)
        expected = plain(tokens)
        torch.testing.assert_close(fused(tokens), expected, **TOLERANCE)
        torch.testing.assert_close(fused(tokens, 3), expected[:, 3:], **TOLERANCE)


def test_what_the_kernels_do_not_compute_is_refused_by_itself():
    class Featured(GPTConfig):
        gate: bool = False
        loops: int = 1

    known = dict(CONFIGS["even"].changed(width=16, mlp_width=24))
    assert fused.supports(GPTConfig()) is None and fused.supports(Featured(**known)) is None
    assert "model.gate is True" in fused.supports(Featured(**known, gate=True))
    assert "model.loops is 2" in fused.supports(Featured(**known, loops=2))
    assert "model.width is 12" in fused.supports(CONFIG)
    assert set(GPTConfig.model_fields) == fused.SUPPORTED


ADAPTED = {
    "the default": (SHORT, ("up",)),
    "what has no kernel of its own": (SHORT, ("down",)),
    "every matrix, also of blocks that recur": (FEATURES, tuple(PROJECTIONS)),
}


def additions(model: GPT, projections=("up",), **changes) -> BatchedLora:
    """Of three rows, random in both factors."""
    settings = changed(EVALUATION, adapters=("lora",), projections=projections, **changes)
    found = BatchedLora(model, 3, adapter_settings(settings, "lora"), seed=1)
    found.values += 0.3 * random(*found.values.shape, seed=2)
    return found


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=pytest.mark.slow if "every" in one else ()) for one in ADAPTED],
)
def test_rows_own_additions_and_their_gradients_are_the_plain_ones(name):
    tokens, targets = batch()
    share, found = torch.full((3, 2), 0.5, device=DEVICE), {}
    config, projections = ADAPTED[name]
    for kernels in BACKENDS:
        lora = additions(random_model(config, kernels), projections)
        logits = [lora.logits(tokens, first_position) for first_position in (0, 3)]
        found[kernels] = (*logits, lora.gradient(lora.values, tokens, targets[:, -2:], share))
    for fused_one, plain in zip(found["fused"], found["plain"], strict=True):
        assert (fused_one - plain).norm() < 2e-5 * plain.norm()


def test_adapted_scales_are_left_to_the_plain_formulation():
    tokens, _ = batch()
    found = [
        additions(random_model(CONFIG, kernels), scales=True).logits(tokens, 0)
        for kernels in BACKENDS
    ]
    assert torch.equal(*found)


@pytest.mark.skipif(DEVICE == "cpu", reason="attention on a CPU repeats itself anyway")
@pytest.mark.parametrize("kernels", BACKENDS)
def test_what_rows_learn_in_half_precision_repeats_itself_to_the_bit(kernels):
    model = random_model(SMALL.changed(width=64), kernels)
    model.compute_dtype = torch.bfloat16
    tokens, targets = batch(rows=3, length=600)
    learned = []
    for _ in range(3):
        lora = additions(model)
        lora.learn(tokens, targets, torch.ones_like(targets, dtype=torch.bool))
        learned.append(lora.values)
    assert all(torch.equal(values, learned[0]) for values in learned)
    assert not torch.are_deterministic_algorithms_enabled()


class LiveTensors(TorchDispatchMode):
    """Counts the memories of each shape that exist at the same time, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.created: dict[tuple[int, ...], list[weakref.ref]] = defaultdict(list)
        self.most: dict[tuple[int, ...], int] = defaultdict(int)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        if isinstance(found, torch.Tensor):
            shape = tuple(found.shape)
            self.created[shape].append(weakref.ref(found))
            alive = {one().data_ptr() for one in self.created[shape] if one() is not None}
            self.most[shape] = max(self.most[shape], len(alive))
        return found


def test_evaluation_keeps_no_activations():
    model, (tokens, targets) = random_model(CONFIG, "fused"), batch(rows=1)
    activation = tokens.numel(), CONFIG.mlp_width
    qkv = tokens.numel(), CONFIG.width + 2 * CONFIG.kv_width
    with LiveTensors() as training:
        model.loss(tokens, targets)
    with LiveTensors() as evaluation, torch.no_grad():
        model(tokens)
    for shape in (activation, qkv):
        assert training.most[shape] >= CONFIG.layers and evaluation.most[shape] == 1


def test_later_tokens_change_no_earlier_logit_to_the_bit():
    config = CONFIGS["features without bigrams"].changed(document_masks=False)
    model, (tokens, _) = random_model(config, "fused"), batch()
    with torch.no_grad():
        before = model(tokens)
        tokens[1, 2] = (tokens[1, 2] + 1) % 50
        after = model(tokens)
    changed = (before != after).any(-1)
    assert not changed[1, :2].any() and changed[1, 2:].all()
    assert not changed[0].any() and not changed[2].any(), "rows must not meet"


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_graphed_gradients_are_the_eager_ones():
    model, (x, y) = random_model(FEATURES, "fused"), batch(rows=4)
    graphed, eager = graphed_backward(model), eager_backward(model.loss)
    found = []
    for backward in (eager, graphed, graphed):
        for transform, recurs in ((None, False), (halved, True), (None, True), (None, False)):
            model.fake_quantize, model.recurs = transform, recurs
            losses = [float(backward(x[rows], y[rows], 0.5)) for rows in (slice(0, 2), slice(2, 4))]
            gradients = [p.grad.clone() for p in model.parameters()]
            found.append((losses, gradients))
            for parameter in model.parameters():
                parameter.grad = None
    for again in (4, 8):
        for (eager_losses, expected), (losses, gradients) in zip(
            found, found[again:], strict=False
        ):
            assert losses == pytest.approx(eager_losses, rel=1e-6)
            torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_gradients_add_up_over_micro_batches():
    model, (x, y) = random_model(SHORT, "fused"), batch(rows=2, length=3)
    model.loss(x, y).backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 2)):
        (0.5 * model.loss(x[rows], y[rows])).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], **TOLERANCE)


@pytest.mark.parametrize("vocabulary", [50, 1500], ids=["one warp a row", "several warps a row"])
@pytest.mark.parametrize("caps", [(30.0, 30.0), (20.0, 35.0)], ids=["one cap", "two caps"])
def test_cross_entropy_far_from_zero_against_float64(vocabulary, caps):
    scores = 40 * random(9, vocabulary)
    targets = torch.arange(9, device=DEVICE) * 5
    reference = scores.double().requires_grad_()
    both = torch.tensor(caps, device=DEVICE).double().expand(9, 2).clone().requires_grad_()
    cap = torch.where(reference > 0, both[:, :1], both[:, 1:])
    expected = F.cross_entropy(cap * torch.tanh(reference / cap), targets, reduction="none")
    expected.sum().backward()
    has_two = caps[0] != caps[1]
    own_cap = torch.tensor(caps, device=DEVICE) if has_two else caps[0]
    losses, cap_gradients = cross_entropy(scores, targets, own_cap)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.double(), reference.grad, rtol=1e-4, atol=1e-6)
    if has_two:
        torch.testing.assert_close(cap_gradients.double(), both.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_norm_of_any_number_of_rows_against_float64(rows):
    x, gradient, residual = (random(rows, 40, seed=seed) for seed in range(3))
    reference = x.double().requires_grad_()
    expected = F.rms_norm(reference, (40,), eps=NORM_EPSILON)
    expected.backward(gradient.double())
    normed, inverse = rms_norm(x)
    torch.testing.assert_close(normed.double(), expected.detach(), **TOLERANCE)
    found = rms_norm_backward(gradient, normed, inverse, residual)
    torch.testing.assert_close(found.double(), reference.grad + residual, **TOLERANCE)


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_without_spilling_or_waiting():
    """In its own process: the interpreter must not have replaced the compiler.

    Programs that share all rows must all be resident: one that waits for registers begins its share
    when the others have done theirs.
    """
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=compiler_environment()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) >= 15
    spilling = [line for line in lines if ", 0 bytes spilled" not in line]
    assert not spilling, spilling
    shared = [re.search(r"(\d+) programs of (\d+)$", line) for line in lines]
    waiting = [found.string for found in shared if found and int(found[1]) > int(found[2])]
    assert any(shared) and not waiting, waiting


def compiler_environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return {**environment, "PYTHONPATH": str(ROOT / "src")}


@pytest.mark.parametrize("name", ["odd", "all features"])
def test_hooks_see_what_the_plain_formulation_shows_them(name):
    seen = {}
    for kernels in BACKENDS:
        model, inputs, gradients = random_model(CONFIGS[name], kernels), [], []
        model.activation_hook = lambda *shown, inputs=inputs: inputs.append(shown)
        model.gradient_hook = lambda *shown, gradients=gradients: gradients.append(shown)
        model.loss(*batch(2)).backward()
        seen[kernels] = by_matrix(inputs), by_matrix(gradients)
        first, second, third = (x for _, _, x in inputs[:3])
        assert first is second is third  # of queries, keys and values
    for fused_ones, plain_ones in zip(*seen.values(), strict=True):
        assert fused_ones.keys() == plain_ones.keys()
        for key, plain in plain_ones.items():
            assert (fused_ones[key] - plain).norm() < 2e-5 * plain.norm(), key


def by_matrix(shown: list[tuple[str, int, torch.Tensor]]) -> dict[tuple[str, int], torch.Tensor]:
    """(bank, index) → what a hook was shown of that matrix, in every pass of its block."""
    found = defaultdict(list)
    for bank, index, tensor in shown:
        found[bank, index].append(tensor)
    return {key: torch.stack(parts) for key, parts in found.items()}
