"""Muon, AdamW, averages of the weights, and the schedule: against their definitions."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.model.gpt import GPT
from fairway.training.adamw import AdamW
from fairway.training.averaging import WeightAverages
from fairway.training.checkpoint import tensors_under
from fairway.training.muon import QUINTICS, BankShards, orthogonalize
from fairway.training.optimizers import GROUPS, Optimizer, parameter_groups
from fairway.training.schedule import learning_rate_scale, muon_momentum, sequence_length
from fairway.training.trainer import TrainSettings
from fairway.training.trainer import optimizer_of as trainer_optimizer_of
from trainings import FEATURES, SMALL


@given(st.integers(1, 5), st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_orthogonalized_singular_values_lie_in_the_newton_schulz_band(n, rows, columns, seed):
    matrices = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(seed))
    values = torch.linalg.svdvals(orthogonalize(matrices, steps=10))
    # Square Gaussian matrices can be nearly singular: only what starts well above zero is lifted.
    start = torch.linalg.svdvals(matrices)
    lifted = values[start > 0.02 * matrices.norm(dim=(-2, -1))[:, None]]
    assert values.max() < 1.3 and lifted.min() > 0.5


@pytest.mark.parametrize(("shape", "scale"), [((3, 8, 4), 2**0.5), ((3, 4, 8), 1.0)])
def test_muon_step_equals_the_formula(shape, scale):
    bank = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before, shards = bank.detach().clone(), BankShards(bank, rank=0, world_size=1)
    with torch.no_grad():
        for _ in range(2):
            shards.step(
                gradient, learning_rate=0.1, momentum=0.9, weight_decay=0.5,
                orthogonalize=partial(orthogonalize, steps=5),
            )  # fmt: skip
    momentum, expected = torch.zeros_like(gradient), before
    for _ in range(2):
        momentum = 0.9 * momentum + gradient
        update = orthogonalize(gradient + 0.9 * momentum, 5)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * scale * update
    torch.testing.assert_close(bank.detach(), expected)


def reference_orthogonalize(matrix, coefficients, margin):
    """As `orthogonalize` a matrix with one triple for each iteration, in float64."""
    x = matrix.double()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / (x.norm() * margin + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize("normalize_rows", [False, True])
@pytest.mark.parametrize("steps", [3, 7])
def test_polar_express_takes_a_triple_an_iteration_and_repeats_the_last(steps, normalize_rows):
    matrices = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(0))
    matrices[:, 0] *= 50.0
    margin, table = QUINTICS["polar_express"]
    triples = [*table, table[-1], table[-1]][:steps]
    for bank in (matrices, matrices.mT):
        found = orthogonalize(bank, steps, "polar_express", normalize_rows)
        for matrix, value in zip(bank.double(), found, strict=True):
            if normalize_rows:
                matrix = matrix / matrix.norm(dim=1, keepdim=True)
            expected = reference_orthogonalize(matrix, triples, margin)
            torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-4)


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_polar_express_brings_singular_values_near_one_in_five_steps(rows, columns, seed):
    matrices = torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(seed))
    start = torch.linalg.svdvals(matrices)
    values = torch.linalg.svdvals(orthogonalize(matrices, 5, "polar_express"))
    lifted = values[start > 0.01 * matrices.norm()]
    assert values.max() < 1.145 and lifted.min() > 0.855


def test_normalized_rows_forget_their_gradients_scale():
    matrices = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    scaled = matrices * torch.logspace(-4, 2, 6)[:, None]
    for bank in (matrices, scaled):
        bank[1, 3] = 0.0  # as a bank's padding has them
    one, other = (orthogonalize(bank, 5, "jordan", True) for bank in (matrices, scaled))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(orthogonalize(matrices, 5), orthogonalize(scaled, 5), atol=0.1)


def optimizer_of(model: GPT, gradient_clip: float = 1.0) -> Optimizer:
    return Optimizer(
        model,
        learning_rates=dict.fromkeys(GROUPS, 0.1), weight_decays=dict.fromkeys(GROUPS, 0.0),
        betas=(0.9, 0.95), newton_schulz_steps=5, gradient_clip=gradient_clip,
    )  # fmt: skip


def test_every_parameter_is_in_exactly_one_group_and_moves():
    model = GPT(SMALL, seed=0)
    groups = parameter_groups(model)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    optimizer = optimizer_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0, 0.9)
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("decayed", GROUPS)
def test_weight_decay_of_a_group_moves_only_that_group(decayed):
    values = []
    for decay in (None, 0.5):
        model = GPT(SMALL, seed=0)
        chosen = TrainSettings(weight_decay=0.0, **{f"{decayed}_weight_decay": decay})
        optimizer = trainer_optimizer_of(model, chosen)
        for parameter in model.parameters():
            parameter.data.add_(0.1)
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1.0, 0.9)
        values.append(model.state_dict())
    plain, other = values
    moved = {name for name in plain if not torch.equal(plain[name], other[name])}
    assert moved == set(parameter_groups(model)[decayed])


def test_the_common_weight_decay_holds_where_a_group_has_none():
    chosen = TrainSettings(weight_decay=0.3, embedding_weight_decay=0.0)
    assert [chosen.weight_decay_of(group) for group in GROUPS] == [0.3, 0.0, 0.3]


@pytest.mark.parametrize("name", FEATURES)
def test_a_model_with_a_feature_trains(name):
    model = GPT(FEATURES[name], seed=0)
    optimizer = optimizer_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.arange(20).view(1, -1)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step(1.0, 0.9)
    assert not torch.equal(before["mlp_down_bank"], model.mlp_down_bank)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_takes_the_steps_of_torchs_class_bit_for_bit(weight_decay):
    generator = torch.Generator().manual_seed(0)
    ours = torch.nn.Linear(5, 3)
    theirs = copy.deepcopy(ours)
    expected = torch.optim.AdamW(
        theirs.parameters(), betas=(0.8, 0.9), weight_decay=weight_decay, fused=True
    )
    optimizer = AdamW(dict(ours.named_parameters()), betas=(0.8, 0.9), weight_decay=weight_decay)
    for rate in (0.1, 0.05, 0.02):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        optimizer.step(rate)
        expected.param_groups[0]["lr"] = rate
        expected.step()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one, other)


def test_gradients_are_clipped_by_their_global_norm():
    model = GPT(SMALL, seed=0)
    optimizer = optimizer_of(model, gradient_clip=0.3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step(1.0, momentum=0.9)
    # After one step a momentum is the clipped gradient, and Adam's first moment a tenth of it.
    state = optimizer.state_tensors()
    clipped = [*tensors_under(state, "momentum").values()]
    clipped += [moment / (1 - 0.9) for moment in tensors_under(state, "exp_avg").values()]
    assert len(clipped) == len(list(model.parameters()))
    total = sum(parameter.numel() for parameter in model.parameters())
    expected = 2.0 * 0.3 / np.sqrt(4 * total)
    for gradient in clipped:
        torch.testing.assert_close(
            gradient, torch.full_like(gradient, expected), rtol=1e-4, atol=0.0
        )


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
    torch.testing.assert_close(tensors_under(tensors, "ema_0.9")["weight"], ema)
    torch.testing.assert_close(tensors_under(tensors, "swa")["weight"], torch.stack(seen).mean(0))
    assert tensors_under(tensors, "ema_0.7") == {}


def test_learning_rate_schedule_by_steps_and_by_time():
    by_step = dict(max_steps=100, max_seconds=None, warmdown_steps=40)
    assert learning_rate_scale(0, 0.0, **by_step) == 1.0
    assert learning_rate_scale(80, 0.0, **by_step) == pytest.approx(0.5)
    by_time = dict(max_steps=10**6, max_seconds=600.0, warmdown_steps=40)
    # A step takes 1 s: the warmdown begins 40 s before the end.
    assert learning_rate_scale(500, 500.0, **by_time) == 1.0
    assert learning_rate_scale(580, 580.0, **by_time) == pytest.approx(0.5)
    assert learning_rate_scale(610, 610.0, **by_time) == 0.0
    floor = dict(**by_time, minimum=0.1)
    assert learning_rate_scale(595, 595.0, **floor) == pytest.approx(0.125)
    assert learning_rate_scale(599, 599.0, **floor) == 0.1
    assert muon_momentum(750, start=0.92, end=0.99, warmup_steps=1500) == pytest.approx(0.955)
    assert muon_momentum(9999, start=0.92, end=0.99, warmup_steps=1500) == 0.99


def test_a_warmdown_by_fraction_follows_whichever_budget_is_nearer_its_end():
    scale = partial(
        learning_rate_scale, max_steps=1000, max_seconds=600.0, warmdown_steps=None,
        warmdown_fraction=0.5, minimum=0.1,
    )  # fmt: skip
    assert scale(0, 0.0) == scale(400, 290.0) == scale(499, 0.0) == 1.0
    assert scale(750, 10.0) == scale(10, 450.0) == pytest.approx(0.5)
    assert scale(990, 10.0) == scale(10, 700.0) == 0.1
    assert scale(750, 599.0, max_seconds=None) == pytest.approx(0.5)


def test_the_sequence_schedule_ends_with_the_whole_length():
    schedule = ((0.1, 8), (0.7, 16))
    lengths = [sequence_length(progress, schedule, 32) for progress in (0, 0.09, 0.1, 0.69, 0.7)]
    assert lengths == [8, 8, 16, 16, 32]
    assert sequence_length(0.0, (), 32) == 32
