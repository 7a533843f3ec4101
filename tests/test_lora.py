"""Score-first LoRA: rows that never meet, scores before learning, one document at a time."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluators import SMALL, changed, random_model, reaches_of_flips
from test_slot import BOS, VOCABULARY, collect, toy_stream, windows_of

from fairway.adaptation import lora, scoring
from fairway.adaptation.lora import PROJECTIONS, SCALES, LoraAdapter, RowLora
from fairway.adaptation.scoring import score_stream
from fairway.adaptation.slot_evaluator import document_source, make_evaluator
from fairway.adaptation.token_table import score_rank
from fairway.errors import UserError
from fairway.evaluation.windows import lane_runs

SETTINGS = changed(SMALL, adapters=("lora",))
BOTH = ("lora", "slot")
EVERYTHING = changed(SETTINGS, projections=tuple(PROJECTIONS), scales=True).lora
STATE = ("values", "mean", "square", "steps")


@pytest.fixture(scope="module")
def model():
    return random_model(VOCABULARY)


def random_tokens(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def scattered(model, rows=3, settings=EVERYTHING):
    """Additions that are random in every row and in both factors."""
    additions = RowLora(model, rows, settings, seed=1)
    noise = torch.randn(additions.values.shape, generator=torch.Generator().manual_seed(2))
    additions.values.data += 0.3 * noise
    return additions


# --- the function -------------------------------------------------------------------------------


def dense_changes(additions, row):
    """(name, index) → what a row adds to a bank's matrix, B·A, or to a scale; float64."""
    rank, values = additions.settings.rank, additions.values[row].detach().double()
    changes = {}
    for place, (offset, *widths) in additions.places.items():
        if place[0] in SCALES:
            changes[place] = values[offset : offset + additions.model.config.width]
        else:
            in_width, out_width = widths
            middle, end = offset + rank * in_width, offset + rank * (in_width + out_width)
            first = values[offset:middle].view(rank, in_width)
            changes[place] = values[middle:end].view(out_width, rank) @ first
    return changes


def test_the_layout_holds_every_adapted_tensor_once(model):
    additions = RowLora(model, 1, EVERYTHING, seed=0)
    layers, rank = model.config.layers, EVERYTHING.rank
    assert len(additions.places) == layers * (len(PROJECTIONS) + len(SCALES))
    taken = np.zeros(additions.values.shape[1], dtype=int)
    for offset, *widths in additions.places.values():
        taken[offset : offset + (rank * sum(widths) if widths else model.config.width)] += 1
    assert (taken == 1).all()
    for bank, index in additions.places:
        assert index < len(getattr(model, bank))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_product_is_that_of_the_matrix_plus_both_factors(model, projection):
    additions = scattered(model)
    additions.cast = additions.values.detach().double()
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


@pytest.mark.parametrize("first_place", [0, 9])
def test_each_row_is_the_dense_model_with_its_own_matrices(model, first_place):
    exact = copy.deepcopy(model).double()
    exact.compute_dtype = torch.float64
    additions = scattered(exact)
    tokens = random_tokens(3, 20)
    exact.adapter, additions.cast = additions, additions.values.detach().double()
    with torch.no_grad():
        found = exact.hidden(tokens, first_place)
        for row in range(3):
            dense = copy.deepcopy(model).double()
            dense.compute_dtype = torch.float64
            for (name, index), change in dense_changes(additions, row).items():
                getattr(dense, name)[index] += change
            expected = dense.hidden(tokens[row : row + 1], first_place)
            torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-10)


def test_what_is_not_adapted_is_handed_through(model):
    additions = RowLora(model, 2, changed(SETTINGS, projections=("up",)).lora, seed=0)
    y, value = torch.randn(2, 3, 16), torch.randn(16)
    assert additions.product("key_value_bank", 0, y, y) is y
    assert additions.scale("mlp_scale", 0, value) is value


@pytest.mark.parametrize("first_place", [0, 5])
def test_at_the_start_the_function_is_the_plain_model_to_the_bit(model, first_place):
    tokens = random_tokens(3, 20)
    with torch.no_grad():
        plain = model(tokens, first_place)
    assert torch.equal(RowLora(model, 3, EVERYTHING, seed=0).logits(tokens, first_place), plain)
    assert not torch.equal(scattered(model).logits(tokens, first_place), plain)
    assert model.adapter is None


