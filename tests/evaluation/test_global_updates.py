"""The model trained on scored text between segments: after the score, the same for all, undone."""

import copy

import pytest
import torch
import torch.nn.functional as F

from evaluators import BOS, SMALL, VOCABULARY, audited, changed, collect, random_model, toy_text
from fairway.audit.interface import FAIL
from fairway.audit.runner import AuditSettings, AuditTarget, audit_evaluator
from fairway.errors import UserError
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.global_updates import GlobalUpdateSettings, scored_tokens, train_on
from fairway.evaluation.settings import EvaluationSettings
from fairway.evaluation.windows import segments, sliding_windows
from fairway.settings import validated

UPDATES = {"after": [0.3, 0.6], "learning_rate": 0.05, "chunk_tokens": 64}


def updating(adapters=(), updates=UPDATES, **changes) -> EvaluationSettings:
    settings = changed(SMALL, adapters=adapters, lanes=3, **changes)
    return settings.changed(global_updates=updates)


@pytest.fixture(scope="module")
def model():
    """With learned caps, which the updates train as they do every parameter."""
    return random_model(VOCABULARY, asymmetric_softcap=True)


def test_a_segment_is_scored_by_weights_of_earlier_text_and_the_model_is_left_as_it_was(model):
    """Against passes of SGD written out."""
    tokens, settings = toy_text(200), updating()
    before = copy.deepcopy(model.state_dict())
    found = collect(tokens, settings, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    windows = sliding_windows(199, settings.window_tokens, settings.stride_tokens)
    parts = segments(len(windows), settings.global_updates.after)
    edges = [0, *(int(windows.first_scored[part[0]]) - 1 for part in parts[1:]), 199]
    assert len(parts) == 3 and edges[1] > 64
    twin = copy.deepcopy(model)
    for first, last in zip(edges, edges[1:], strict=False):
        plain = collect(tokens, updating(updates={}), twin)
        scores, expected = found["logits_after"][first:last], plain["logits_after"][first:last]
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
        written_out(twin, tokens[first : last + 1])
        moved = collect(tokens, updating(updates={}), twin)
        assert (moved["logits_after"][first:last] - expected).abs().max() > 0.1


def written_out(model, tokens, rate=0.05, length=32, rows=2):
    """A pass of SGD with momentum 0.9, a cosine to zero, and the whole gradient clipped to 1."""
    count = (len(tokens) - 1) // length
    steps, velocity = -(-count // rows), None
    for step in range(steps):
        rows_here = [
            tokens[row * length : row * length + length + 1]
            for row in range(step * rows, min(step * rows + rows, count))
        ]
        batch = torch.stack(rows_here)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        norm = float(torch.cat([part.flatten() for part in gradient]).double().norm())
        gradient = [part * min(1.0, 1 / norm) for part in gradient]
        if velocity is None:
            velocity = [torch.zeros_like(part) for part in gradient]
        velocity = [0.9 * old + new for old, new in zip(velocity, gradient, strict=True)]
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)))
        with torch.no_grad():
            for parameter, part in zip(model.parameters(), velocity, strict=True):
                parameter -= rate * cosine * part


@pytest.mark.parametrize("adapters", [(), ("lora", "slot", "ngram")])
def test_scores_are_bitwise_the_same_for_any_number_of_ranks_and_in_a_second_call(model, adapters):
    tokens, settings = toy_text(120), updating(adapters, forward_windows=2, iterations=2)
    alone = collect(tokens, settings, model)
    assert alone["positions"].tolist() == list(range(1, 120))
    again = collect(tokens, settings, model)
    shares = [collect(tokens, settings, model, rank, 2) for rank in range(2)]
    merged = {name: torch.cat([share[name] for share in shares]) for name in alone}
    order = merged["positions"].argsort(stable=True)
    for name, column in alone.items():
        assert torch.equal(again[name], column)
        assert torch.equal(merged[name][order], column)
    counts = [
        Evaluator(model, settings, bos_id=BOS).window_counts(119, rank, 2) for rank in range(2)
    ]
    assert [own for own, _ in counts] == [len(share["windows"].unique()) for share in shares]


def test_what_a_text_repeats_is_learned_from_its_beginning(model):
    tokens = toy_text(60, seed=3).repeat(6)
    plain = collect(tokens, updating(updates={}), model)
    updates = {"after": [0.5], "chunk_tokens": 64, "learning_rate": 0.05}
    learned = collect(tokens, updating(updates=updates), model)
    before, after = (
        F.cross_entropy(part["logits_before"], part["targets"], reduction="none")
        for part in (plain, learned)
    )
    assert torch.equal(before[:160], after[:160])
    assert (before - after)[200:].mean() > 0.1


@pytest.mark.parametrize("length", [2, 3, 33, 45])
def test_a_short_text_has_fewer_segments(model, length):
    found = collect(toy_text(length), updating(), model)
    assert found["positions"].tolist() == list(range(1, length))


@pytest.mark.parametrize("after", [[0.5, 0.2], [0.2, 0.2]])
def test_shares_that_do_not_ascend_are_refused(after):
    with pytest.raises(UserError, match=r"evaluation\.global_updates\.after is .* ascending"):
        validated(GlobalUpdateSettings, {"after": after}, "evaluation.global_updates")


class UpdatesFirst(Evaluator):
    """The fault: a segment is trained on before it is scored."""

    def _score_segment(self, text, windows, *others):
        self._update(scored_tokens(text, windows), 1)
        yield from super()._score_segment(text, windows, *others)


def audit(model, evaluator):
    target = AuditTarget(
        evaluator=evaluator, tokens=toy_text(101, document_tokens=25), vocab_size=VOCABULARY,
        bos_id=BOS, base=audited(model, updating(updates={})),
    )  # fmt: skip
    result = audit_evaluator(target, AuditSettings(flips=4, stream_tokens=100), seed=1)
    return result, {check.name for check in result.checks if check.verdict == FAIL}


@pytest.mark.parametrize("adapters", [(), ("lora", "ngram")])
def test_the_audit_passes_it(model, adapters):
    result, failed = audit(model, audited(model, updating(adapters)))
    assert failed == set() and result.track == "adaptive"


def test_the_audit_fails_a_twin_that_trains_on_a_segment_before_scoring_it():
    model = random_model(VOCABULARY)
    before = copy.deepcopy(model.state_dict())

    def evaluate(tokens):
        model.load_state_dict(before)
        return UpdatesFirst(model, updating(), bos_id=BOS).distributions(tokens).log_probs

    _, failed = audit(model, evaluate)
    assert {"flip", "self_influence"} <= failed


def test_gradients_stay_switched_off_where_they_were():
    model = random_model(VOCABULARY)
    model.token_embedding.requires_grad_(False)
    train_on(model, toy_text(80), 32, GlobalUpdateSettings(), model.loss)
    assert [name for name, one in model.named_parameters() if not one.requires_grad] == [
        "token_embedding"
    ]
