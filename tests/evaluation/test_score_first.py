"""Score-first LoRA in the evaluation: scores before learning, one document and lane at a time."""

import copy

import numpy as np
import pytest
import torch

from evaluators import (
    BOS,
    SMALL,
    VOCABULARY,
    adapter_settings,
    audited,
    changed,
    collect,
    evaluator,
    random_model,
    reaches_of_flips,
    score_columns,
    toy_text,
    windows_of,
)
from fairway.evaluation.adapters.lora import BatchedLora
from fairway.evaluation.windows import lane_runs
from fairway.model.sampling import sample_documents
from fairway.model.spec import PROJECTIONS
from faulty_adapters import STATE, Watched, state_of

SETTINGS = changed(SMALL, adapters=("lora",))
WATCHED = changed(SMALL, adapters=("faulty_adapters:Watched",))
EVERY_MATRIX = changed(SETTINGS, projections=tuple(PROJECTIONS), scales=True)
BOTH = ("lora", "slot")
LEARNS_FIRST = "faulty_adapters:LearnsFirst"


@pytest.fixture(scope="module")
def model():
    return random_model(VOCABULARY)


@pytest.mark.parametrize("adapters", [("lora",), BOTH])
@pytest.mark.parametrize("length", [2, 3, 20, 33, 39, 70])
@pytest.mark.parametrize("lanes", [1, 3, 40])
def test_every_target_is_scored_once_whatever_the_length(model, adapters, length, lanes):
    tokens = toy_text(length)
    settings = changed(SETTINGS, adapters=adapters, lanes=lanes, chunk_tokens=12, iterations=3)
    columns = collect(tokens, settings, model)
    assert columns["positions"].tolist() == list(range(1, length))
    assert torch.isfinite(columns["logits_after"]).all()


