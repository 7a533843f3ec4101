"""The fused fit: the same minima as the plain one, row by row and apart from one another.

On a GPU, or else in Triton's interpreter, where sizes must be tiny.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy

from evaluators import SMALL, ToyModel, changed, collect, toy_text
from fairway.evaluation.adapters.fit import logit_delta
from fairway.evaluation.adapters.fit.slot_objective import (
    TOLERANCE_CHANGE,
    loss_terms,
    max_evaluations,
)

pytest.importorskip("triton")

from fairway.evaluation.adapters.fit import logit_delta_kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = dict(l2=2.0, clamp=5.0, iterations=25, history=3)
# Of two ways to compute the same few iterations: float32's rounding, which they amplify.
DELTA_TOLERANCE = 2e-3  # nats
LOSS_TOLERANCE = 1e-5  # nats

# Several programs a row and tiles a program even in tiny problems, the last ragged, and chunks of a
# position.
TILING = logit_delta_kernel.Tiling(positions=8, warps=4, lane_columns=1)


def problem(seed=0, rows=4, positions=21, vocabulary=64):
    """Peaked logits [B, P, V], targets [B, P], ragged contexts [B, P], warm starts [B, V]."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, positions, vocabulary, generator=generator)
    # A few frequent targets: something to fit to.
    targets = torch.randint(0, vocabulary // 8, (rows, positions), generator=generator)
    is_context = torch.ones(rows, positions, dtype=torch.bool)
    is_context[1] = torch.rand(positions, generator=generator) < 0.5
    is_context[2] = False
    # A run that wraps around, as in a ring.
    is_context[3] = torch.arange(positions).roll(9) < positions - 6
    initial = torch.randn(rows, vocabulary, generator=generator)
    return [tensor.to(DEVICE) for tensor in (logits, targets, is_context, initial)]


def fused_fit(logits, targets, is_context, initial, **changes):
    probabilities = logit_delta_kernel.compact_softmax(logits)
    return logit_delta_kernel.fit_delta(
        probabilities, targets, is_context, initial, **(OPTIONS | {"tiling": TILING} | changes)
    )


def tolerances(delta, logits, targets, is_context, l2):
    """How far above its minimum's loss a fit may end, and how far from there: float64 [B] each.

    delta: [B, V], a fit's result, inside the clamp. In float64, with r the ridge of a row and κ the
    ratio of its Hessian's extreme eigenvalues there:

    1. A fit ends where an iteration gains less than TOLERANCE_CHANGE, as far as float32 tells. The
       terms of a loss are at most max |delta|, so the two losses that it compares err by about
       2 · eps32 · max |delta| together.
    2. What is left then is at most 1 / (1 − ((κ − 1) / (κ + 1))²) = (κ + 1)² / 4κ of a step's gain
       for steepest descent on a quadratic (Nocedal & Wright, theorem 3.3); L-BFGS does no worse.
    3. In half precision every probability q errs by 2⁻¹² of itself, so their softmax with delta by
       2⁻¹¹, and the gradient by 2⁻¹¹ · |mean softmax|; a gradient g more moves the minimum up by at
       most |g|² / 2r.
    4. A point whose loss is e above the minimum lies within √(2e / r) of it.
    """
    losses, distances = [], []
    share, _, ridges = loss_terms(targets, is_context, delta, l2)
    for row, weights in enumerate(share.double()):
        ridge = float(ridges[row])
        softmax = torch.softmax(logits[row].double() + delta[row].double(), 1)
        mean = weights @ softmax
        hessian = torch.diag(mean) - (softmax.T * weights) @ softmax
        condition = 1 + float(torch.linalg.eigvalsh(hessian)[-1]) / ridge
        rounding = 2 * torch.finfo(torch.float32).eps * float(delta[row].abs().max())
        stopping = (TOLERANCE_CHANGE + rounding) * (condition + 1) ** 2 / (4 * condition)
        half_precision = (2**-11 * float(mean.norm())) ** 2 / (2 * ridge)
        losses.append(stopping + half_precision)
        distances.append((2 * losses[-1] / ridge) ** 0.5)
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(distances, dtype=torch.float64)


def exact_losses(delta, logits, targets, is_context, l2):
    """float64 [B]: what a fit minimizes, from the logits themselves."""
    losses = []
    for row, kept in enumerate(is_context):
        moved = logits[row, kept].double() + delta[row].double()
        total = cross_entropy(moved, targets[row, kept], reduction="sum")
        prior = l2 / 2 * delta[row].double().square().sum()
        losses.append((total + prior) / kept.sum().clamp(min=1))
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("vocabulary", "starts", "l2", "history"),
    [
        (64, "cold", 0.5, 3),
        (50, "warm", 4.0, 3),
        (64, "warm", 0.5, 9),
        pytest.param(50, "warm", 0.5, 3, marks=pytest.mark.many),
        pytest.param(50, "cold", 4.0, 3, marks=pytest.mark.many),
    ],
)
def test_it_reaches_the_minimum_of_the_plain_fit(vocabulary, starts, l2, history):
    logits, targets, is_context, initial = problem(vocabulary=vocabulary)
    if starts == "cold":
        initial = torch.zeros_like(initial)
    # The clamp is out of reach: off the minimum that it cuts away, the loss is not flat.
    changes = {"l2": l2, "history": history, "clamp": 50.0}
    options = OPTIONS | changes
    plain = logit_delta.fit_delta(torch.softmax(logits, 2), targets, is_context, initial, **options)
    fused = fused_fit(logits, targets, is_context, initial, **changes)
    assert max(plain.x.abs().max(), fused.x.abs().max()) < 50
    loss_tolerance, distance = (
        found.to(DEVICE) for found in tolerances(plain.x, logits, targets, is_context, l2)
    )
    assert loss_tolerance.max() < LOSS_TOLERANCE  # far below what a score can show
    # Each of the two ends within its distance of the minimum.
    assert ((fused.x - plain.x).double().norm(dim=1) <= 2 * distance).all()
    found, expected = (
        exact_losses(fit.x, logits, targets, is_context, l2) for fit in (fused, plain)
    )
    assert ((found - expected).abs() <= loss_tolerance).all()
    assert (fused.iterations - plain.iterations).abs().max() <= 3
    assert fused.iterations.max() > history  # the ring of pairs has wrapped around


