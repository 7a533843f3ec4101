"""The audit audits itself: every planted fault is caught, and no honest evaluator is accused."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.audit.interface import FAIL, NOT_APPLICABLE, PASS
from fairway.audit.lineage import check_lineage
from fairway.audit.null import draw_stream
from fairway.audit.result import AuditResult
from fairway.audit.runner import AuditSettings, AuditTarget, audit_evaluator
from mutants import HONEST, MUTANTS, Toy
from provenance_chain import edit, make_chain

SETTINGS = AuditSettings(
    flips=24, stream_tokens=150, null_tokens=400, noise_repeats=1, significance=0.001
)


def audit(toy: Toy, evaluator, num_targets: int = 150, audit_settings=SETTINGS) -> AuditResult:
    torch.manual_seed(0)  # for the mutant that is random on purpose
    target = AuditTarget(
        evaluator=evaluator,
        tokens=toy.stream(num_targets),
        vocab_size=toy.vocab_size,
        bos_id=toy.bos_id,
        geometry=toy.geometry,
        sampler=partial(draw_stream, toy.next_token, torch.tensor([toy.bos_id])),
        base=HONEST["plain"](toy),
    )
    return audit_evaluator(target, audit_settings, seed=3)


def failures(result: AuditResult) -> set[str]:
    return set(result.names(FAIL))


@pytest.mark.parametrize("name", MUTANTS)
def test_the_right_checks_catch_the_planted_fault(name):
    mutant = MUTANTS[name]
    settings = SETTINGS if "null" in mutant.caught_by else SETTINGS.changed(null_tokens=0)
    result = audit(Toy(), mutant.make(Toy()), audit_settings=settings)
    assert failures(result) >= set(mutant.caught_by)
    assert result.verdict == FAIL


def test_a_provenance_file_edited_by_hand_is_caught(tmp_path):
    provenance = make_chain(tmp_path, ttt_data="val")
    for stage in ("ttt", "gptq", "slot_eval"):
        edit(tmp_path / stage / "provenance.json", splits=["train"], splits_read=[])
    check = check_lineage(provenance)
    assert check.verdict == FAIL and check.evidence["splits"] == ["train"]
    assert "is not the file listed" in " ".join(check.evidence["faults"])


@pytest.mark.parametrize(
    "name", [name for name, mutant in MUTANTS.items() if "null" in mutant.caught_by]
)
def test_a_leak_too_faint_to_gain_anything_is_still_felt_by_the_flips(name):
    """The toys leak much, so that the null test sees it too; the flips do not need that."""
    faint = Toy(strength=1e-3, l2=2000.0)
    settings = SETTINGS.changed(flips=8, null_tokens=0)
    assert failures(audit(faint, MUTANTS[name].make(faint), audit_settings=settings)) >= {"flip"}


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(one, marks=pytest.mark.many) for one in (1, 2, 3))]
)
@pytest.mark.parametrize(
    "name", [name for name, mutant in MUTANTS.items() if "flip" in mutant.caught_by]
)
def test_eight_flips_catch_what_more_do(name, seed):
    """Fewer than the quickstart has, on a text as long as several windows for each lane."""
    toy = Toy(seed=seed)
    settings = SETTINGS.changed(flips=8, null_tokens=0)
    result = audit(toy, MUTANTS[name].make(toy), num_targets=300, audit_settings=settings)
    assert failures(result) & {"flip", "self_influence"}


@pytest.mark.parametrize("name", HONEST)
def test_honest_evaluators_pass_every_check(name):
    result = audit(Toy(), HONEST[name](Toy()))
    assert failures(result) == set()
    assert result.track == ("fixed" if name == "plain" else "adaptive")


def test_arithmetic_faults_are_not_mistaken_for_leaks():
    """A fault without a leak fails its own check only, so that a reader is not misled."""
    alone = {
        "normalization over a truncated vocabulary": {"normalization", "null"},
        "a token never scored": {"coverage"},
        "reported scores understated": {"reported_score"},
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


@pytest.mark.parametrize("count", [25, pytest.param(200, marks=pytest.mark.many)])
def test_no_false_alarm_over_honest_configurations(count):
    settings(max_examples=count, derandomize=True)(given(toys())(no_false_alarm))()


def no_false_alarm(drawn: tuple[Toy, str, int]) -> None:
    toy, name, num_targets = drawn
    quick = AuditSettings(
        flips=8, stream_tokens=90, null_tokens=60, noise_repeats=1, significance=0.001
    )
    result = audit(toy, HONEST[name](toy), num_targets, quick)
    assert {check.verdict for check in result.checks} <= {PASS, NOT_APPLICABLE}
