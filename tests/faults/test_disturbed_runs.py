"""Scripts that are killed and files that are damaged: the right result, or one line and no loss.

A few tries of every kind; `make test-all` makes more of them, and campaign.py most.
"""

from collections.abc import Iterator

import pytest

from faults import Ended, Run, Try, contents, damage_tries, judge, kill_tries

FEW, MANY = "few", "many"
KILLS = {FEW: 8, MANY: 24}
DAMAGED = {FEW: 11, MANY: 44}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(FEW, marks=[pytest.mark.slow, pytest.mark.nightly]),
        pytest.param(MANY, marks=pytest.mark.many),
    ],
)
def tries(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(tries, tmp_path_factory) -> Run:
    """A finished run: of one seed where few tries are made, else of two."""
    return Run(tmp_path_factory.mktemp("disturbed"), (7,) if tries == FEW else (7, 8))


def faults(tries: Iterator[Try]) -> list[str]:
    return [f"{one.what}: {one.outcome}" for one in tries if one.is_fault]


def test_killed_scripts_end_in_the_bytes_of_those_that_were_not(run, tries):
    assert faults(kill_tries(run, seed=1, count=KILLS[tries])) == []


def test_damaged_files_are_refused_or_change_nothing(run, tries):
    assert faults(damage_tries(run, seed=1, count=DAMAGED[tries])) == []


@pytest.mark.parametrize(
    ("ended", "changes", "outcome"),
    [
        ((0, ""), False, "right result"),
        ((0, ""), True, "silent: ['results/tiny/seed-7/shared/ema/weights.safetensors']"),
        ((1, "50%\nerror: it is cut"), False, "refused"),
        (
            (1, "error: it is cut"),
            True,
            "lost: ['results/tiny/seed-7/shared/ema/weights.safetensors']",
        ),
        ((1, "error: it is cut\nat its end"), False, "unclear: status 1, "),
        ((2, "error: it is cut"), False, "unclear: status 2, "),
        (
            (1, "Traceback (most recent call last):\nKeyError: 'a'"),
            False,
            "traceback: KeyError: 'a'",
        ),
        ((None, ""), False, "hangs"),
    ],
)
def test_what_may_not_be_is_seen(run, ended, changes, outcome):
    run.restore()
    call = next(call for call in run.calls if call.stage.name == "ema")
    before = contents(run.work)
    if changes:
        (call.output / "weights.safetensors").write_bytes(b"other")
    status, output = ended
    assert judge(run, call, before, Ended(status, output, 0.0, 0)).startswith(outcome)
