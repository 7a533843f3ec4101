"""The audit over the project's own evaluator: lanes and ranks pass, shared batches fail."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from evaluators import SMALL, audited, changed, random_model
from fairway.audit.flip_plan import Geometry
from fairway.audit.interface import FAIL
from fairway.audit.null import draw_stream
from fairway.audit.runner import AuditSettings, AuditTarget, audit_evaluator
from fairway.evaluation.settings import EvaluationSettings
from fairway.model.gpt import GPT
from fairway.model.sampling import sample_documents
from fairway.model.spec import PROJECTIONS
from mutants import Toy

TOY = Toy(vocab_size=32, seed=5)
AUDIT = AuditSettings(flips=8, stream_tokens=200, null_tokens=400)


class ToyModel:
    """TOY as an evaluator takes it."""

    kernels = "plain"

    def __call__(self, tokens: torch.Tensor, first_position: int = 0) -> torch.Tensor:
        return TOY.logits(tokens, first_position)


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
    settings: EvaluationSettings,
    world_size: int = 1,
    num_targets: int = 200,
    *,
    model: GPT | None = None,
    flips: int = 8,
):
    """model: what is evaluated and adapted, instead of the toy."""
    geometry = Geometry(
        settings.window_tokens,
        settings.stride_tokens,
        settings.lanes,
        settings.windows_scored_together or 1,
    )
    subject = model or ToyModel()
    toy_draw = partial(
        draw_stream,
        replace(TOY, window_tokens=settings.window_tokens).next_token,
        torch.tensor([TOY.bos_id]),
    )
    target = AuditTarget(
        evaluator=audited(subject, settings, world_size),
        tokens=TOY.stream(num_targets),
        vocab_size=TOY.vocab_size,
        bos_id=TOY.bos_id,
        geometry=geometry,
        sampler=documents_of(model, settings.window_tokens) if model else toy_draw,
        base=audited(subject, changed(SETTINGS, adapters=())),
    )
    findings = audit_evaluator(target, AUDIT.changed(flips=flips), seed=1)
    return findings, {check.name for check in findings.checks if check.verdict == FAIL}


def documents_of(model: GPT, window_tokens: int):
    return lambda num_targets, seed: sample_documents(
        model, num_targets, window_tokens, TOY.bos_id, seed
    )


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
    one, two = (audited(ToyModel(), settings, size)(tokens) for size in (1, 2))
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


def test_an_ngram_cache_that_finds_the_target_itself_fails():
    _, failed = audit(changed(SETTINGS, adapters=("faulty_adapters:FindsItself",)), flips=6)
    assert {"self_influence", "null"} <= failed


def test_lora_that_learns_before_it_scores_fails():
    settings = changed(
        SETTINGS,
        adapters=("faulty_adapters:LearnsFirst",),
        projections=tuple(PROJECTIONS),
        steps=2,
        chunk_tokens=8,
        context_tokens=32,
    )
    findings, failed = audit(settings, num_targets=100, model=random_model(32), flips=6)
    assert {"flip", "self_influence", "null"} <= failed
    reached = findings.reach[findings.reach["changed"] > 0]["distance_tokens"]
    assert reached.max() < settings.window_tokens  # scored by the lane's first window


def test_documents_are_drawn_from_the_model_that_scores_them():
    model = random_model(40)
    text, log_probs = sample_documents(model, 40, 12, TOY.bos_id, 3)
    assert text.shape == (41,) and log_probs.shape == (40,)
    starts = torch.arange(0, 41, 12)
    assert (text[starts] == TOY.bos_id).all()
    assert np.flatnonzero(np.isnan(log_probs)).tolist() == (starts[1:] - 1).tolist()
    with torch.no_grad():
        logits = model(text[:36].view(3, 12))[:, :-1]
    expected = torch.log_softmax(logits.double(), 2)
    expected = expected.gather(2, text[:36].view(3, 12)[:, 1:, None])[..., 0]
    found = np.concatenate([[np.nan], log_probs])[:36].reshape(3, 12)[:, 1:]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    again, _ = sample_documents(model, 40, 12, TOY.bos_id, 3)
    assert torch.equal(text, again)