def test_the_model_is_left_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    collect(toy_text(80), changed(SETTINGS, projections=("up",), scales=True), model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.adapter is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_stage_takes_up_the_logits_of_the_one_before(model):
    tokens, both = toy_text(120), changed(SETTINGS, adapters=BOTH, iterations=4)
    plain = collect(tokens, changed(SETTINGS, adapters=()), model)
    learned = collect(tokens, SETTINGS, model)
    assert torch.equal(plain["logits_before"], plain["logits_after"])
    assert torch.equal(plain["logits_before"], learned["logits_before"])
    batches = list(evaluator(model, both).score(tokens))
    assert {len(batch.logits) for batch in batches} == {3}
    order = torch.cat([batch.positions for batch in batches]).argsort()
    stages = [torch.cat(parts)[order] for parts in zip(*(b.logits for b in batches), strict=True)]
    # SLOT wants the logits of more positions, which is another shape.
    torch.testing.assert_close(stages[0], plain["logits_before"], rtol=0, atol=1e-5)
    torch.testing.assert_close(stages[1], learned["logits_after"], rtol=0, atol=1e-3)
    assert (stages[2] - stages[1]).abs().max() > 0.1


def test_a_document_is_scored_plainly_until_it_has_been_learned_from(model):
    """Its first slice, and what follows a BOS within a slice, to the bit."""
    tokens = toy_text(400, document_tokens=25)
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
    tokens, settings = toy_text(200), changed(SETTINGS, adapters=adapters, iterations=4)
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


def leaks(model, settings, flips=4, world_size=1, seed=5):
    evaluate = audited(model, settings, world_size)
    # Documents shorter than a slice and longer than a window.
    tokens = toy_text(150, seed, document_tokens=25)
    return reaches_of_flips(evaluate, tokens, flips, BOS, VOCABULARY)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("world_size", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_no_distribution_depends_on_its_target_or_on_what_follows(model, name, world_size):
    settings = changed(SETTINGS, iterations=4, **CAUSAL[name])
    assert leaks(model, settings, world_size=world_size, seed=5 + world_size) == []


@pytest.mark.parametrize("mutant", ["LearnsFirst", "OneClip", "OneGradient"])
@pytest.mark.parametrize("others", [("slot",), pytest.param((), marks=pytest.mark.slow)])
def test_the_flips_feel_a_planted_fault(model, others, mutant):
    adapters = (f"faulty_adapters:{mutant}", *others)
    settings = changed(SETTINGS, adapters=adapters, iterations=4)
    assert leaks(model, settings)


# --- one document, one lane ---------------------------------------------------------------------


def watched_lessons(model, tokens, settings):
    """(batch, arguments of `learn`, the state before, the state after) of every lesson."""
    Watched.lessons.clear()
    collect(tokens, settings, model)
    return list(Watched.lessons)


@pytest.mark.parametrize(("chunk", "context"), [(6, 24), (18, 18), (12, 32)])
def test_a_chunk_counts_the_current_documents_targets_that_its_own_lane_has_scored(
    model, chunk, context
):
    settings = changed(WATCHED, lanes=4, chunk_tokens=chunk, context_tokens=context)
    tokens = toy_text(1 + 32 + 6 * 29, document_tokens=30)  # the last window is not moved back
    windows, documents = windows_of(tokens, settings), (tokens == BOS).cumsum(0)
    runs = lane_runs(len(windows), 4)
    times = torch.zeros(len(tokens), dtype=torch.int64)
    for batch, (inputs, targets, counted), _, _ in watched_lessons(model, tokens, settings):
        for row, window in enumerate(batch.index.tolist()):
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
    model,
):
    settings = changed(WATCHED, lanes=4, forward_windows=4, steps=2)
    tokens = toy_text(300, document_tokens=20)
    initial = BatchedLora(model, 4, adapter_settings(settings, "faulty_adapters:Watched"), seed=0)
    last, seen = state_of(initial), [0, 0]
    for batch, _, before, after in watched_lessons(model, tokens, settings):
        for row in range(4):
            scored = batch.positions[batch.row == row]
            begins = bool((tokens[scored] == BOS).any())
            for name in STATE:
                expected = getattr(initial, name) if begins else last[name]
                assert torch.equal(before[name][row], expected[row])
            seen[begins] += 1
        last = after
    assert min(seen) > 10


def lanes_of_documents(documents, settings):
    """A text each of whose lanes scores one document, with the same filler around each.

    Windows are of 32 tokens, strides of 6, twelve windows a lane: a lane moves by 72 tokens. The
    filler is as long as a window, so that none shows two documents.
    """
    filler = toy_document(31, seed=99)
    period = 12 * settings.stride_tokens
    assert len(filler) == settings.window_tokens
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
    tokens, positions = lanes_of_documents(documents, settings)
    one = collect(tokens, settings, model)
    tokens, _ = lanes_of_documents([documents[index] for index in order], settings)
    two = collect(tokens, settings, model)
    for lane, index in enumerate(order):
        before, now = (torch.tensor(positions[at]) - 1 for at in (index, lane))
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


def test_it_learns_a_documents_habits_and_the_gains_add_up(model):
    tokens, settings = habits(4), changed(EVERY_MATRIX, lanes=2)  # no lane begins in a document
    alone = score_columns(model, tokens, settings)
    assert "gain_slot" not in alone
    gain = alone["gain_lora"]
    assert gain.mean() > 0.5
    # Later in a document more has been learned of it.
    within = alone["position"] % (len(tokens) // 4)
    assert gain[within > 90].mean() > gain[(within > 0) & (within < 30)].mean() + 0.5
    both = score_columns(model, tokens, changed(settings, adapters=BOTH, iterations=4))
    assert both["gain_lora"].mean() > 0.5 and (both["gain_slot"] != 0).any()
    np.testing.assert_allclose(
        both["gain_lora"] + both["gain_slot"],
        both["nll_before"] - both["nll_after"],
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.slow
def test_only_learning_before_scoring_gains_on_draws_from_the_model_itself(model):
    tokens, _ = sample_documents(model, 400, 60, BOS, 3)
    settings = changed(EVERY_MATRIX, learning_rate=0.02, steps=3)
    assert score_columns(model, tokens, settings)["gain_lora"].mean() < 0.0
    faulty = changed(
        settings, adapters=(LEARNS_FIRST,), learning_rate=0.02, steps=3,
        projections=tuple(PROJECTIONS), scales=True,
    )  # fmt: skip
    assert score_columns(model, tokens, faulty)["gain_learnsfirst"].mean() > 0.1
