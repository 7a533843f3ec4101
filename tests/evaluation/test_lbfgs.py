"""Batched L-BFGS: as good as PyTorch's on each row alone, and rows never meet."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, softplus

from fairway.evaluation.adapters.fit.lbfgs import minimize

OPTIONS = dict(
    max_iterations=200,
    max_evaluations=4000,
    history_size=10,
    tolerance_gradient=1e-9,
    tolerance_change=1e-14,
    max_line_search_steps=20,
)


def quadratic(generator, rows, unknowns):
    """1/2 x'Ax - b'x with condition numbers around 1000."""
    factor = torch.randn(rows, unknowns, unknowns, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1.5, 0, unknowns, dtype=torch.float64)
    matrix = (factor * scales) @ (factor * scales).mT + 1e-2 * torch.eye(unknowns).double()
    target = torch.randn(rows, unknowns, generator=generator, dtype=torch.float64)

    def values(x):
        return 0.5 * torch.einsum("bi,bij,bj->b", x, matrix, x) - (target * x).sum(1)

    return values


def logistic(generator, rows, unknowns):
    """Logistic regression on 40 samples with a weak ridge."""
    features = torch.randn(rows, 40, unknowns, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, (rows, 40), generator=generator).double() * 2 - 1

    def values(x):
        margins = signs * (features @ x.unsqueeze(2)).squeeze(2)
        return softplus(-margins).mean(1) + 1e-3 * (x * x).sum(1)

    return values


def softmax_delta(generator, rows, unknowns):
    """SLOT's objective: a logit offset fitted on 60 targets with an L2 prior."""
    logits = 3 * torch.randn(rows, 60, unknowns, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, unknowns, (rows, 60), generator=generator)

    def values(x):
        losses = cross_entropy((logits + x.unsqueeze(1)).mT, targets, reduction="none")
        return losses.mean(1) + 0.05 * (x * x).sum(1)

    return values


def rosenbrock(generator, rows, unknowns):
    """Not convex: the curvature condition and the line search must cope."""
    shift = torch.rand(rows, 1, generator=generator, dtype=torch.float64)

    def values(x):
        x = x - shift
        return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)

    return values


PROBLEMS = [quadratic, logistic, softmax_delta]


def with_gradient(values):
    def objective(x):
        x = x.detach().requires_grad_()
        value = values(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient

    return objective


def torch_minimum(values, initial, row) -> float:
    """PyTorch's own L-BFGS on one row, the others frozen where they start."""
    x = initial[row].clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=400,
        max_eval=4000,
        history_size=10,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def row_value():
        return values(torch.cat([initial[:row], x.unsqueeze(0), initial[row + 1 :]]))[row]

    def closure():
        optimizer.zero_grad()
        value = row_value()
        value.backward()
        return value

    optimizer.step(closure)
    return row_value().item()


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_row_reaches_the_minimum_that_torch_finds_on_it_alone(problem, seed):
    generator = torch.Generator().manual_seed(seed)
    values = problem(generator, rows=6, unknowns=12)
    initial = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    result = minimize(with_gradient(values), initial, **OPTIONS)
    expected = [torch_minimum(values, initial, row) for row in range(6)]
    np.testing.assert_allclose(result.value.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(values(result.x).numpy(), result.value.numpy(), rtol=1e-12)


def test_it_needs_about_as_many_evaluations_as_torch():
    generator = torch.Generator().manual_seed(3)
    values = softmax_delta(generator, rows=8, unknowns=50)
    initial = torch.zeros(8, 50, dtype=torch.float64)
    result = minimize(with_gradient(values), initial, **OPTIONS | {"tolerance_change": 1e-9})
    assert result.evaluations.max() <= 40


@settings(max_examples=40, deadline=None)
@given(
    problem=st.sampled_from([*PROBLEMS, rosenbrock]),
    seed=st.integers(0, 2**31),
    row=st.integers(0, 4),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
)
def test_a_row_is_bitwise_the_same_whatever_the_other_rows_hold(problem, seed, row, scale):
    generator = torch.Generator().manual_seed(seed)
    values = problem(generator, rows=5, unknowns=8)
    initial = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    others = scale * torch.randn(5, 8, generator=generator, dtype=torch.float64)
    others[row] = initial[row]
    options = OPTIONS | {"max_iterations": 15}
    first = minimize(with_gradient(values), initial, **options)
    second = minimize(with_gradient(values), others, **options)
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left[row], right[row])


def test_rows_in_float32_do_not_meet_either():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 30, 64, generator=generator)
    targets = torch.randint(0, 64, (4, 30), generator=generator)

    def objective_of(logits):
        return with_gradient(
            lambda x: (
                cross_entropy((logits + x.unsqueeze(1)).mT, targets, reduction="none").mean(1)
                + 0.1 * (x * x).sum(1)
            )
        )

    changed = logits.clone()
    changed[[0, 2, 3]] = 5 * torch.randn(3, 30, 64, generator=generator)
    options = OPTIONS | {"tolerance_gradient": 1e-5, "tolerance_change": 1e-7}
    first = minimize(objective_of(logits), torch.zeros(4, 64), **options)
    second = minimize(objective_of(changed), torch.zeros(4, 64), **options)
    assert torch.equal(first.x[1], second.x[1])
    assert not torch.equal(first.x[0], second.x[0])