def test_float32_probabilities_are_taken_as_well():
    logits, *rest = problem()
    compacted = fused_fit(logits, *rest, iterations=4)
    given = logit_delta_kernel.fit_delta(
        torch.softmax(logits, 2), *rest, tiling=TILING, **(OPTIONS | {"iterations": 4})
    )
    torch.testing.assert_close(given.x, compacted.x, rtol=0, atol=DELTA_TOLERANCE)
    assert given.iterations.dtype == given.evaluations.dtype == torch.int64


def test_a_row_is_bitwise_the_same_whatever_the_other_rows_hold():
    first, other = problem(seed=0), problem(seed=1)
    mixed = [torch.cat([a[:2], b[2:]]) for a, b in zip(first, other, strict=True)]
    mixed[2][2:] = True
    one, two = fused_fit(*first, iterations=4), fused_fit(*mixed, iterations=4)
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left[:2], right[:2])
    assert not torch.equal(one.x[3], two.x[3])


def test_a_row_alone_is_bitwise_the_same():
    problems = problem()
    together = fused_fit(*problems, iterations=4)
    for row in (1, 3):
        alone = fused_fit(*(tensor[row : row + 1] for tensor in problems), iterations=4)
        for left, right in zip(alone, together, strict=True):
            assert torch.equal(left[0], right[row])


@pytest.mark.parametrize(
    ("positions", "vocabulary"),
    [
        (7, 64),
        (16, 64),
        (37, 64),
        # More parts than are read at a time.
        pytest.param(139, 1024, marks=pytest.mark.slow),
    ],
)
def test_it_does_not_matter_how_many_programs_share_a_row(positions, vocabulary):
    problems = [tensor[:1] for tensor in problem(positions=positions, vocabulary=vocabulary)]
    spread = fused_fit(*problems, iterations=2)
    whole = fused_fit(*problems, iterations=2, tiling=TILING._replace(positions=256))
    torch.testing.assert_close(spread.x, whole.x, rtol=0, atol=DELTA_TOLERANCE)
    torch.testing.assert_close(spread.value, whole.value, rtol=0, atol=LOSS_TOLERANCE)


def test_a_fit_may_evaluate_as_often_as_torch_lets_it():
    assert [max_evaluations(iterations) for iterations in (1, 4, 25)] == [2, 6, 32]


