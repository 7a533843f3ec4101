"""SLOT: the scores of its description, every target once, and nothing from the future."""

from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

from evaluators import (
    BOS,
    SMALL,
    VOCABULARY,
    ToyModel,
    adapter_settings,
    audited,
    changed,
    collect,
    evaluator,
    reaches_of_flips,
    toy_text,
    windows_of,
)
from fairway.errors import UserError
from fairway.evaluation.adapters.fit.logit_delta import fit_delta
from fairway.evaluation.text import target_nats
from fairway.evaluation.windows import lane_runs
from reference_slot import reference_scores

SETTINGS = SMALL
CONTEXTS = pytest.mark.parametrize(
    ("same_document", "context_logits"),
    [(True, "current"), (False, "current"), (True, "scored"), (False, "scored")],
)


# --- agreement with the description -------------------------------------------------------------


@CONTEXTS
@pytest.mark.parametrize("focal_tokens", ["all", 17])
def test_one_lane_agrees_with_the_slow_float64_reference(
    same_document, context_logits, focal_tokens
):
    settings = changed(
        SETTINGS,
        lanes=1,
        focal_tokens=focal_tokens,
        same_document=same_document,
        context_logits=context_logits,
    )
    tokens = toy_text(120)
    check_against_reference(tokens, settings, collect(tokens, settings), windows=(0, None))


@CONTEXTS
def test_every_lane_is_the_reference_run_on_its_own_windows(same_document, context_logits):
    settings = changed(SETTINGS, same_document=same_document, context_logits=context_logits)
    tokens = toy_text(201, seed=3)
    columns = collect(tokens, settings)
    num_windows = len(windows_of(tokens, settings))
    for lane, run in enumerate(lane_runs(num_windows, settings.lanes)):
        own = {name: column[columns["lanes"] == lane] for name, column in columns.items()}
        check_against_reference(tokens, settings, own, windows=(run.start, run.stop))


def check_against_reference(tokens, settings, columns, windows):
    reference = reference_scores(ToyModel(), tokens, settings, BOS, *windows)
    positions = columns["positions"].tolist()
    assert positions == sorted(reference)
    for index, name in enumerate(("logits_before", "logits_after")):
        expected = torch.stack([reference[position][index] for position in positions])
        found = columns[name].double().log_softmax(1)
        # The fit stops at 1e-7 nats of its mean loss, the reference far below that.
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 if index else 1e-5)


def test_the_fit_minimizes_the_penalized_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 40, VOCABULARY, generator=generator)
    targets = torch.randint(0, VOCABULARY, (3, 40), generator=generator)
    is_context = torch.rand(3, 40, generator=generator) < 0.6
    result = fit_delta(
        torch.softmax(logits, 2),
        targets,
        is_context,
        torch.zeros(3, VOCABULARY),
        l2=2.0,
        clamp=5.0,
        iterations=50,
        history=10,
    )
    for row in range(3):
        delta = result.x[row].double().requires_grad_()
        kept = is_context[row]
        total = cross_entropy(
            logits[row, kept].double() + delta, targets[row, kept], reduction="sum"
        )
        loss = (total + delta.square().sum()) / kept.sum()  # l2 / 2 is 1
        (gradient,) = torch.autograd.grad(loss, delta)
        assert gradient.abs().max() < 1e-3


def test_without_context_the_delta_is_zero():
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    options = dict(l2=0.0, clamp=5.0, iterations=5, history=3)
    probabilities = torch.full((2, 4, 8), 1 / 8)
    targets = torch.zeros(2, 4, dtype=torch.int64)
    fit = fit_delta(probabilities, targets, nothing, torch.ones(2, 8), **options)
    assert torch.equal(fit.x, torch.zeros(2, 8))


def test_the_delta_is_clamped():
    settings = changed(SETTINGS, l2=0.0, clamp=0.25, same_document=False)
    columns = collect(toy_text(150), settings)
    delta = columns["logits_after"] - columns["logits_before"]
    assert 0.24 < delta.abs().max() < 0.25 + 1e-5


def test_the_delta_is_dropped_from_the_first_bos_of_the_slice_on():
    tokens = toy_text(400, document_tokens=25)
    columns = collect(tokens, SETTINGS)
    changed = (columns["logits_after"] != columns["logits_before"]).any(1)
    documents = (tokens == BOS).cumsum(0)
    seen = 0
    for window in columns["windows"].unique():
        inside = columns["windows"] == window
        inputs = columns["positions"][inside] - 1
        beyond = documents[inputs] != documents[inputs[0]]
        assert not changed[inside][beyond].any()
        seen += int(beyond.sum())
    assert seen > 20 and changed.any()


# --- coverage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"scope": "window"}, {"scope": "batch"}, {"adapters": ()}])
@pytest.mark.parametrize("length", [2, 3, 20, 32, 33, 34, 39, 63, 100])
@pytest.mark.parametrize("lanes", [1, 3, 40])
def test_every_target_is_scored_once_whatever_the_length(changes, length, lanes):
    tokens = toy_text(length)
    columns = collect(tokens, changed(SETTINGS, lanes=lanes, **changes))
    assert columns["positions"].tolist() == list(range(1, length))
    assert torch.equal(columns["targets"], tokens[1:])
    for name in ("logits_before", "logits_after"):
        assert torch.isfinite(columns[name]).all()


