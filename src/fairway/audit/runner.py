"""Run every check that needs the evaluator, and put all verdicts into one record."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fairway.audit.bookkeeping import (
    Evaluation,
    check_claimed_score,
    check_coverage,
    wrong_row_count,
)
from fairway.audit.checks import check_attribution, check_normalisation
from fairway.audit.flip import (
    check_flips,
    check_self_influence,
    detectable_leak_rate,
    largest_changes,
    measure_noise,
    reach_table,
    run_flips,
)
from fairway.audit.flip_plan import Flip, Geometry, plan_flips
from fairway.audit.interface import (
    FAIL,
    NOT_RUN,
    PASS,
    Check,
    Evaluator,
    evaluate,
    log_probs_of,
)
from fairway.audit.null import Draw, check_null, null_gains
from fairway.errors import UserError

SAME_DISTRIBUTION_NATS = 1e-3
"""An evaluator this close to the plain model at every target does not adapt."""


@dataclass(frozen=True)
class AuditSettings:
    """How thorough the audit is (config section `audit`).

    flips: tokens replaced, each at the cost of one evaluation of the excerpt; ≥ 2.
    stream_tokens: targets of the excerpt of validation text that is audited; ≥ 2.
    null_tokens: targets drawn from the model for the null test; 0 leaves it out.
    noise_repeats: more runs of the unchanged excerpt: does the backend repeat itself? ≥ 1.
    significance: chance that the null test fails an honest evaluator, at most; in (0, 1).
    """

    flips: int
    stream_tokens: int
    null_tokens: int
    noise_repeats: int
    significance: float

    def __post_init__(self) -> None:
        for key, least in (
            ("flips", 2),
            ("stream_tokens", 2),
            ("null_tokens", 0),
            ("noise_repeats", 1),
        ):
            if getattr(self, key) < least:
                raise UserError(f"audit.{key} is {getattr(self, key)}: expected at least {least}")
        if not 0 < self.significance < 1:
            raise UserError(
                f"audit.significance is {self.significance}: expected a number between 0 and 1"
            )


@dataclass(frozen=True)
class Subject:
    """The evaluator under audit with what its owner tells about it.

    tokens: int64 [n + 1], the excerpt of real text.
    geometry: aims the flips.
    draw: draws text from the plain model, for the null test.
    base: the same evaluator without adaptation, which decides the track.
    evaluation: the account of the whole evaluation that the reported score comes from.
    """

    evaluator: Evaluator
    tokens: Tensor
    vocab_size: int
    bos_id: int
    geometry: Geometry | None = None
    draw: Draw | None = None
    base: Evaluator | None = None
    evaluation: Evaluation | None = None


@dataclass(frozen=True)
class Findings:
    """What running the evaluator showed.

    checks; reach: the table of `reach_table`; track: `fixed`, `adaptive` or `unknown`.
    detectable_leak_rate_99: share of leaking tokens that the flips would have shown with 99 %
    probability, None without flips. meaning_of_pass: what a PASS says and what it does not.
    seconds: how long each part took.
    """

    checks: list[Check]
    reach: pd.DataFrame
    track: str
    detectable_leak_rate_99: float | None
    meaning_of_pass: str
    seconds: dict[str, float]


def audit_evaluator(subject: Subject, settings: AuditSettings, seed: int) -> Findings:
    """Run every check but lineage and budgets.

    The evaluator runs 1 + noise_repeats + flips times on the excerpt and once on a null stream.
    Raises UserError where its answer has not the form of `fairway.audit.interface`.
    """
    tokens, num_targets = subject.tokens, len(subject.tokens) - 1
    answer = evaluate(subject.evaluator, tokens)
    reference = log_probs_of(answer)
    if len(reference) != num_targets:
        return _malformed(wrong_row_count(reference, num_targets))
    if reference.shape[1] != subject.vocab_size:
        return _malformed(check_normalisation(reference, subject.vocab_size))
    seconds: dict[str, float] = {}
    with _timed(seconds, "noise"):
        noise = measure_noise(subject.evaluator, tokens, reference, settings.noise_repeats)
    with _timed(seconds, "flip"):
        flips = _plan(subject, reference, settings.flips, seed)
        results = run_flips(subject.evaluator, tokens, reference, flips)
    with _timed(seconds, "null"):
        gains = _null_gains(subject, settings.null_tokens, seed)
    with _timed(seconds, "track"):
        track = _track(subject, reference)
    null = check_null(gains, settings.significance, _reported_gain(subject))
    checks = [
        check_flips(results, noise),
        check_self_influence(results, noise),
        null,
        check_attribution(subject.evaluation),
        check_normalisation(reference, subject.vocab_size),
        check_claimed_score(answer, tokens, subject.evaluation),
        check_coverage(answer, num_targets, subject.evaluation),
    ]
    rate = detectable_leak_rate(sum(flip.place == "random" for flip in flips))
    meaning = meaning_of_pass(flips, num_targets, rate, null)
    return Findings(checks, reach_table(results, noise), track, rate, meaning, seconds)


def meaning_of_pass(
    flips: Sequence[Flip], num_targets: int, leak_rate: float | None, null: Check
) -> str:
    """What a reviewer may conclude from a PASS, in plain words."""
    random_flips = sum(flip.place == "random" for flip in flips)
    text = (
        f"{len(flips)} replacements in an excerpt of {num_targets:,} targets, {random_flips} of "
        "them at random and the others at the seams of the geometry: "
    )
    if leak_rate is not None:
        text += (
            f"a leak at {leak_rate:.1%} of all tokens or more would have been seen with 99 % "
            "probability; a rarer one is seen where it crosses a seam that was tried, and may be "
            "missed elsewhere."
        )
    if "detectable_gain_nats_per_token" in null.evidence:
        gain = null.evidence["detectable_gain_nats_per_token"]
        text += f" The null test would have shown a leak worth {gain:.4f} nats a token."
    return text


def overall_verdict(checks: Sequence[Check]) -> str:
    """The gravest: FAIL where any check fails, NOT RUN where any was not run, else PASS."""
    found = {check.verdict for check in checks}
    return next(verdict for verdict in (FAIL, NOT_RUN, PASS) if verdict in found)


def audit_record(
    checks: Sequence[Check],
    findings: Findings,
    *,
    variant: str | None,
    seed: int,
    parameters: dict[str, Any],
) -> dict[str, Any]:
    """The content of audit.json. checks: all of them, in the order of the report."""
    return {
        "verdict": overall_verdict(checks),
        "variant": variant,
        "seed": seed,
        "track": findings.track,
        "checks": [asdict(check) for check in checks],
        "not_run": [check.name for check in checks if check.verdict == NOT_RUN],
        "parameters": parameters,
        "detectable_leak_rate_99": findings.detectable_leak_rate_99,
        "meaning_of_pass": findings.meaning_of_pass,
    }


def verdict_lines(record: dict[str, Any]) -> list[str]:
    """A short table of the verdicts, one line a check, for a terminal."""
    lines = [
        f"{check['verdict']:8} {check['name']:15} {check['sentence']}" for check in record["checks"]
    ]
    lines.append(f"{'':8} {'thoroughness':15} {record['meaning_of_pass']}")
    missing = f"not run: {', '.join(record['not_run'])}; " if record["not_run"] else ""
    return [*lines, f"{record['verdict']:8} {'overall':15} {missing}track: {record['track']}"]


def _malformed(fault: Check) -> Findings:
    """An answer of another shape than [targets, vocabulary] fails one check; the others wait."""
    names = ("flip", "self_influence", "null", "attribution", "normalisation")
    names += ("claimed_score", "coverage")
    reason = "It needs one distribution over the whole vocabulary for each target."
    checks = [fault if name == fault.name else Check(name, NOT_RUN, reason) for name in names]
    meaning = "Nothing could be tested: the evaluator's answer has not the form that it needs."
    return Findings(checks, reach_table([], 0.0), "unknown", None, meaning, {})


def _plan(subject: Subject, reference: Tensor, num_flips: int, seed: int) -> list[Flip]:
    return plan_flips(
        subject.tokens,
        guesses=reference.argmax(dim=1),
        vocab_size=subject.vocab_size,
        bos_id=subject.bos_id,
        geometry=subject.geometry,
        num_flips=num_flips,
        seed=seed,
    )


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - started


def _reported_gain(subject: Subject) -> float | None:
    return None if subject.evaluation is None else subject.evaluation.gain_nats_per_token


def _null_gains(subject: Subject, null_tokens: int, seed: int) -> np.ndarray | None:
    if subject.draw is None or null_tokens == 0:
        return None
    return null_gains(subject.evaluator, *subject.draw(null_tokens, seed))


def _track(subject: Subject, reference: Tensor) -> str:
    """`fixed` where the scores are the plain model's, `adaptive` where not, else `unknown`."""
    if subject.base is None:
        return "unknown"
    plain = log_probs_of(evaluate(subject.base, subject.tokens))
    if plain.shape != reference.shape:
        return "unknown"
    largest = float(torch.nan_to_num(largest_changes(plain, reference), nan=math.inf).max())
    return "fixed" if largest <= SAME_DISTRIBUTION_NATS else "adaptive"
