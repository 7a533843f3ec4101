"""The fused fit: the same minima as the plain one, row by row and apart from one another.

On a GPU, or else in Triton's interpreter, where sizes must be tiny.
"""

import pytest
import torch
from test_slot import SETTINGS, collect, toy_model, toy_stream
from torch.nn.functional import cross_entropy

from evaluators import changed

pytest.importorskip("triton")

from fairway.evaluation.adapters.fit import logit_delta, logit_delta_kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = dict(l2=2.0, clamp=5.0, iterations=25, history=3)
# Both stop within 1e-7 nats of mean loss, and half precision moves the minimum itself.
DELTA_TOLERANCE = 2e-3
LOSS_TOLERANCE = 1e-5  # nats


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several programs a row and tiles a program even in tiny problems, the last ragged, and
    chunks of a place."""
    monkeypatch.setattr(logit_delta_kernel, "PLACES", 8)
    monkeypatch.setattr(logit_delta_kernel, "NUM_WARPS", 4)
    monkeypatch.setattr(logit_delta_kernel, "LANE_COLUMNS", 1)


def problem(seed=0, rows=4, places=37, vocabulary=64):
    """Peaked logits [B, P, V], targets [B, P], ragged contexts [B, P], warm starts [B, V]."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, places, vocabulary, generator=generator)
    # A few frequent targets: something to fit to.
    targets = torch.randint(0, vocabulary // 8, (rows, places), generator=generator)
    is_context = torch.ones(rows, places, dtype=torch.bool)
    is_context[1] = torch.rand(places, generator=generator) < 0.5
    is_context[2] = False
    is_context[3] = torch.arange(places).roll(9) < 20  # a run that wraps around, as in a ring
    initial = torch.randn(rows, vocabulary, generator=generator)
    return [tensor.to(DEVICE) for tensor in (logits, targets, is_context, initial)]


def fused_fit(logits, targets, is_context, initial, **changes):
    probabilities = logit_delta_kernel.compact_softmax(logits)
    return logit_delta_kernel.fit_delta(
        probabilities, targets, is_context, initial, **(OPTIONS | changes)
    )


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
        (64, "warm", 4.0, 3),
        (50, "warm", 0.5, 3),
        (50, "cold", 4.0, 3),
        (64, "warm", 0.5, 9),
    ],
)
def test_it_reaches_the_minimum_of_the_plain_fit(vocabulary, starts, l2, history):
    logits, targets, is_context, initial = problem(vocabulary=vocabulary)
    if starts == "cold":
        initial = torch.zeros_like(initial)
    changes = {"l2": l2, "history": history}
    options = OPTIONS | changes
    plain = logit_delta.fit_delta(torch.softmax(logits, 2), targets, is_context, initial, **options)
    fused = fused_fit(logits, targets, is_context, initial, **changes)
    # A weak prior leaves the minimum so flat that this distance is within the stopping test.
    flat = (2 * logit_delta.TOLERANCE_CHANGE * is_context.shape[1] / l2) ** 0.5
    tolerance = max(DELTA_TOLERANCE, flat)
    torch.testing.assert_close(fused.x, plain.x, rtol=0, atol=tolerance)
    found, expected = (
        exact_losses(fit.x, logits, targets, is_context, l2) for fit in (fused, plain)
    )
    assert (found - expected).max() < LOSS_TOLERANCE
    assert (fused.iterations - plain.iterations).abs().max() <= 3
    assert fused.iterations.max() > history  # the ring of pairs has wrapped around


def test_float32_probabilities_are_taken_as_well():
    logits, *rest = problem()
    compacted = fused_fit(logits, *rest)
    given = logit_delta_kernel.fit_delta(torch.softmax(logits, 2), *rest, **OPTIONS)
    torch.testing.assert_close(given.x, compacted.x, rtol=0, atol=DELTA_TOLERANCE)
    assert given.iterations.dtype == given.evaluations.dtype == torch.int64


def test_a_row_is_bitwise_the_same_whatever_the_other_rows_hold():
    first, other = problem(seed=0), problem(seed=1)
    mixed = [torch.cat([a[:2], b[2:]]) for a, b in zip(first, other, strict=True)]
    mixed[2][2:] = True
    one, two = fused_fit(*first), fused_fit(*mixed)
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left[:2], right[:2])
    assert not torch.equal(one.x[3], two.x[3])


def test_a_row_alone_is_bitwise_the_same():
    problems = problem()
    together = fused_fit(*problems)
    for row in (1, 3):
        alone = fused_fit(*(tensor[row : row + 1] for tensor in problems))
        for left, right in zip(alone, together, strict=True):
            assert torch.equal(left[0], right[row])


@pytest.mark.parametrize(
    ("places", "vocabulary"),
    [(7, 64), (16, 64), (37, 64), (139, 1024)],  # the last makes more parts than are read at a time
)
def test_it_does_not_matter_how_many_programs_share_a_row(places, vocabulary, monkeypatch):
    problems = [tensor[:1] for tensor in problem(places=places, vocabulary=vocabulary)]
    spread = fused_fit(*problems, iterations=5)
    monkeypatch.setattr(logit_delta_kernel, "PLACES", 256)
    whole = fused_fit(*problems, iterations=5)
    torch.testing.assert_close(spread.x, whole.x, rtol=0, atol=DELTA_TOLERANCE)
    torch.testing.assert_close(spread.value, whole.value, rtol=0, atol=LOSS_TOLERANCE)


def test_a_fit_may_evaluate_as_often_as_torch_lets_it():
    assert [logit_delta.max_evaluations(iterations) for iterations in (1, 4, 25)] == [2, 6, 32]


def test_places_of_programs_without_context_are_not_read():
    logits, targets, is_context, initial = problem()
    is_context[0, 8:24] = False
    probabilities = logit_delta_kernel.compact_softmax(logits)
    expected = logit_delta_kernel.fit_delta(probabilities, targets, is_context, initial, **OPTIONS)
    probabilities[0, 8:24] = torch.nan
    found = logit_delta_kernel.fit_delta(probabilities, targets, is_context, initial, **OPTIONS)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("most", range(2, 9))
def test_it_ends_with_its_evaluations_where_the_plain_fit_does(most, monkeypatch):
    logits, targets, is_context, initial = problem()
    for module in (logit_delta, logit_delta_kernel):
        monkeypatch.setattr(module, "max_evaluations", lambda iterations: most)
    compacted = logit_delta_kernel.compact_softmax(logits)
    exact = compacted.float() / logit_delta_kernel.UNITS_PER_ONE
    plain = logit_delta.fit_delta(exact, targets, is_context, initial, **OPTIONS)
    fused = logit_delta_kernel.fit_delta(compacted, targets, is_context, initial, **OPTIONS)
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
    assert (fit.evaluations <= logit_delta.max_evaluations(6)).all()


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
        logits = logits[:, 1:]  # as the places of some windows are: not dense
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
    settings = changed(SETTINGS, lanes=3, iterations=6, **changes)
    tokens, model = toy_stream(90).to(DEVICE), toy_model(device=DEVICE)
    plain = collect(tokens, settings, model)
    fused = collect(tokens, settings, model, kernels="fused")
    for name, column in plain.items():
        tolerance = 5e-3 if name == "logits_after" else 0  # six iterations leave more open
        torch.testing.assert_close(fused[name], column, rtol=0, atol=tolerance)
    assert (fused["logits_after"] != fused["logits_before"]).any()
