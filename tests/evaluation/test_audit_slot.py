"""The audit over the project's own evaluator: lanes and ranks pass, the record's batches fail."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from fairway.evaluation.slot_evaluator import document_source, make_evaluator
from test_score_first import LearnsFirst

from evaluators import SMALL, changed, random_model
from fairway.audit.flip_plan import Geometry
from fairway.audit.interface import FAIL
from fairway.audit.null import draw_stream
from fairway.audit.runner import AuditSettings, Subject, audit_evaluator
from fairway.evaluation import evaluator as scoring
from fairway.evaluation.adapters import ngram
from fairway.evaluation.evaluator import EvaluatorSettings
from fairway.model.gpt import GPT, PROJECTIONS, GPTConfig
from mutants import Toy

TOY = Toy(vocab_size=32, seed=5)
AUDIT = AuditSettings(
    flips=16, stream_tokens=200, null_tokens=400, noise_repeats=1, significance=0.001
)


SETTINGS = changed(
    SMALL,
    window_tokens=48,
    stride_tokens=8,
    lanes=4,
    forward_windows=3,
    batch_windows=6,
    l2=2.0,
    iterations=6,
    history=5,
)


def audit(
    settings: EvaluatorSettings,
    world_size: int = 1,
    num_targets: int = 200,
    *,
    model: GPT | None = None,
    flips: int = 16,
):
    """model: what is evaluated and adapted, instead of the toy."""
    cut = settings.evaluation
    geometry = Geometry(
        cut.window_tokens,
        cut.stride_tokens,
        cut.lanes,
        settings.slot.batch_windows if settings.shares_batches else 1,
    )
    logits = model or TOY.logits
    toy_draw = partial(
        draw_stream,
        replace(TOY, window_tokens=cut.window_tokens).next_token,
        torch.tensor([TOY.bos_id]),
    )
    subject = Subject(
        evaluator=make_evaluator(logits, settings, TOY.bos_id, world_size, model=model),
        tokens=TOY.stream(num_targets),
        vocab_size=TOY.vocab_size,
        bos_id=TOY.bos_id,
        geometry=geometry,
        draw=document_source(model, cut.window_tokens, TOY.bos_id) if model else toy_draw,
        base=make_evaluator(logits, changed(SETTINGS, adapters=()), TOY.bos_id),
    )
    findings = audit_evaluator(subject, replace(AUDIT, flips=flips), seed=1)
    return findings, {check.name for check in findings.checks if check.verdict == FAIL}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapters": ()},
        {"context_logits": "scored"},
        {"same_document": False, "focal_tokens": 20, "lanes": 1},
        {"forward_windows": 1, "lanes": 7},
    ],
)
def test_the_causal_evaluator_passes(changes):
    findings, failed = audit(changed(SETTINGS, **changes))
    assert failed == set()
    assert findings.track == ("fixed" if "adapters" in changes else "adaptive")
    assert (findings.reach["changed"] == 0).all()


def test_two_ranks_pass_and_score_the_same_bits():
    settings = changed(SETTINGS, forward_windows=2)
    _, failed = audit(settings, world_size=2)
    assert failed == set()
    tokens = TOY.stream(200)
    one, two = (make_evaluator(TOY.logits, settings, TOY.bos_id, size)(tokens) for size in (1, 2))
    assert torch.equal(one.log_probs, two.log_probs)


def test_the_batch_shared_delta_fails_and_its_reach_is_the_batch():
    settings = changed(
        SETTINGS,
        scope="batch",
        lanes=1,
        focal_tokens=16,
        l2=0.0,
        same_document=False,
        batch_windows=12,
    )
    findings, failed = audit(settings)
    assert {"flip", "self_influence", "null"} <= failed
    reached = findings.reach[findings.reach["changed"] > 0]["distance_tokens"]
    # The first batch scores one whole window and eleven slices; no later batch reaches as far.
    assert 8 * 8 < reached.max() < 48 + 11 * 8


def test_a_stream_shorter_than_a_window_passes():
    _, failed = audit(SETTINGS, num_targets=30)
    assert failed == set()


@pytest.mark.parametrize(
    ("adapters", "world_size"), [(("lora",), 1), (("lora", "slot"), 2)], ids=str
)
def test_lora_passes_with_and_without_a_delta(adapters, world_size):
    settings = changed(
        SETTINGS, adapters=adapters, forward_windows=2, chunk_tokens=16, context_tokens=32
    )
    findings, failed = audit(settings, world_size, model=random_model(32), flips=6)
    assert failed == set() and findings.track == "adaptive"
    assert (findings.reach["changed"] == 0).all()


@pytest.mark.parametrize("adapters", [("ngram",), ("lora", "slot", "ngram")], ids=str)
def test_ngram_caches_pass(adapters):
    settings = changed(SETTINGS, adapters=adapters, chunk_tokens=16, context_tokens=32)
    findings, failed = audit(settings, model=random_model(32), flips=6)
    assert failed == set() and findings.track == "adaptive"


def test_an_ngram_cache_that_finds_the_target_itself_fails(monkeypatch):
    honest = ngram._occurrences

    def with_itself(groups, tokens):
        found = honest(groups, tokens)
        return found._replace(slot=found.slot + 1, earlier=found.earlier + 1)

    monkeypatch.setattr(ngram, "_occurrences", with_itself)
    _, failed = audit(changed(SETTINGS, adapters=("ngram",)), flips=6)
    assert {"self_influence", "null"} <= failed


def test_lora_that_learns_before_it_scores_fails(monkeypatch):
    monkeypatch.setattr(scoring, "LoraAdapter", LearnsFirst)
    settings = changed(
        SETTINGS,
        adapters=("lora",),
        projections=tuple(PROJECTIONS),
        steps=3,
        chunk_tokens=8,
        context_tokens=32,
    )
    findings, failed = audit(settings, model=random_model(32), flips=6)
    assert {"flip", "self_influence", "null"} <= failed
    reached = findings.reach[findings.reach["changed"] > 0]["distance_tokens"]
    assert reached.max() < settings.evaluation.window_tokens  # scored by the lane's first window


def test_documents_are_drawn_from_the_model_that_scores_them():
    config = GPTConfig(
        vocab_size=40, sequence_tokens=16, layers=2, width=16, heads=2, kv_heads=1, mlp_width=32,
        rotary_dimensions=4, rope_base=10000.0, rope_trained_tokens=16, bigram_buckets=16,
        bigram_width=4, value_width=4, value_layers=(1,), logit_softcap=30.0, query_gain=5.0,
    )  # fmt: skip
    model = GPT(config)
    stream, log_probs = document_source(model, 12, bos_id=1)(40, 3)
    assert stream.shape == (41,) and log_probs.shape == (40,)
    starts = torch.arange(0, 41, 12)
    assert (stream[starts] == 1).all()
    assert np.flatnonzero(np.isnan(log_probs)).tolist() == (starts[1:] - 1).tolist()
    with torch.no_grad():
        logits = model(stream[:36].view(3, 12))[:, :-1]
    expected = torch.log_softmax(logits.double(), 2)
    expected = expected.gather(2, stream[:36].view(3, 12)[:, 1:, None])[..., 0]
    found = np.concatenate([[np.nan], log_probs])[:36].reshape(3, 12)[:, 1:]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    again, _ = document_source(model, 12, bos_id=1)(40, 3)
    assert torch.equal(stream, again)