def test_the_scored_buffer_covers_short_streams_too():
    for length in (2, 20, 33, 70):
        columns = collect(toy_text(length), changed(SETTINGS, context_logits="scored"))
        assert columns["positions"].tolist() == list(range(1, length))


def test_without_a_delta_the_scores_are_those_of_plain_sliding_windows():
    tokens = toy_text(150)
    plain = collect(tokens, changed(SETTINGS, adapters=()))
    fitted = collect(tokens, SETTINGS)
    assert torch.equal(plain["logits_before"], plain["logits_after"])
    assert torch.equal(plain["logits_before"], fitted["logits_before"])
    assert not plain["in_own_loss"].any()


def test_windows_and_lanes_are_recorded():
    tokens = toy_text(200)
    columns = collect(tokens, SETTINGS)
    windows = windows_of(tokens, SETTINGS)
    counts = Counter(columns["windows"].tolist())
    assert [counts[window] for window in range(len(windows))] == windows.scored.tolist()
    for lane, run in enumerate(lane_runs(len(windows), SETTINGS.lanes)):
        assert set(columns["windows"][columns["lanes"] == lane].tolist()) == set(run)


# --- ranks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["window", "batch"])
def test_the_scores_are_bitwise_the_same_for_any_number_of_ranks(scope):
    tokens, settings = toy_text(260), changed(SETTINGS, scope=scope)
    alone = collect(tokens, settings)
    for world_size in (2, 3):
        shares = [
            collect(tokens, settings, rank=r, world_size=world_size) for r in range(world_size)
        ]
        merged = {name: torch.cat([share[name] for share in shares]) for name in alone}
        order = merged["positions"].argsort(stable=True)
        for name, column in alone.items():
            assert torch.equal(merged[name][order], column)


# --- causality ----------------------------------------------------------------------------------


def leaks(settings, tokens, flips, world_size=1) -> list[int]:
    """How far before a flipped token its effect is felt, for each target that feels it."""
    evaluate = audited(ToyModel(), settings, world_size)
    return reaches_of_flips(evaluate, tokens, flips, BOS, VOCABULARY)


@CONTEXTS
def test_no_distribution_depends_on_its_target_or_on_what_follows(same_document, context_logits):
    settings = changed(SETTINGS, same_document=same_document, context_logits=context_logits, l2=1.0)
    assert leaks(settings, toy_text(150, seed=5), flips=6) == []


def test_it_stays_causal_without_a_prior_and_over_ranks():
    settings = changed(SETTINGS, l2=0.0, focal_tokens=16, same_document=False, iterations=12)
    assert leaks(settings, toy_text(110, seed=6), flips=4, world_size=2) == []


def test_scope_batch_leaks_over_its_batch_and_no_further():
    settings = changed(SETTINGS, scope="batch", lanes=1, l2=1.0, same_document=False)
    reaches = leaks(settings, toy_text(150, seed=7), flips=9)
    batch_windows = adapter_settings(settings, "slot").batch_windows
    assert max(reaches) > settings.stride_tokens
    assert max(reaches) < settings.window_tokens + batch_windows * settings.stride_tokens


# --- the leak, measured -------------------------------------------------------------------------


def null_text(model, length):
    """Draws from the model itself, each from the last token alone: nothing can be gained."""
    generator = torch.Generator().manual_seed(1)
    tokens = [BOS]
    while len(tokens) < length:
        probabilities = model(torch.tensor([tokens[-1:]]))[0, -1].softmax(0)
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return torch.tensor(tokens)


def gain(columns) -> float:
    before = target_nats(columns["logits_before"], columns["targets"])
    after = target_nats(columns["logits_after"], columns["targets"])
    return (before - after).mean().item()


def test_only_the_leaking_scope_gains_on_draws_from_the_model_itself():
    model = ToyModel(memory=0.0)
    tokens = null_text(model, 1200)
    honest = gain(collect(tokens, changed(SETTINGS, l2=14.0), model))
    leaking = gain(
        collect(tokens, changed(SETTINGS, scope="batch", l2=1.0, same_document=False), model)
    )
    assert honest < 0.002
    assert leaking > 0.05


@pytest.mark.parametrize("forward_windows", [1, 3, 9, 64])
def test_batches_are_the_same_however_many_windows_share_a_forward_pass(forward_windows):
    settings = changed(SETTINGS, scope="batch", batch_windows=4, lanes=2, focal_tokens=14)
    tokens = toy_text(260, document_tokens=60)
    one_batch_a_pass = collect(tokens, changed(settings, forward_windows=4))
    found = collect(tokens, changed(settings, forward_windows=forward_windows))
    assert found.keys() == one_batch_a_pass.keys()
    for name, expected in one_batch_a_pass.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forward_windows", [2, 9])
