"""Low-rank additions for each row: the function, what a row learns, and rows that never meet."""

import copy

import pytest
import torch
import torch.nn.functional as F

from evaluators import SMALL, VOCABULARY, adapter_settings, changed, random_model
from fairway.errors import UserError
from fairway.evaluation.adapters.lora import SCALES, BatchedLora
from fairway.model.spec import PROJECTIONS
from faulty_adapters import STATE

SETTINGS = changed(SMALL, adapters=("lora",))
EVERY_MATRIX = changed(SETTINGS, projections=tuple(PROJECTIONS), scales=True)
EVERYTHING = adapter_settings(EVERY_MATRIX, "lora")


def lora_settings(**changes):
    return adapter_settings(changed(SETTINGS, **changes), "lora")


@pytest.fixture(scope="module")
def model():
    return random_model(VOCABULARY)


def random_tokens(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def scattered(model, rows=3, **options):
    """Additions that are random in every row and in both factors."""
    additions = BatchedLora(model, rows, EVERYTHING, seed=1, **options)
    noise = torch.randn(additions.values.shape, generator=torch.Generator().manual_seed(2))
    additions.values.data += 0.3 * noise
    return additions


# --- the function -------------------------------------------------------------------------------


def dense_changes(additions, row):
    """(name, index) → what a row adds to a bank's matrix, B·A, or to a scale; float64."""
    parts = additions.split(additions.values.detach().double())
    return {
        at: found[1][row] @ found[0][row] if len(found) == 2 else found[0][row]
        for at, found in parts.items()
    }


def test_the_layout_holds_every_adapted_tensor_once(model):
    additions = BatchedLora(model, 1, EVERYTHING, seed=0)
    layers = model.config.layers
    assert len(additions.shapes) == layers * (len(PROJECTIONS) + len(SCALES))
    numbers = torch.arange(additions.values.shape[1]).unsqueeze(0)
    parts = additions.split(numbers)
    taken = torch.cat([part.flatten() for found in parts.values() for part in found])
    assert torch.equal(taken.sort().values, numbers[0])
    for bank, index in additions.shapes:
        assert index < len(getattr(model, bank))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_product_is_that_of_the_matrix_plus_both_factors(model, projection):
    additions = scattered(model)
    additions.parts = additions.split(additions.values.detach().double())
    bank, half = PROJECTIONS[projection]
    generator = torch.Generator().manual_seed(3)
    for layer in range(model.config.layers):
        index = half * model.config.layers + layer
        matrix = getattr(model, bank)[index].double()
        x = torch.randn(3, 7, matrix.shape[1], generator=generator, dtype=torch.float64)
        found = additions.product(bank, index, x, F.linear(x, matrix))
        for row in range(3):
            dense = matrix + dense_changes(additions, row)[bank, index]
            torch.testing.assert_close(found[row], F.linear(x[row], dense), rtol=0, atol=1e-12)


@pytest.mark.parametrize("first_position", [0, 9])
@pytest.mark.parametrize(
    "features", [{}, {"layers": 3, "recurrent_layers": [1, 2], "recurrence_passes": 3}]
)
def test_each_row_is_the_dense_model_with_its_own_matrices(features, first_position):
    """Also where blocks recur, whose passes share the factors as they share the matrices."""
    model = random_model(VOCABULARY, **features)
    exact = copy.deepcopy(model).double()
    exact.compute_dtype = torch.float64
    additions = scattered(exact)
    tokens = random_tokens(3, 20)
    exact.adapter = additions
    additions.parts = additions.split(additions.values.detach().double())
    with torch.no_grad():
        found = exact.hidden(tokens, first_position)
        for row in range(3):
            dense = copy.deepcopy(model).double()
            dense.compute_dtype = torch.float64
            for (name, index), change in dense_changes(additions, row).items():
                getattr(dense, name)[index] += change
            expected = dense.hidden(tokens[row : row + 1], first_position)
            torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-10)


def test_what_is_not_adapted_is_handed_through(model):
    additions = BatchedLora(model, 2, lora_settings(projections=("up",)), seed=0)
    y, value = torch.randn(2, 3, 16), torch.randn(16)
    assert additions.product("key_value_bank", 0, y, y) is y
    assert additions.scale("mlp_scale", 0, value) is value


