"""The referee is right about faulty and honest evaluators of every kind that it was tried on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.audit import AuditSettings, audit
from fairway.audit.interface import FAIL, PASS, UNDECIDED
from fairway.audit.result import AuditResult
from referee_cases import BOS, FAULTY, HONEST, ROUNDED, VOCABULARY, Text, starts_after

SETTINGS = AuditSettings(flips=32, stream_tokens=600, null_tokens=8192)


def referee(text: Text, make, **changes) -> AuditResult:
    torch.manual_seed(0)
    return audit(
        make(text),
        text.tokens,
        vocab_size=VOCABULARY,
        bos_id=BOS,
        next_token=text.next_token,
        base=lambda tokens: text.model[tokens[:-1]],
        token_classes=text.classes,
        settings=SETTINGS.changed(**changes),
    )


def verdicts(result: AuditResult) -> dict[str, str]:
    return {check.name: check.verdict for check in result.checks}


@pytest.mark.parametrize("name", FAULTY)
def test_no_faulty_evaluator_passes(name):
    make, check = FAULTY[name]
    result = referee(Text(), make, **({} if check == "null" else {"null_tokens": 0}))
    assert verdicts(result)[check] in (FAIL, UNDECIDED), str(result)
    assert result.verdict in (FAIL, UNDECIDED)


@pytest.mark.parametrize("name", HONEST)
def test_honest_evaluators_pass(name):
    result = referee(Text(), HONEST[name], null_tokens=500)
    assert result.verdict == PASS, str(result)


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_is_no_accusation_and_no_pass_beyond_the_limit(name):
    result = referee(Text(), ROUNDED[name], null_tokens=500)
    assert FAIL not in verdicts(result).values(), str(result)
    assert result.verdict in (PASS, UNDECIDED)


def test_the_default_excerpt_holds_what_starts_after_5000_tokens():
    text = Text(targets=9000)
    result = audit(
        starts_after(5000)(text),
        text.tokens,
        vocab_size=VOCABULARY,
        settings=AuditSettings(null_tokens=0),
    )
    assert verdicts(result)["self_influence"] == FAIL


def test_one_defect_fails_one_check():
    found = verdicts(referee(Text(), FAULTY["tail scored four times"][0], null_tokens=500))
    assert {name for name, verdict in found.items() if verdict == FAIL} == {"coverage"}
    alone = {"learns from each call": "state", "fills a table across calls": "state"}
    for name, check in alone.items():
        found = verdicts(referee(Text(), FAULTY[name][0], null_tokens=0))
        assert {one for one, verdict in found.items() if verdict == FAIL} == {check}


@pytest.mark.parametrize("count", [25, pytest.param(100, marks=pytest.mark.many)])
def test_no_false_alarm_over_honest_configurations(count):
    """Beside those of test_audit_mutants.py."""
    settings(max_examples=count, derandomize=True)(given(configurations)(no_false_alarm))()


configurations = st.tuples(
    st.sampled_from(sorted(HONEST)), st.integers(0, 10_000), st.integers(2, 250)
)


def no_false_alarm(drawn: tuple[str, int, int]) -> None:
    name, seed, targets = drawn
    result = referee(Text(seed, targets), HONEST[name], flips=8, null_tokens=60)
    assert FAIL not in verdicts(result).values(), str(result)