def test_a_row_that_starts_at_its_minimum_stays_put_and_costs_one_evaluation():
    generator = torch.Generator().manual_seed(7)
    values = quadratic(generator, rows=3, unknowns=6)
    optimum = minimize(with_gradient(values), torch.zeros(3, 6, dtype=torch.float64), **OPTIONS).x
    initial = torch.ones(3, 6, dtype=torch.float64)
    initial[1] = optimum[1]
    options = OPTIONS | {"tolerance_gradient": 1e-6}
    result = minimize(with_gradient(values), initial, **options)
    assert torch.equal(result.x[1], optimum[1])
    assert (result.iterations[1], result.evaluations[1]) == (0, 1)
    assert result.iterations[0] > 1


def test_non_convex_rows_only_ever_improve():
    generator = torch.Generator().manual_seed(11)
    values = rosenbrock(generator, rows=16, unknowns=6)
    initial = 2 * torch.randn(16, 6, generator=generator, dtype=torch.float64)
    result = minimize(with_gradient(values), initial, **OPTIONS)
    assert torch.isfinite(result.x).all()
    assert (result.value < values(initial)).all()
    assert (result.value < 5).all()  # near one of Rosenbrock's two minima


def test_evaluations_are_bounded_even_where_nothing_helps():
    def hostile(x):
        """Values that always rise, slopes that always promise a fall."""
        hostile.calls += 1
        return torch.full_like(x[:, 0], float(hostile.calls)), torch.ones_like(x)

    hostile.calls = 0
    options = OPTIONS | {"max_iterations": 3, "max_line_search_steps": 4}
    result = minimize(hostile, torch.zeros(2, 5), **options)
    assert hostile.calls <= 1 + 3 * 4
    assert torch.equal(result.x, torch.zeros(2, 5))


@pytest.mark.parametrize("most", range(1, 9))
def test_a_row_stops_at_its_best_point_when_its_evaluations_are_spent(most):
    generator = torch.Generator().manual_seed(11)
    values = rosenbrock(generator, rows=16, unknowns=6)
    initial = 2 * torch.randn(16, 6, generator=generator, dtype=torch.float64)
    seen = []

    def objective(x):
        value, gradient = with_gradient(values)(x)
        seen.append(value)
        return value, gradient

    result = minimize(objective, initial, **OPTIONS | {"max_evaluations": most})
    assert len(seen) == most and (result.evaluations == most).all()
    torch.testing.assert_close(values(result.x), result.value, rtol=1e-12, atol=0)
    # Every point that was tried and not taken lies higher.
    torch.testing.assert_close(result.value, torch.stack(seen).amin(dim=0), rtol=1e-12, atol=0)
    longer = minimize(objective, initial, **OPTIONS | {"max_evaluations": most + 1})
    assert (longer.value <= result.value).all()


def test_a_wall_of_infinite_values_is_backed_away_from():
    def objective(x):
        value = torch.where(x[:, 0] < 2, (x[:, 0] - 1.9) ** 2, torch.inf)
        return value, 2 * (x - 1.9)

    options = OPTIONS | {"tolerance_gradient": 1e-6}
    result = minimize(objective, torch.full((1, 1), -50.0, dtype=torch.float64), **options)
    assert abs(result.x.item() - 1.9) < 1e-5
