"""Muon, AdamW, averages of the weights, and the schedule: against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.model.gpt import GPT
from fairway.training.averaging import WeightAverages
from fairway.training.checkpoint import tensors_under
from fairway.training.muon import BankShards, orthogonalize, update_scale
from fairway.training.optimizers import Optimizer, parameter_groups
from fairway.training.schedule import learning_rate_scale, muon_momentum
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
        update = orthogonalize(gradient + 0.9 * momentum, 5)
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


def test_gradients_are_clipped_by_their_global_norm():
    model = GPT(SMALL, seed=0)
    optimizer = Optimizer(
        model,
        learning_rates={"matrix": 0.1, "embedding": 0.1, "scalar": 0.1},
        betas=(0.9, 0.95), weight_decay=0.0, newton_schulz_steps=5, gradient_clip=0.3,
    )  # fmt: skip
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
    assert muon_momentum(750, start=0.92, end=0.99, warmup_steps=1500) == pytest.approx(0.955)
    assert muon_momentum(9999, start=0.92, end=0.99, warmup_steps=1500) == 0.99
