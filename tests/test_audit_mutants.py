"""The audit audits itself: every planted fault is caught, and no honest evaluator is accused."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutants import HONEST, MUTANTS, Toy

from fairway.audit.contract import FAIL, PASS
from fairway.audit.null import draw_stream
from fairway.audit.verdict import AuditSettings, Findings, Subject, audit_evaluator, overall_verdict

SETTINGS = AuditSettings(
    flips=40, stream_tokens=150, null_tokens=400, noise_repeats=1, significance=0.001
)


def audit(toy: Toy, evaluator, num_targets: int = 150, audit_settings=SETTINGS) -> Findings:
    torch.manual_seed(0)  # for the mutant that is random on purpose
    subject = Subject(
        evaluator=evaluator,
        tokens=toy.stream(num_targets),
        vocab_size=toy.vocab_size,
        bos_id=toy.bos_id,
        geometry=toy.geometry,
        draw=partial(draw_stream, toy.next_token, torch.tensor([toy.bos_id])),
        base=HONEST["plain"](toy),
    )
    return audit_evaluator(subject, audit_settings, seed=3)


def failures(findings: Findings) -> set[str]:
    return {check.name for check in findings.checks if check.verdict == FAIL}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_right_checks_catch_the_planted_fault(name):
    mutant = MUTANTS[name]
    findings = audit(Toy(), mutant.make(Toy()))
    assert failures(findings) >= set(mutant.caught_by)
    assert overall_verdict(findings.checks) == FAIL


@pytest.mark.parametrize("name", HONEST)
def test_honest_evaluators_pass_every_check(name):
    findings = audit(Toy(), HONEST[name](Toy()))
    assert failures(findings) == set()
    assert findings.track == ("fixed" if name == "plain" else "adaptive")


def test_arithmetic_faults_are_not_mistaken_for_leaks():
    """A fault without a leak fails its own check only, so that a reader is not misled."""
    alone = {
        "softmax over a truncated vocabulary": {"normalisation", "null"},
        "hardest token never scored": {"coverage"},
        "claimed scores understated": {"claimed_score"},
    }
    for name, expected in alone.items():
        assert failures(audit(Toy(), MUTANTS[name].make(Toy()))) <= expected


@st.composite
def toys(draw) -> tuple[Toy, str, int]:
    stride = draw(st.integers(1, 12))
    window = stride * draw(st.integers(1, 4)) + draw(st.integers(0, 5))
    toy = Toy(
        seed=draw(st.integers(0, 10_000)),
        vocab_size=draw(st.integers(8, 32)),
        window_tokens=window,
        stride_tokens=stride,
        lanes=draw(st.integers(1, 5)),
        batch_windows=draw(st.integers(1, 4)),
        focal_tokens=draw(st.integers(1, 40)),
        l2=draw(st.sampled_from([0.5, 2.0, 14.0])),
        same_document=draw(st.booleans()),
    )
    return toy, draw(st.sampled_from(sorted(HONEST))), draw(st.integers(2, 90))


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(toys())
def test_no_false_alarm_over_200_honest_configurations(drawn):
    toy, name, num_targets = drawn
    quick = AuditSettings(
        flips=8, stream_tokens=90, null_tokens=60, noise_repeats=1, significance=0.001
    )
    findings = audit(toy, HONEST[name](toy), num_targets, quick)
    assert {check.verdict for check in findings.checks} <= {PASS, "NOT RUN"}
