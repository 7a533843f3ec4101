"""Ten lines for any script: one inserted line records its scores, with distributions or without."""

import sys

import numpy as np
import pytest
import torch

from fairway.audit import AuditSettings, Recorder, Scores, audit
from fairway.audit.fresh import FreshEvaluator
from fairway.audit.interface import FAIL, NOT_APPLICABLE, NOT_RUN, PASS, UNDECIDED, evaluate
from fairway.errors import UserError
from referee_cases import BOS, FAULTY, HONEST, VOCABULARY, Text, longest_first, scores

SETTINGS = AuditSettings(flips=32, stream_tokens=300, null_tokens=0, probe_tokens=200)


def judged(evaluator, text=None, **changes):
    text = text or Text()
    return audit(
        evaluator,
        text.tokens,
        vocab_size=VOCABULARY,
        bos_id=BOS,
        token_classes=text.classes,
        settings=SETTINGS.changed(**changes),
    )


def verdicts(result) -> dict[str, str]:
    return {check.name: check.verdict for check in result.checks}


def losses_only(evaluator):
    """What a script that returns losses gives."""

    def without(tokens):
        answer = evaluate(evaluator, tokens)
        positions = torch.arange(1, len(tokens))
        order = answer.order if answer.is_reordered else None
        if order is not None:
            positions = order.argsort() + 1
        return Scores(None, positions, answer.nll[positions - 1], order=order)

    return without


@pytest.mark.parametrize(
    "name",
    [
        "sharpened for capitals", "two orders", "temperature of the whole text",
        "second pass over long documents", "hint only where right", "best of two temperatures",
        "sums above one", "overwrites its answer", "learns from each call", "scores a file",
    ],
)  # fmt: skip
def test_faults_show_in_losses_alone(name):
    result = judged(losses_only(FAULTY[name][0](Text())))
    assert result.verdict not in (PASS, NOT_RUN), str(result)


@pytest.mark.parametrize("name", ["plain", "learns in order", "hints longest first"])
def test_honest_losses_pass_for_what_was_seen(name):
    result = judged(losses_only(HONEST[name](Text())), null_tokens=0)
    found = verdicts(result)
    assert found["flip"] == found["normalization"] == found["coverage"] == PASS, str(result)
    assert found["self_influence"] == found["reported_score"] == NOT_APPLICABLE
    assert "losses, no distributions" in result.meaning_of_pass
    assert "Other targets were not probed" in str(result)


def sliding(text, recorder, *, kind=torch.float32, numpy=False, logits=True, twice=False):
    """A script that scores windows of 16 targets."""

    def run(tokens):
        for start in range(0, len(tokens) - 1, 16):
            rows = (text.model[tokens[start:-1][:16]] + 3.0).to(kind)  # logits, not normalized
            targets = tokens[start + 1 :][: len(rows)]
            losses = torch.nn.functional.cross_entropy(rows.float(), targets, reduction="none")
            positions = torch.arange(start + 1, start + 1 + len(rows))
            given = (positions, losses.to(kind), rows)
            if numpy:
                given = tuple(value.numpy() for value in given)
            recorder.record(*given[:2], logits=given[2] if logits else None)
            if twice and start == 0:
                recorder.record(*given[:2], logits=given[2] if logits else None)

    return run


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.float64])
def test_one_line_audits_a_script(kind, numpy):
    text, recorder = Text(), Recorder()
    result = judged(recorder.evaluator(sliding(text, recorder, kind=kind, numpy=numpy)))
    found = verdicts(result)
    assert found["flip"] == found["self_influence"] == found["normalization"] == PASS, str(result)
    assert found["coverage"] == PASS
    # float16 losses of 600 targets may be off by what the limit forbids, without any fault.
    assert found["reported_score"] in ((PASS, UNDECIDED) if kind == torch.float16 else (PASS,))


def test_bfloat16_and_shapes_of_batches_are_taken():
    recorder = Recorder()

    def run(tokens):
        rows = torch.zeros(1, len(tokens) - 1, VOCABULARY, dtype=torch.bfloat16)
        losses = torch.full((1, len(tokens) - 1), float(np.log(VOCABULARY)), dtype=torch.bfloat16)
        recorder.record(torch.arange(1, len(tokens))[None], losses, logits=rows)

    answer = evaluate(recorder.evaluator(run), Text().tokens)
    assert answer.rows.shape == (600, VOCABULARY)
    assert torch.allclose(answer.nll, torch.tensor(np.log(VOCABULARY)))


def test_a_target_recorded_twice_is_a_fault_of_coverage_alone():
    recorder = Recorder()
    found = verdicts(judged(recorder.evaluator(sliding(Text(), recorder, twice=True))))
    assert {name for name, verdict in found.items() if verdict == FAIL} == {"coverage"}