def test_positions_of_programs_without_context_are_not_read():
    logits, targets, is_context, initial = problem()
    is_context[0, 8:16] = False
    probabilities = logit_delta_kernel.compact_softmax(logits)
    options = OPTIONS | {"tiling": TILING, "iterations": 4}
    expected = logit_delta_kernel.fit_delta(probabilities, targets, is_context, initial, **options)
    probabilities[0, 8:16] = torch.nan
    found = logit_delta_kernel.fit_delta(probabilities, targets, is_context, initial, **options)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    "most", [2, 5, 8, *(pytest.param(one, marks=pytest.mark.many) for one in (3, 4, 6, 7))]
)
def test_it_ends_with_its_evaluations_where_the_plain_fit_does(most):
    logits, targets, is_context, initial = problem()
    options = OPTIONS | {"most_evaluations": most}
    compacted = logit_delta_kernel.compact_softmax(logits)
    exact = compacted.float() / logit_delta_kernel.UNITS_PER_ONE
    plain = logit_delta.fit_delta(exact, targets, is_context, initial, **options)
    fused = logit_delta_kernel.fit_delta(
        compacted, targets, is_context, initial, tiling=TILING, **options
    )
    assert plain.evaluations.max() == most
    assert torch.equal(fused.evaluations, plain.evaluations)
    assert torch.equal(fused.iterations, plain.iterations)
    torch.testing.assert_close(fused.x, plain.x, rtol=0, atol=DELTA_TOLERANCE)
    torch.testing.assert_close(fused.value, plain.value, rtol=0, atol=LOSS_TOLERANCE)


def test_without_context_the_delta_is_zero():
    logits, targets, is_context, initial = problem(rows=4)
    fit = fused_fit(logits, targets, torch.zeros_like(is_context), initial)
    assert torch.equal(fit.x, torch.zeros_like(initial))
    assert (fit.iterations == 0).all() and (fit.evaluations == 1).all()
    nowhere = fused_fit(logits[:, :0], targets[:, :0], is_context[:, :0], initial)
    assert torch.equal(nowhere.x, torch.zeros_like(initial))


def test_without_a_prior_it_is_the_clamp_that_ends_a_row():
    logits, targets, is_context, initial = problem()
    fit = fused_fit(logits, targets, is_context, initial, l2=0.0, clamp=0.25, iterations=6)
    assert fit.x.abs().max() == 0.25
    assert (fit.iterations <= 6).all()
    assert (fit.evaluations <= max_evaluations(6)).all()


def test_a_start_beyond_all_bounds_stays_put_as_in_the_plain_fit():
    logits, targets, is_context, initial = problem()
    initial[0, 3] = 100.0  # exp overflows
    probabilities = torch.softmax(logits, 2)
    plain = logit_delta.fit_delta(probabilities, targets, is_context, initial, **OPTIONS)
    fused = fused_fit(logits, targets, is_context, initial)
    assert plain.iterations[0] == fused.iterations[0] == 0
    torch.testing.assert_close(fused.x, plain.x, rtol=0, atol=DELTA_TOLERANCE)


@pytest.mark.parametrize("shape", [(9, 50), (3, 7, 64), (3, 0, 64)])
def test_compact_softmax_keeps_eleven_bits(shape):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(shape, generator=generator).to(DEVICE)
    if len(shape) == 3:
        logits = logits[:, 1:]  # as the positions of some windows are: not dense
    compacted = logit_delta_kernel.compact_softmax(logits)
    found = compacted.double() / logit_delta_kernel.UNITS_PER_ONE
    expected = torch.softmax(logits.double(), -1)
    assert compacted.dtype == torch.float16 and compacted.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=2**-10.9, atol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"context_logits": "current"},
        {"context_logits": "scored", "focal_tokens": 14},
        {"scope": "batch", "focal_tokens": 14, "same_document": False},
    ],
)
def test_the_scores_are_those_of_the_plain_fit(changes):
    settings = changed(SMALL, lanes=3, iterations=6, **changes)
    tokens = toy_text(70).to(DEVICE)
    plain = collect(tokens, settings, ToyModel(device=DEVICE))
    fused = collect(tokens, settings, ToyModel(device=DEVICE, kernels="fused"))
    for name, column in plain.items():
        tolerance = 5e-3 if name == "logits_after" else 0  # six iterations leave more open
        torch.testing.assert_close(fused[name], column, rtol=0, atol=tolerance)
    assert (fused["logits_after"] != fused["logits_before"]).any()