def test_every_row_begins_the_same_and_the_seed_decides_how(model):
    values = [RowLora(model, 2, EVERYTHING, seed).values for seed in (0, 0, 1)]
    assert torch.equal(values[0][0], values[0][1])
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


# --- learning -----------------------------------------------------------------------------------


def lesson(seed=0, rows=3, length=20, count=6):
    """tokens, targets of the last places, and which of them count: all."""
    text = random_tokens(rows, length + 1, seed)
    return text[:, :-1], text[:, -count:], torch.ones(rows, count, dtype=torch.bool)


def test_learning_lowers_each_rows_loss(model):
    additions = RowLora(model, 3, EVERYTHING, seed=0)
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
    settings = changed(
        SETTINGS, weight_decay=weight_decay, gradient_clip=gradient_clip, steps=2, rank=1
    ).lora
    additions = RowLora(model, 3, settings, seed=0)
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
    additions = RowLora(model, 1, settings, seed=0)
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
            additions.cast = (additions.initial + shift).unsqueeze(0)
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
    settings = changed(SETTINGS, gradient_clip=0.01, betas=(0.0, 0.0)).lora
    additions = RowLora(model, 3, settings, seed=0)
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


# --- the evaluation -----------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [("lora",), BOTH])
@pytest.mark.parametrize("length", [2, 3, 20, 33, 39, 70])
@pytest.mark.parametrize("lanes", [1, 3, 40])
def test_every_target_is_scored_once_whatever_the_length(model, adapters, length, lanes):
    tokens = toy_stream(length)
    settings = changed(SETTINGS, adapters=adapters, lanes=lanes, chunk_tokens=12, iterations=3)
    columns = collect(tokens, settings, model)
    assert columns["positions"].tolist() == list(range(1, length))
    assert torch.isfinite(columns["logits_after"]).all()