def test_in_own_loss_is_exact(forward_windows):
    settings = changed(
        SETTINGS, scope="batch", same_document=True, focal_tokens=14,
        forward_windows=forward_windows,
    )  # fmt: skip
    tokens = toy_text(260, document_tokens=60)
    columns = collect(tokens, settings)
    windows = windows_of(tokens, settings)
    batch_windows = adapter_settings(settings, "slot").batch_windows
    documents = (tokens == BOS).cumsum(0).tolist()
    expected = {}
    for run in lane_runs(len(windows), settings.lanes):
        for first in range(0, len(run), batch_windows):
            batch = run[first : first + batch_windows]
            fitted = set()
            for window in batch:
                begin = windows.first_scored[window]
                end = windows.starts[window] + windows.length
                fitted |= {
                    p
                    for p in range(max(1, end - 14 + 1), begin)
                    if documents[p - 1] == documents[begin - 1]
                }
            for window in batch:
                begin = windows.first_scored[window]
                for p in range(begin, begin + windows.scored[window]):
                    applies = documents[p - 1] == documents[begin - 1]
                    expected[p] = p in fitted and applies
    found = dict(zip(columns["positions"].tolist(), columns["in_own_loss"].tolist(), strict=True))
    assert found == expected
    assert 0 < sum(expected.values()) < len(expected)
    assert not collect(tokens, changed(settings, scope="window"))["in_own_loss"].any()


# --- the evaluator of the audit, and settings ----------------------------------------------------


def test_the_evaluator_gives_the_distributions_of_the_very_scores():
    tokens = toy_text(100)
    scores = audited(ToyModel(), SETTINGS)(tokens)
    log_probs = scores.log_probs
    columns = collect(tokens, SETTINGS)
    assert log_probs.shape == (99, VOCABULARY) and log_probs.dtype == torch.float32
    nll = -log_probs.gather(1, tokens[1:].unsqueeze(1)).squeeze(1).double()
    assert torch.equal(nll, target_nats(columns["logits_after"], columns["targets"]))
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(99))
    order = scores.positions.argsort()
    assert torch.equal(scores.reported_nll[order], nll)
    assert torch.equal(scores.lanes[order], columns["lanes"])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"stride_tokens": 33}, "evaluation.stride_tokens"),
        ({"stride_tokens": 0}, "evaluation.stride_tokens"),
        ({"lanes": 0}, "evaluation.lanes"),
        ({"lanes": 40_000}, "evaluation.lanes"),
        ({"forward_windows": 0}, "evaluation.forward_windows"),
        ({"batch_windows": 0}, "evaluation.adapters.slot.batch_windows"),
        ({"focal_tokens": 6}, "evaluation.adapters.slot.focal_tokens"),
        ({"focal_tokens": 33}, "evaluation.adapters.slot.focal_tokens"),
        ({"focal_tokens": "most"}, "evaluation.adapters.slot.focal_tokens"),
        ({"scope": "lane"}, "evaluation.adapters.slot.scope"),
        ({"context_logits": "old"}, "evaluation.adapters.slot.context_logits"),
        ({"scope": "batch", "context_logits": "scored"}, "evaluation.adapters.slot.context_logits"),
        ({"clamp": 0.0}, "evaluation.adapters.slot.clamp"),
        ({"l2": -1.0}, "evaluation.adapters.slot.l2"),
        ({"iterations": 0}, "evaluation.adapters.slot.iterations"),
        ({"history": 0}, "evaluation.adapters.slot.history"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(change, key):
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        changed(SETTINGS, **change)


def test_a_stream_without_targets_is_refused():
    with pytest.raises(UserError, match="0 targets"):
        list(evaluator(ToyModel(), SETTINGS).score(torch.tensor([BOS])))


def test_padding_rows_never_reach_the_scores():
    """Seven lanes in groups of four: the last group has an empty row, and runs end unevenly."""
    model, settings = ToyModel(), changed(SETTINGS, lanes=7, forward_windows=4)
    list(evaluator(model, settings).score(toy_text(300)))
    assert {shape for shape, _ in model.calls} == {(4, 32)}


@pytest.mark.parametrize(
    ("changes", "first", "later"),
    [
        ({"adapters": ()}, 26, 26),
        ({"context_logits": "scored"}, 0, 26),
        ({"context_logits": "scored", "focal_tokens": 12}, 20, 26),
        ({"context_logits": "current"}, 0, 0),
        ({"context_logits": "current", "focal_tokens": 12}, 20, 20),
        ({"scope": "batch", "focal_tokens": 12}, 20, 20),
    ],
)
def test_logits_are_asked_for_only_where_they_are_needed(changes, first, later):
    """And where that is follows from the geometry, whatever the tokens are and the last windows."""
    settings = changed(SETTINGS, **changes)
    # 260 targets end in a window that scores two, and 39 windows in lanes of unequal lengths.
    for seed in (0, 1):
        model = ToyModel()
        for rank in range(2):
            list(evaluator(model, settings).score(toy_text(261, seed), rank, 2))
        starts = [start for _, start in model.calls]
        expected = {first, later} | {0}  # the text's first window scores all its targets
        assert set(starts) == expected
        assert starts[0] == 0 and starts.count(later) > starts.count(0) * (later > 0)
