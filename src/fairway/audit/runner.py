"""Run the audit: on any evaluator with `audit`, or check by check on an `AuditTarget`."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fairway.audit.bookkeeping import (
    Evaluation,
    check_coverage,
    check_reported_score,
    wrong_row_count,
)
from fairway.audit.checks import check_attribution, check_budgets, check_normalization
from fairway.audit.flip import (
    check_flips,
    check_self_influence,
    detectable_leak_rate,
    largest_changes,
    measure_noise,
    reach_table,
    run_flips,
)
from fairway.audit.flip_plan import RANDOM, Flip, Geometry, choose_excerpt, plan_flips
from fairway.audit.interface import (
    NOT_RUN,
    Check,
    Evaluator,
    Predictor,
    evaluate,
    log_probs_of,
)
from fairway.audit.lineage import check_lineage
from fairway.audit.null import NullSampler, check_null, draw_stream, null_gains
from fairway.audit.result import ADAPTIVE, FIXED, UNKNOWN, AuditResult, meaning_of_pass
from fairway.errors import UserError
from fairway.settings import Settings

SAME_DISTRIBUTION_NATS = 1e-3
"""An evaluator this close to the plain model at every target does not adapt."""

EVALUATOR_CHECKS = (
    "flip",
    "self_influence",
    "null",
    "attribution",
    "normalization",
    "reported_score",
    "coverage",
)
"""These checks need the evaluator; `audit_evaluator` reports them in this order."""


class AuditSettings(Settings):
    """How thorough the audit is (config section `audit`)."""

    flips: int = Field(64, ge=2)
    """Tokens replaced, each at the cost of one evaluation of the excerpt."""
    stream_tokens: int = Field(8192, ge=2)
    """Targets of the audited excerpt of validation text."""
    null_tokens: int = Field(4096, ge=0)
    """Targets drawn from the model for the null test; 0 leaves it out."""
    noise_repeats: int = Field(1, ge=1)
    """More runs of the unchanged excerpt, to measure whether the backend repeats itself."""
    significance: float = Field(0.001, gt=0, lt=1)
    """Chance that the null test fails an honest evaluator, at most."""


@dataclass(frozen=True)
class AuditTarget:
    """The evaluator under audit, and what its owner tells about it.

    tokens: int64 [n + 1], the excerpt of real text.
    geometry: aims the flips.
    sampler: draws text from the plain model, for the null test.
    base: the same evaluator without adaptation, which decides the track.
    evaluation: the whole evaluation that the reported score comes from.
    """

    evaluator: Evaluator
    tokens: Tensor
    vocab_size: int
    bos_id: int
    geometry: Geometry | None = None
    sampler: NullSampler | None = None
    base: Evaluator | None = None
    evaluation: Evaluation | None = None


def audit(
    evaluator: Evaluator,
    tokens: Tensor | np.ndarray,
    *,
    vocab_size: int,
    bos_id: int = 1,
    next_token: Predictor | None = None,
    base: Evaluator | None = None,
    geometry: Geometry | None = None,
    provenance: str | Path | None = None,
    used: Mapping[str, float | None] | None = None,
    limits: Mapping[str, float] | None = None,
    settings: AuditSettings | None = None,
    seed: int = 0,
) -> AuditResult:
    """Audit any evaluator on an excerpt of `tokens`.

    tokens: integers [N], validation text; `settings.stream_tokens` of them are audited.
    next_token: the plain model, for the null test. base: the evaluator without adaptation, for the
    track. geometry: how the evaluator cuts the text, to aim the flips. provenance: provenance.json
    of what is evaluated. used, limits: budgets by name. seed: of the flips and the drawn text.
    Raises UserError where the text does not fit the vocabulary, or the evaluator's answer has not
    the form that `fairway.audit.interface` describes.

    >>> import torch
    >>> from fairway.audit.runner import AuditSettings, audit
    >>> model = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    >>> def next_token(prefix):
    ...     return torch.log_softmax(model[prefix[-1]], dim=-1)
    >>> def honest(tokens):  # row i is the distribution that predicted tokens[i + 1]
    ...     return torch.stack([next_token(tokens[: i + 1]) for i in range(len(tokens) - 1)])
    >>> def leaking(tokens):  # its bias was fitted on the text that it scores
    ...     counts = torch.bincount(tokens[1:], minlength=16) + 1.0
    ...     return torch.log_softmax(honest(tokens) + counts.log(), dim=-1)
    >>> tokens = torch.arange(200) % 16
    >>> quick = AuditSettings(flips=8, null_tokens=100)
    >>> audit(honest, tokens, vocab_size=16, next_token=next_token, settings=quick).verdict
    'PASS'
    >>> result = audit(leaking, tokens, vocab_size=16, next_token=next_token, settings=quick)
    >>> result.verdict, result.names("FAIL")
    ('FAIL', ['flip', 'self_influence'])
    """
    settings = settings or AuditSettings()
    if isinstance(tokens, np.ndarray):  # shards are unsigned and read-only
        tokens = torch.from_numpy(tokens.astype(np.int64))
    _check_text(tokens, vocab_size)
    excerpt = choose_excerpt(tokens.long(), settings.stream_tokens, bos_id)
    target = AuditTarget(
        evaluator=evaluator,
        tokens=excerpt,
        vocab_size=vocab_size,
        bos_id=bos_id,
        geometry=geometry,
        sampler=partial(draw_stream, next_token, excerpt[:1]) if next_token else None,
        base=base,
    )
    result = audit_evaluator(target, settings, seed)
    return result.with_checks(check_lineage(provenance), check_budgets(used or {}, limits or {}))


def audit_evaluator(target: AuditTarget, settings: AuditSettings, seed: int) -> AuditResult:
    """Run every check of `EVALUATOR_CHECKS`.

    The evaluator runs 1 + noise_repeats + flips times on the excerpt and once on drawn text.
    Raises UserError where its answer has not the form that `fairway.audit.interface` describes.
    """
    parameters = {
        **settings.model_dump(),
        "seed": seed,
        "geometry": asdict(target.geometry) if target.geometry else None,
        "excerpt_targets": len(target.tokens) - 1,
    }
    tokens, num_targets = target.tokens, len(target.tokens) - 1
    answer = evaluate(target.evaluator, tokens)
    reference = log_probs_of(answer)
    if len(reference) != num_targets:
        return _malformed(wrong_row_count(reference, num_targets), parameters)
    if reference.shape[1] != target.vocab_size:
        return _malformed(check_normalization(reference, target.vocab_size), parameters)
    seconds: dict[str, float] = {}
    with _timed(seconds, "noise"):
        noise = measure_noise(target.evaluator, tokens, reference, settings.noise_repeats)
    with _timed(seconds, "flip"):
        flips = _plan(target, reference, settings.flips, seed)
        results = run_flips(target.evaluator, tokens, reference, flips)
    with _timed(seconds, "null"):
        gains = _null_gains(target, settings.null_tokens, seed)
    with _timed(seconds, "track"):
        track = _track(target, reference)
    null = check_null(gains, settings.significance, _reported_gain(target))
    rate = detectable_leak_rate(sum(flip.seam == RANDOM for flip in flips))
    return AuditResult(
        checks=(
            check_flips(results, noise),
            check_self_influence(results, noise),
            null,
            check_attribution(target.evaluation),
            check_normalization(reference, target.vocab_size),
            check_reported_score(answer, tokens, target.evaluation),
            check_coverage(answer, num_targets, target.evaluation),
        ),
        reach=reach_table(results, noise),
        track=track,
        detectable_leak_rate_99=rate,
        meaning_of_pass=meaning_of_pass(flips, num_targets, rate, null),
        parameters=parameters,
        seconds=seconds,
    )


def _check_text(tokens: Tensor, vocab_size: int) -> None:
    if tokens.ndim != 1 or len(tokens) < 3:
        raise UserError(f"the text has shape {tuple(tokens.shape)}: expected at least 3 tokens")
    least, largest = int(tokens.min()), int(tokens.max())
    if least < 0 or largest >= vocab_size:
        raise UserError(
            f"the text holds tokens from {least} to {largest}, the vocabulary size is "
            f"{vocab_size}: give the size of the tokenizer that made the text"
        )


def _malformed(fault: Check, parameters: dict[str, Any]) -> AuditResult:
    """An answer of another shape than [targets, vocabulary] fails one check; the others wait."""
    reason = "It needs one distribution over the whole vocabulary for each target."
    return AuditResult(
        checks=tuple(
            fault if name == fault.name else Check(name, NOT_RUN, reason)
            for name in EVALUATOR_CHECKS
        ),
        reach=reach_table([], 0.0),
        track=UNKNOWN,
        detectable_leak_rate_99=None,
        meaning_of_pass="Nothing could be tested: the evaluator's answer has the wrong shape.",
        parameters=parameters,
        seconds={},
    )


def _plan(target: AuditTarget, reference: Tensor, num_flips: int, seed: int) -> list[Flip]:
    return plan_flips(
        target.tokens,
        guesses=reference.argmax(dim=1),
        vocab_size=target.vocab_size,
        bos_id=target.bos_id,
        geometry=target.geometry,
        num_flips=num_flips,
        seed=seed,
    )


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - started


def _reported_gain(target: AuditTarget) -> float | None:
    return None if target.evaluation is None else target.evaluation.gain_nats_per_token


def _null_gains(target: AuditTarget, null_tokens: int, seed: int) -> np.ndarray | None:
    if target.sampler is None or null_tokens == 0:
        return None
    return null_gains(target.evaluator, *target.sampler(null_tokens, seed))


def _track(target: AuditTarget, reference: Tensor) -> str:
    if target.base is None:
        return UNKNOWN
    plain = log_probs_of(evaluate(target.base, target.tokens))
    if plain.shape != reference.shape:
        return UNKNOWN
    largest = float(torch.nan_to_num(largest_changes(plain, reference), nan=math.inf).max())
    return FIXED if largest <= SAME_DISTRIBUTION_NATS else ADAPTIVE