def test_the_model_is_left_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    collect(toy_stream(80), changed(SETTINGS, projections=("up",), scales=True), model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.adapter is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_stage_takes_up_the_logits_of_the_one_before(model):
    tokens, both = toy_stream(120), changed(SETTINGS, adapters=BOTH, iterations=4)
    plain = collect(tokens, changed(SETTINGS, adapters=()), model)
    learned = collect(tokens, SETTINGS, model)
    assert torch.equal(plain["logits_before"], plain["logits_after"])
    assert torch.equal(plain["logits_before"], learned["logits_before"])
    records = list(score_stream(model, tokens, both, BOS, model=model))
    assert {len(record.logits) for record in records} == {3}
    order = torch.cat([record.positions for record in records]).argsort()
    stages = [torch.cat(parts)[order] for parts in zip(*(r.logits for r in records), strict=True)]
    # SLOT wants the logits of more places, which is another shape.
    torch.testing.assert_close(stages[0], plain["logits_before"], rtol=0, atol=1e-5)
    torch.testing.assert_close(stages[1], learned["logits_after"], rtol=0, atol=1e-3)
    assert (stages[2] - stages[1]).abs().max() > 0.1


def test_a_document_is_scored_plainly_until_it_has_been_learned_from(model):
    """Its first slice, and what follows a BOS within a slice, to the bit."""
    tokens = toy_stream(400, document_tokens=25)
    columns = collect(tokens, SETTINGS, model)
    adapted = (columns["logits_after"] != columns["logits_before"]).any(1)
    documents = (tokens == BOS).cumsum(0)
    learned = set()  # (lane, document)
    for window in columns["windows"].unique().tolist():
        inside = columns["windows"] == window
        lane = int(columns["lanes"][inside][0])
        inputs = columns["positions"][inside] - 1
        first, last = int(documents[inputs[0]]), int(documents[inputs[-1] + 1])
        expected = (documents[inputs] == first) & ((lane, first) in learned)
        assert torch.equal(adapted[inside], expected)
        if bool((documents[inputs] == last).any()):
            learned.add((lane, last))
    assert 50 < adapted.sum() < len(adapted)


@pytest.mark.parametrize("adapters", [("lora",), BOTH])
def test_the_scores_are_bitwise_the_same_for_any_number_of_ranks(model, adapters):
    tokens, settings = toy_stream(200), changed(SETTINGS, adapters=adapters, iterations=4)
    alone = collect(tokens, settings, model)
    for world_size in (2, 3):
        shares = [
            collect(tokens, settings, model, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        merged = {name: torch.cat([share[name] for share in shares]) for name in alone}
        order = merged["positions"].argsort(stable=True)
        for name, column in alone.items():
            assert torch.equal(merged[name][order], column)


# --- the score comes first ----------------------------------------------------------------------

CAUSAL = {
    "one slice a chunk": {"adapters": ("lora",)},
    "two slices a chunk": {"adapters": ("lora",), "chunk_tokens": 12, "scales": True},
    "two steps, then a delta": {"adapters": BOTH, "steps": 2},
    "long chunks, then a delta": {
        "adapters": BOTH, "chunk_tokens": 18, "context_logits": "scored", "lanes": 2,
    },
}  # fmt: skip


def leaks(model, settings, flips=6, world_size=1, seed=5):
    evaluate = make_evaluator(model, settings, BOS, world_size, model=model)
    # Documents shorter than a slice and longer than a window.
    tokens = toy_stream(150, seed, document_tokens=25)
    return reaches_of_flips(evaluate, tokens, flips, BOS, VOCABULARY)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("world_size", [1, 2])
def test_no_distribution_depends_on_its_target_or_on_what_follows(model, name, world_size):
    settings = changed(SETTINGS, iterations=4, **CAUSAL[name])
    assert leaks(model, settings, world_size=world_size, seed=5 + world_size) == []


class LearnsFirst(LoraAdapter):
    """The fault: a slice is learned from before it is scored."""

    def adapt(self, rows, logits, scored):
        if rows.step == 0:
            self.lane_starts = rows.first_scored
        super().learn(rows)
        return super().adapt(rows, logits, scored)

    def learn(self, rows):
        pass


class OneClip(RowLora):
    """The fault: the norm is that of all rows together."""

    def _update(self, gradient, learns):
        shrunk = (self.settings.gradient_clip / gradient.norm()).clamp(max=1.0)
        super()._update(gradient * shrunk, learns)


class OneGradient(RowLora):
    """The fault: rows learn what all of them learn on average, as a shared adapter would."""

    def _update(self, gradient, learns):
        super()._update(gradient.mean(0).expand_as(gradient), learns)


@pytest.mark.parametrize("mutant", [LearnsFirst, OneClip, OneGradient])
@pytest.mark.parametrize("adapters", [("lora",), BOTH])
def test_the_flips_feel_a_planted_fault(model, monkeypatch, adapters, mutant):
    if mutant is LearnsFirst:
        monkeypatch.setattr(scoring, "LoraAdapter", mutant)
    else:
        monkeypatch.setattr(lora, "RowLora", mutant)
    settings = changed(SETTINGS, adapters=adapters, iterations=4)
    assert leaks(model, settings)


# --- one document, one lane ---------------------------------------------------------------------


def watched_lessons(model, tokens, settings, monkeypatch):
    """(rows, arguments of RowLora.learn, the state before, the state after) of every lesson."""
    lessons = []

    class Watched(LoraAdapter):
        def learn(self, rows):
            self.rows = rows
            super().learn(rows)

        def __init__(self, *arguments):
            super().__init__(*arguments)
            learn = self.lora.learn

            def watched(*lesson):
                before = state_of(self.lora)
                learn(*lesson)
                lessons.append((self.rows, lesson, before, state_of(self.lora)))

            self.lora.learn = watched

    monkeypatch.setattr(scoring, "LoraAdapter", Watched)
    collect(tokens, settings, model)
    return lessons


def state_of(additions):
    return {name: getattr(additions, name).detach().clone() for name in STATE}


@pytest.mark.parametrize(("chunk", "context"), [(6, 24), (18, 18), (12, 32)])
def test_a_chunk_counts_the_current_documents_targets_that_its_own_lane_has_scored(
    model, monkeypatch, chunk, context
):
    settings = changed(SETTINGS, lanes=4, chunk_tokens=chunk, context_tokens=context)
    tokens = toy_stream(1 + 32 + 6 * 29, document_tokens=30)  # the last window is not moved back
    windows, documents = windows_of(tokens, settings), (tokens == BOS).cumsum(0)
    runs = lane_runs(len(windows), 4)
    times = torch.zeros(len(tokens), dtype=torch.int64)
    for rows, (inputs, targets, counted), _, _ in watched_lessons(
        model, tokens, settings, monkeypatch
    ):
        for row, window in enumerate(rows.index.tolist()):
            if window < 0:  # a lane that has ended
                assert not counted[row].any()
                continue
            end = int(windows.starts[window]) + windows.length
            own_lane = next(run for run in runs if window in run)
            positions = torch.arange(end - chunk + 1, end + 1)
            expected = (positions >= int(windows.first_scored[own_lane.start])) & (
                documents[positions - 1] == documents[end]
            )
            assert torch.equal(counted[row], expected)
            assert torch.equal(targets[row], tokens[positions])
            assert torch.equal(inputs[row], tokens[end - context : end])
            times[positions[expected]] += 1
    assert times.max() == 1 and times.sum() > 80


def test_what_was_learned_is_dropped_where_a_document_begins_and_carried_on_within_one(
    model, monkeypatch
):
    settings = changed(SETTINGS, lanes=4, forward_windows=4, steps=2)
    tokens = toy_stream(220, document_tokens=30)
    initial = RowLora(model, 4, settings.lora, seed=0)
    last, seen = state_of(initial), [0, 0]
    for rows, _, before, after in watched_lessons(model, tokens, settings, monkeypatch):
        for row in range(4):
            scored = rows.positions[rows.row == row]
            begins = bool((tokens[scored] == BOS).any())
            for name in STATE:
                expected = getattr(initial, name) if begins else last[name]
                assert torch.equal(before[name][row], expected[row])
            seen[begins] += 1
        last = after
    assert min(seen) > 10


def lanes_of_documents(documents, settings):
    """A stream each of whose lanes scores one document, with the same filler around each.

    Windows are of 32 tokens, strides of 6, twelve windows a lane: a lane moves by 72 tokens. The
    filler is as long as a window, so that none shows two documents.
    """
    filler = toy_document(31, seed=99)
    period = 12 * settings.evaluation.stride_tokens
    assert len(filler) == settings.evaluation.window_tokens
    pieces = [torch.cat([filler, document]) for document in documents]
    assert {len(piece) for piece in pieces} == {period}
    tokens = torch.cat([*pieces, filler[:27]])
    assert len(windows_of(tokens, settings)) == 12 * len(documents)
    return tokens, [range(period * lane + 33, period * (lane + 1)) for lane in range(len(pieces))]


def toy_document(length, seed):
    """BOS and `length` tokens, a few of them frequent."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(VOCABULARY, generator=generator) ** 4
    weights[BOS] = 0
    draws = torch.multinomial(weights, length, replacement=True, generator=generator)
    return torch.cat([torch.tensor([BOS]), draws])


@pytest.mark.parametrize(
    ("adapters", "order"),
    # SLOT's first delta begins at the first lane's many scored targets: its group stays as it is.
    [(("lora",), [3, 5, 0, 4, 2, 1]), (BOTH, [0, 1, 4, 2, 5, 3])],
)
@pytest.mark.parametrize("forward_windows", [2, 6])
def test_a_documents_score_is_bitwise_the_same_whichever_others_share_its_batch(
    model, adapters, order, forward_windows
):
    settings = changed(
        SETTINGS, adapters=adapters, lanes=6, forward_windows=forward_windows, chunk_tokens=12
    )
    documents = [toy_document(39, seed) for seed in range(6)]
    tokens, places = lanes_of_documents(documents, settings)
    one = collect(tokens, settings, model)
    tokens, _ = lanes_of_documents([documents[index] for index in order], settings)
    two = collect(tokens, settings, model)
    for lane, index in enumerate(order):
        before, now = (torch.tensor(places[at]) - 1 for at in (index, lane))
        assert torch.equal(two["targets"][now], one["targets"][before])
        assert set(two["lanes"][now].tolist()) == {lane}
        assert torch.equal(two["logits_after"][now], one["logits_after"][before])
        assert not torch.equal(two["logits_after"][now], two["logits_before"][now])


# --- what it gains ------------------------------------------------------------------------------


def habits(count, seed=0):
    """Documents that repeat their own few words, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for _ in range(count):
        words = torch.randint(2, VOCABULARY, (3, 4), generator=generator)
        order = torch.randint(3, (30,), generator=generator)
        pieces += [torch.tensor([BOS]), words[order].flatten()]
    return torch.cat(pieces)


def score_table(model, tokens, settings):
    scores = score_rank(model, tokens, settings, BOS, 0, 1, lambda _: None, model=model)
    return scores.columns


def test_it_learns_a_documents_habits_and_the_gains_add_up(model):
    tokens = habits(4)
    columns = score_table(model, tokens, changed(SETTINGS, adapters=BOTH, iterations=4))
    assert columns["gain_lora"].mean() > 0.2
    np.testing.assert_allclose(
        columns["gain_lora"] + columns["gain_slot"],
        columns["nll_before"] - columns["nll_after"],
        rtol=0,
        atol=1e-12,
    )
    alone = score_table(model, tokens, SETTINGS)
    assert "gain_slot" not in alone
    # Later in a document more has been learned.
    parts = (tokens.cumsum(0) * 0 + torch.arange(len(tokens)) % 121)[alone["position"]]
    early, late = (alone["gain_lora"][(parts > low) & (parts < low + 30)] for low in (0, 90))
    assert late.mean() > early.mean() + 0.1


def test_only_learning_before_scoring_gains_on_draws_from_the_model_itself(model, monkeypatch):
    tokens, _ = document_source(model, 60, BOS)(700, 3)
    settings = changed(SETTINGS, learning_rate=0.02)
    assert score_table(model, tokens, settings)["gain_lora"].mean() < 0.002
    monkeypatch.setattr(scoring, "LoraAdapter", LearnsFirst)
    assert score_table(model, tokens, settings)["gain_lora"].mean() > 0.05


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": ("slot", "lora")}, "evaluation.adapters has slot before lora"),
        ({"adapters": ("lora", "lora")}, "evaluation.adapters is ['lora', 'lora']: expected lora"),
        ({"adapters": ("ema",)}, "evaluation.adapters is ['ema']: expected lora, slot"),
        ({"projections": ("query", "gate")}, "lora.projections has gate: expected some of query"),
        ({"projections": ()}, "lora adapts nothing: name lora.projections or set lora.scales"),
        (
            {"chunk_tokens": 8},
            "lora.chunk_tokens 8 is not a multiple of evaluation.stride_tokens 6",
        ),
        ({"chunk_tokens": 30}, "lora.context_tokens is 24: expected lora.chunk_tokens (30) to"),
        ({"context_tokens": 5}, "lora.context_tokens is 5: expected lora.chunk_tokens (6) to"),
        ({"context_tokens": 33}, "to evaluation.window_tokens (32)"),
        ({"adapters": BOTH, "scope": "batch"}, "slot.scope 'batch'"),
        ({"rank": 0}, "lora.rank is 0"),
        ({"steps": 0}, "lora.steps is 0"),
        ({"chunk_tokens": 0}, "lora.chunk_tokens is 0"),
        ({"learning_rate": 0.0}, "lora.learning_rate is 0.0"),
        ({"gradient_clip": 0.0}, "lora.gradient_clip is 0.0"),
        ({"weight_decay": -1.0}, "lora.weight_decay is -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(change, message):
    with pytest.raises(UserError) as error:
        changed(SETTINGS, **change)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_of_an_adapter_that_is_not_listed_need_not_fit():
    changed(SETTINGS, adapters=("slot",), chunk_tokens=8)
    changed(SETTINGS, adapters=(), chunk_tokens=8, scope="batch", context_logits="scored")