def test_the_whole_text_is_streamed_and_a_fault_far_behind_the_excerpt_is_seen():
    """Coverage, sums and arithmetic of all 5,000 targets, of which 300 are in the excerpt."""
    text = Text(targets=5000)

    def evaluator(fault):
        recorder = Recorder()

        def run(tokens):
            for start in range(0, len(tokens) - 1, 100):
                rows = text.model[tokens[start:-1][:100]].clone()
                positions = torch.arange(start + 1, start + 1 + len(rows))
                losses = -rows.gather(1, tokens[positions][:, None]).squeeze(1)
                if start == 4000 and fault == "sum":
                    rows, losses = rows + 0.05, losses - 0.05
                if start == 4000 and fault == "claim":
                    losses = losses - 0.5
                if not (start == 4000 and fault == "gap"):
                    recorder.record(positions, losses, log_probs=rows)

        return recorder.evaluator(run)

    failed = {"sum": "normalization", "claim": "reported_score", "gap": "coverage"}
    for fault, check in failed.items():
        found = verdicts(judged(evaluator(fault), text))
        assert {name for name, verdict in found.items() if verdict == FAIL} == {check}
        assert verdicts(judged(evaluator(fault), text, whole_text=False))[check] == PASS
    assert FAIL not in verdicts(judged(evaluator(None), text)).values()


def test_recorded_order_is_the_order_declared():
    text = Text(targets=240)

    def run_in(order):
        recorder = Recorder(order=order)

        def run(tokens):
            found = scores(tokens, HONEST["longest first, declared"](text)(tokens).log_probs)
            for row in longest_first(tokens):
                recorder.record(
                    torch.tensor([row + 1]),
                    found.reported_nll[row : row + 1],
                    log_probs=found.log_probs[row : row + 1],
                )

        return recorder.evaluator(run)

    assert verdicts(judged(run_in("recorded"), text, flips=8))["flip"] == PASS
    found = verdicts(judged(run_in("text"), text, flips=8))
    assert found["flip"] == FAIL and found["coverage"] == FAIL


def test_generators_start_anew_where_asked():
    recorder = Recorder(seed=5)

    def run(tokens):
        noise = torch.rand(1) + np.random.rand()
        losses = torch.ones(len(tokens) - 1) * noise
        recorder.record(torch.arange(1, len(tokens)), losses)

    evaluator = recorder.evaluator(run)
    first, second = (evaluate(evaluator, Text().tokens).nll for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda recorder, tokens: None, "recorded no score"),
        (lambda recorder, tokens: recorder.record([1, 2], [0.5]), "2 positions and 1 losses"),
        (
            lambda recorder, tokens: recorder.record([1], [0.5], logits=torch.zeros(2, 64)),
            "2 distributions for 1 positions",
        ),
        (
            lambda recorder, tokens: recorder.record([1], [0.5], logits=torch.zeros(1, 1)),
            "whole vocabulary",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(run, message):
    recorder = Recorder()
    with pytest.raises(UserError, match=message):
        judged(recorder.evaluator(lambda tokens: run(recorder, tokens)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n: "text", "returned a str"),
        (lambda n: torch.zeros(n), "returned shape"),
        (lambda n: torch.zeros(n, 64, dtype=torch.int64), "int64"),
        (lambda n: Scores(None, torch.arange(n) + 1, torch.zeros(n - 1)), "reported_nll"),
        (lambda n: Scores(None, torch.zeros(n), torch.zeros(n)), "whole numbers"),
        (
            lambda n: Scores(None, torch.arange(n) + 1, torch.zeros(n), order=torch.zeros(n)),
            "no ranking",
        ),
    ],
)
def test_an_answer_of_another_form_is_said_in_one_line(answer, message):
    with pytest.raises(UserError, match=message):
        judged(lambda tokens: answer(len(tokens) - 1))


def test_a_marker_beyond_the_vocabulary_is_said_in_one_line():
    with pytest.raises(UserError, match="bos_id is 64"):
        audit(HONEST["plain"](Text()), Text().tokens, vocab_size=VOCABULARY, bos_id=64)


STATEFUL = """
import torch
from fairway.audit import Scores

first = []

def evaluate(tokens):
    rows = torch.zeros(len(tokens) - 1, 8)
    rows[torch.arange(len(rows)), tokens[1:]] += 1.0  # it knows its target
    first.append(torch.log_softmax(rows, -1))
    return first[0][: len(rows)]  # and replays its first answer

def scores(tokens):
    rows = torch.log_softmax(torch.zeros(len(tokens) - 1, 8), -1)
    positions = torch.arange(1, len(tokens))
    return Scores(rows, positions, -rows[positions - 1, tokens[positions]])

def stops(tokens):
    raise SystemExit(0)
"""


@pytest.mark.slow  # half a dozen processes that import torch
@pytest.mark.nightly
def test_a_new_process_for_each_call_shows_what_a_memory_hides(tmp_path, monkeypatch):
    (tmp_path / "stateful.py").write_text(STATEFUL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    tokens = torch.randint(8, (60,), generator=torch.Generator().manual_seed(0))
    quick = AuditSettings(flips=2, null_tokens=0)
    fresh = FreshEvaluator("stateful:evaluate", tmp_path)
    found = verdicts(audit(fresh, tokens, vocab_size=8, settings=quick))
    assert found["self_influence"] == FAIL and found["state"] == PASS
    again = FreshEvaluator("stateful:scores", tmp_path)(tokens)
    assert isinstance(again, Scores) and len(again.positions) == 59 and again.lanes is None
    with pytest.raises(UserError, match=r"stateful:stops could not be audited: it ended .*exit\(0"):
        FreshEvaluator("stateful:stops", tmp_path)(tokens)