@pytest.mark.parametrize("first_position", [0, 5])
def test_at_the_start_the_function_is_the_plain_model_to_the_bit(model, first_position):
    tokens = random_tokens(3, 20)
    with torch.no_grad():
        plain = model(tokens, first_position)
    assert torch.equal(
        BatchedLora(model, 3, EVERYTHING, seed=0).logits(tokens, first_position), plain
    )
    assert not torch.equal(scattered(model).logits(tokens, first_position), plain)
    assert model.adapter is None


def test_every_row_begins_the_same_and_the_seed_decides_how(model):
    values = [BatchedLora(model, 2, EVERYTHING, seed).values for seed in (0, 0, 1)]
    assert torch.equal(values[0][0], values[0][1])
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


# --- learning -----------------------------------------------------------------------------------


def lesson(seed=0, rows=3, length=20, count=6):
    """tokens, targets of the last positions, and which of them count: all."""
    text = random_tokens(rows, length + 1, seed)
    return text[:, :-1], text[:, -count:], torch.ones(rows, count, dtype=torch.bool)


def test_learning_lowers_each_rows_loss(model):
    additions = BatchedLora(model, 3, EVERYTHING, seed=0)
    tokens, targets, counted = lesson()

    def losses():
        logits = additions.logits(tokens, tokens.shape[1] - targets.shape[1])
        return F.cross_entropy(logits.mT, targets, reduction="none").mean(1)

    before = losses()
    for _ in range(3):
        additions.learn(tokens, targets, counted)
    assert (losses() < before - 0.1).all()


def test_what_one_row_learns_changes_no_other_to_the_bit(model):
    one, two = (scattered(model) for _ in range(2))
    tokens, targets, counted = lesson()
    others, other_targets, _ = lesson(seed=9)
    for learner, middle in ((one, False), (two, True)):
        for _ in range(3):
            mixed = tokens.clone(), targets.clone(), counted.clone()
            if middle:
                mixed[0][1], mixed[1][1], mixed[2][1, :4] = others[1], other_targets[1], False
            learner.learn(*mixed)
    for name in STATE:
        left, right = getattr(one, name), getattr(two, name)
        assert torch.equal(left[[0, 2]], right[[0, 2]])
        assert torch.equal(left[1], right[1]) == (name == "steps")
    logits = [learner.logits(tokens, 0) for learner in (one, two)]
    assert torch.equal(logits[0][[0, 2]], logits[1][[0, 2]])
    assert not torch.equal(logits[0][1], logits[1][1])


def test_rows_learn_the_same_in_slices_as_all_at_once(model):
    tokens, targets = random_tokens(5, 20), random_tokens(5, 6, seed=1)
    counted = torch.rand(5, 6, generator=torch.Generator().manual_seed(4)) < 0.7
    learned = []
    for tokens_at_once in (1000, 45):
        additions = scattered(model, rows=5, learning_tokens=tokens_at_once)
        additions.learn(tokens, targets, counted)
        learned.append(additions.values)
    torch.testing.assert_close(*learned, rtol=0, atol=1e-5)
    assert not torch.equal(learned[0], scattered(model, rows=5).values)


def test_a_row_without_counted_targets_stays_as_it_is_to_the_bit(model):
    additions = scattered(model)
    tokens, targets, counted = lesson()
    additions.learn(tokens, targets, counted)  # so that its moments are not zero
    before = {name: getattr(additions, name).clone() for name in STATE}
    counted[1] = False
    additions.learn(tokens, targets, counted)
    for name, value in before.items():
        unchanged = (getattr(additions, name) == value).all(1)
        assert unchanged.tolist() == [False, True, False]


def test_only_counted_targets_are_learned_from(model):
    one, two = (scattered(model) for _ in range(2))
    tokens, targets, counted = lesson()
    counted[:, 3:] = False
    one.learn(tokens, targets, counted)
    targets[:, 3:] = 5
    two.learn(tokens, targets, counted)
    assert torch.equal(one.values, two.values)


@pytest.mark.parametrize("weight_decay", [0.0, 0.4])
@pytest.mark.parametrize("gradient_clip", [0.02, 100.0])
def test_each_row_takes_the_steps_of_torchs_adamw_alone(model, weight_decay, gradient_clip):
    """Decay pulls towards the initial values: AdamW on the difference from them."""
    settings = lora_settings(
        weight_decay=weight_decay, gradient_clip=gradient_clip, steps=2, rank=1
    )
    additions = BatchedLora(model, 3, settings, seed=0)
    alone = [single_row_reference(model, settings, row) for row in range(3)]
    for turn in range(4):
        tokens, targets, counted = lesson(seed=turn)
        counted[0, :turn] = False
        counted[1] &= turn % 2 == 0  # this row learns half as often
        additions.learn(tokens, targets, counted)
        for row, learn in enumerate(alone):
            expected = learn(tokens[row], targets[row], counted[row])
            torch.testing.assert_close(additions.values[row], expected, rtol=0, atol=2e-4)
    assert additions.steps.flatten().tolist() == [8, 4, 8]
    moved = (additions.values - additions.initial).norm(dim=1)
    assert (moved > 0.1).all()


def single_row_reference(model, settings, row):
    """A function that learns one row's lesson with PyTorch's parts and returns its values."""
    additions = BatchedLora(model, 1, settings, seed=0)
    shift = torch.zeros_like(additions.initial, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [shift],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )

    def learn(tokens, targets, counted):
        for _ in range(settings.steps if counted.any() else 0):
            model.adapter = additions
            additions.parts = additions.split((additions.initial + shift).unsqueeze(0))
            logits = model(tokens.unsqueeze(0), len(tokens) - len(targets))[0]
            model.adapter = None
            optimizer.zero_grad()
            F.cross_entropy(logits[counted], targets[counted]).backward()
            torch.nn.utils.clip_grad_norm_([shift], settings.gradient_clip)
            optimizer.step()
        return (additions.initial + shift).detach()

    return learn


def test_the_clip_is_each_rows_own(model):
    """Squares of the moments after a step are those of a gradient of the clip's norm."""
    settings = lora_settings(gradient_clip=0.01, betas=(0.0, 0.0))
    additions = BatchedLora(model, 3, settings, seed=0)
    additions.learn(*lesson())
    torch.testing.assert_close(
        additions.mean.norm(dim=1), torch.full((3,), 0.01), rtol=1e-3, atol=0
    )


def test_a_reset_row_is_new_and_the_others_are_not(model):
    additions = scattered(model)
    additions.learn(*lesson())
    before = {name: getattr(additions, name).detach().clone() for name in STATE}
    additions.reset(torch.tensor([False, True, False]))
    for name, value in before.items():
        now = getattr(additions, name)
        assert torch.equal(now[[0, 2]], value[[0, 2]])
        assert torch.equal(
            now[1], additions.initial if name == "values" else torch.zeros_like(now[1])
        )


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": ("slot", "lora")}, "evaluation.adapters.lora computes logits anew"),
        ({"adapters": ("lora", "lora")}, "evaluation.adapters names lora twice"),
        (
            {"projections": ("query", "gate")},
            "lora.projections.1: found 'gate', expected one of",
        ),
        ({"projections": ("query", "query")}, "lora.projections is ['query', 'query']"),
        ({"projections": ()}, "lora adapts nothing: name projections or set scales"),
        (
            {"chunk_tokens": 8},
            "lora.chunk_tokens 8 is not a multiple of evaluation.stride_tokens 6",
        ),
        ({"chunk_tokens": 30}, "lora.context_tokens is 24: expected chunk_tokens (30) to"),
        ({"context_tokens": 5}, "lora.context_tokens is 5: expected chunk_tokens (6) to"),
        ({"context_tokens": 33}, "to evaluation.window_tokens (32)"),
        ({"adapters": ("lora", "slot"), "scope": "batch"}, "scores several windows together"),
        ({"rank": 0}, "evaluation.adapters.lora.rank: found 0"),
        ({"steps": 0}, "evaluation.adapters.lora.steps: found 0"),
        ({"chunk_tokens": 0}, "evaluation.adapters.lora.chunk_tokens: found 0"),
        ({"learning_rate": 0.0}, "evaluation.adapters.lora.learning_rate: found 0.0"),
        ({"gradient_clip": 0.0}, "evaluation.adapters.lora.gradient_clip: found 0.0"),
        ({"weight_decay": -1.0}, "evaluation.adapters.lora.weight_decay: found -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(change, message):
    with pytest.raises(UserError) as error:
        changed(SETTINGS, **change)
    assert message in str(error.value) and "\n" not in str(error.value)
