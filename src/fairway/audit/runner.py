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
from fairway.audit.checks import (
    check_attribution,
    check_budgets,
    check_normalization,
    check_width,
)
from fairway.audit.flip import (
    FlipRun,
    check_flips,
    check_self_influence,
    detectable_leak_rate,
    largest_changes,
    reach_table,
    run_flips,
)
from fairway.audit.flip_plan import (
    RANDOM,
    Geometry,
    TokenClasses,
    choose_excerpt,
    plan_flips,
    with_recurring_passages,
)
from fairway.audit.fresh import FreshEvaluator
from fairway.audit.interface import (
    NOT_RUN,
    Answer,
    Check,
    Evaluator,
    Predictor,
    evaluate,
)
from fairway.audit.lineage import check_lineage
from fairway.audit.meaning import meaning_of_pass
from fairway.audit.null import NullSampler, check_null, draw_stream, null_gains
from fairway.audit.probe import check_probed_sums, probe_sums
from fairway.audit.recorder import RecordedEvaluator
from fairway.audit.repeats import Repeats, check_state, repeat_calls
from fairway.audit.result import ADAPTIVE, FIXED, UNKNOWN, AuditResult
from fairway.audit.tally import Tally, tally_of, tally_whole_text
from fairway.errors import UserError
from fairway.settings import Settings

SAME_DISTRIBUTION_NATS = 1e-3
"""An evaluator this close to the plain model at every target does not adapt."""

WHOLE_ANSWER_BYTES = 1 << 31
"""An evaluator that returns all distributions at once scores the whole text where they take no more
memory than this."""

EVALUATOR_CHECKS = (
    "flip",
    "self_influence",
    "state",
    "null",
    "attribution",
    "normalization",
    "reported_score",
    "coverage",
)
"""These checks need the evaluator; `audit_evaluator` reports them in this order."""

NO_FLIPS = FlipRun(results=(), noise_nats=0.0, limit_nats=1.0, limit_bpb=1.0)
"""This stands for the flips of an evaluator that could not be compared."""


class AuditSettings(Settings):
    """How thorough the audit is (config section `audit`)."""

    flips: int = Field(64, ge=2)
    """Tokens replaced, each at the cost of one evaluation of the excerpt."""
    stream_tokens: int = Field(8192, ge=2)
    """Targets of the audited excerpt of validation text."""
    null_tokens: int = Field(8192, ge=0)
    """Targets drawn from the model for the null test; 0 leaves it out."""
    noise_repeats: int = Field(1, ge=1)
    """More runs of the unchanged excerpt, to measure whether the backend repeats itself."""
    significance: float = Field(0.001, gt=0, lt=1)
    """Chance that the null test fails an honest evaluator, at most."""
    limit_bpb: float = Field(1e-4, gt=0)
    """What rounding and noise may be worth to a score, bits per byte, before nothing can PASS."""
    probe_tokens: int = Field(1024, ge=0)
    """Length of the text whose last target is probed with every token, for an evaluator that gives
    losses only; 0 leaves it out."""
    whole_text: bool = True
    """Whether the evaluator also scores the whole text once, for coverage, sums and arithmetic."""
    overlap_share: float = Field(0.01, ge=0, le=1)
    """Share of the validation documents that may occur in the training text, exactly or nearly;
    more fail `lineage`."""


@dataclass(frozen=True)
class AuditTarget:
    """The evaluator under audit, and what its owner tells about it.

    tokens: int64 [n + 1], the excerpt of real text.
    geometry: aims the flips.
    sampler: draws text from the plain model, for the null test.
    base: the same evaluator without adaptation, which decides the track.
    evaluation: the whole evaluation that the reported score comes from.
    text: int64 [N + 1], the whole text, to be scored once too.
    classes: of tokens, so that replacements differ in them.
    bytes_per_token: of the text, which turns nats a token into bits per byte.
    """

    evaluator: Evaluator
    tokens: Tensor
    vocab_size: int
    bos_id: int
    geometry: Geometry | None = None
    sampler: NullSampler | None = None
    base: Evaluator | None = None
    evaluation: Evaluation | None = None
    text: Tensor | None = None
    classes: TokenClasses | None = None
    bytes_per_token: float = 1.0


def audit(
    evaluator: Evaluator,
    tokens: Tensor | np.ndarray,
    *,
    vocab_size: int,
    bos_id: int = 1,
    next_token: Predictor | None = None,
    base: Evaluator | None = None,
    geometry: Geometry | None = None,
    token_classes: TokenClasses | None = None,
    bytes_per_token: float = 1.0,
    evaluation: Evaluation | None = None,
    provenance: str | Path | None = None,
    used: Mapping[str, float | None] | None = None,
    limits: Mapping[str, float] | None = None,
    settings: AuditSettings | None = None,
    seed: int = 0,
) -> AuditResult:
    """Audit any evaluator on an excerpt of `tokens`.

    tokens: integers [N], validation text; `settings.stream_tokens` of them are audited.
    next_token: the plain model, for the null test. base: the evaluator without adaptation, for the
    track. geometry: how the evaluator cuts the text, to aim the flips. token_classes: such as
    `fairway.data.token_classes.token_classes` gives, to replace tokens by those of another class.
    bytes_per_token: of the text, in mean; 1 is the strictest. evaluation: the table of the whole
    evaluation, from `fairway.audit.bookkeeping.read_evaluation`. provenance: provenance.json of
    what is evaluated. used, limits: budgets by name. seed: of the flips and the drawn text.
    Raises UserError where the text does not fit the vocabulary, or the evaluator's answer has not
    the form that `fairway.audit.interface` describes.

    Examples:
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
    _check_text(tokens, vocab_size, bos_id)
    if not bytes_per_token > 0:
        raise UserError(f"bytes_per_token is {bytes_per_token}: expected more than 0")
    excerpt = choose_excerpt(tokens.long(), settings.stream_tokens, bos_id)
    target = AuditTarget(
        evaluator=evaluator,
        tokens=excerpt,
        vocab_size=vocab_size,
        bos_id=bos_id,
        geometry=geometry,
        sampler=partial(draw_stream, next_token, excerpt[:1]) if next_token else None,
        base=base,
        evaluation=evaluation,
        text=tokens.long() if settings.whole_text and len(excerpt) < len(tokens) else None,
        classes=token_classes,
        bytes_per_token=bytes_per_token,
    )
    result = audit_evaluator(target, settings, seed)
    return result.with_checks(
        check_lineage(provenance, overlap_share=settings.overlap_share),
        check_budgets(used or {}, limits or {}),
    )


def audit_evaluator(target: AuditTarget, settings: AuditSettings, seed: int) -> AuditResult:
    """Run every check of `EVALUATOR_CHECKS`.

    The evaluator runs 1 + noise_repeats + flips times on the excerpt, once on drawn text and once
    on the whole text; some times more where runs differ or a flip fires.
    Raises UserError where its answer has not the form that `fairway.audit.interface` describes.
    """
    tokens = with_recurring_passages(target.tokens, target.bos_id, seed)
    num_targets = len(tokens) - 1
    parameters = {
        **settings.model_dump(),
        "seed": seed,
        "geometry": asdict(target.geometry) if target.geometry else None,
        "excerpt_targets": num_targets,
        "bytes_per_token": target.bytes_per_token,
    }
    limit_nats = settings.limit_bpb * math.log(2) * target.bytes_per_token
    reference = evaluate(target.evaluator, tokens)
    fault = _fault_of_shape(reference, num_targets, target.vocab_size)
    if fault is not None:
        return _malformed(fault, parameters)
    parameters["order"] = "declared" if reference.is_reordered else "text"
    seconds: dict[str, float] = {}
    with _timed(seconds, "noise"):
        repeats = repeat_calls(target.evaluator, tokens, reference, settings.noise_repeats)
    state = check_state(repeats, limit_nats)
    with _timed(seconds, "flip"):
        flips = None
        if not repeats.remembers:
            flips = _flip(target, tokens, repeats, settings, seed, limit_nats)
    with _timed(seconds, "null"):
        gains = _null_gains(target, settings.null_tokens, seed)
    with _timed(seconds, "track"):
        track = _track(target, tokens, reference)
    with _timed(seconds, "whole_text"):
        tallies = _tallies(target, tokens, reference)
        normalization = _normalization(target, tallies, reference, settings, limit_nats)
    scored = tallies if reference.scores is not None else {}
    reported = target.evaluation and target.evaluation.gain_nats_per_token
    null = check_null(gains, settings.significance, reported)
    random_flips = sum(one.flip.seam == RANDOM for one in flips.results) if flips else 0
    rate = detectable_leak_rate(random_flips)
    return AuditResult(
        checks=(
            *_flip_checks(flips),
            state,
            null,
            check_attribution(target.evaluation),
            normalization,
            check_reported_score(scored, target.evaluation, limit_nats),
            check_coverage(scored, target.evaluation),
        ),
        reach=reach_table(flips or NO_FLIPS),
        track=track,
        detectable_leak_rate_99=rate,
        meaning_of_pass=meaning_of_pass(flips, num_targets, rate, null, target.classes),
        parameters=parameters,
        seconds=seconds,
    )


def _fault_of_shape(reference: Answer, num_targets: int, vocab_size: int) -> Check | None:
    if not reference.has_distributions:
        return None
    if len(reference.rows) != num_targets:
        return wrong_row_count(reference.rows, num_targets)
    return check_width(reference.rows, vocab_size)


def _flip(
    target: AuditTarget,
    tokens: Tensor,
    repeats: Repeats,
    settings: AuditSettings,
    seed: int,
    limit_nats: float,
) -> FlipRun:
    reference = repeats.answers[0]
    flips = plan_flips(
        tokens,
        vocab_size=target.vocab_size,
        bos_id=target.bos_id,
        num_flips=settings.flips,
        seed=seed,
        guesses=reference.rows.argmax(dim=1) if reference.has_distributions else None,
        geometry=target.geometry,
        classes=target.classes,
    )
    if reference.is_reordered:
        # The order may depend on where documents start, so moving them may move every score.
        flips = [flip for flip in flips if not flip.moves_marks]
    results, noise = run_flips(
        target.evaluator,
        tokens,
        repeats.answers,
        flips,
        vocab_size=target.vocab_size,
        bos_id=target.bos_id,
        noise_nats=repeats.noise_nats,
    )
    return FlipRun(
        results,
        noise,
        limit_nats=limit_nats,
        limit_bpb=settings.limit_bpb,
        has_distributions=reference.has_distributions,
    )


def _flip_checks(flips: FlipRun | None) -> tuple[Check, Check]:
    if flips is None:
        reason = (
            "The evaluator keeps state between calls, so runs cannot be compared; audit it with a "
            "new process for each call."
        )
        return Check("flip", NOT_RUN, reason), Check("self_influence", NOT_RUN, reason)
    return check_flips(flips), check_self_influence(flips)


def _tallies(target: AuditTarget, tokens: Tensor, reference: Answer) -> dict[str, Tally]:
    """What is counted of the excerpt's scores, and of the whole text's, distributions not kept."""
    tallies = {"excerpt": tally_of(reference, tokens, target.bos_id)}
    text, evaluator = target.text, target.evaluator
    if text is None:
        return tallies
    if isinstance(evaluator, FreshEvaluator):  # one call needs no process of its own
        evaluator = evaluator.here()
    if isinstance(evaluator, RecordedEvaluator):
        in_recorded_order = evaluator.recorder.order == "recorded"
        tallies["whole text"] = tally_whole_text(
            evaluator.stream, text, target.bos_id, in_recorded_order
        )
    elif len(text) * target.vocab_size * 4 <= WHOLE_ANSWER_BYTES:
        answer = evaluate(evaluator, text)
        if not _fault_of_shape(answer, len(text) - 1, target.vocab_size):
            tallies["whole text"] = tally_of(answer, text, target.bos_id)
    return tallies


def _normalization(
    target: AuditTarget,
    tallies: Mapping[str, Tally],
    reference: Answer,
    settings: AuditSettings,
    limit_nats: float,
) -> Check:
    if reference.has_distributions:
        return check_normalization(tallies, target.vocab_size, limit_nats)
    if settings.probe_tokens == 0:
        reason = "The evaluator gives losses only, and probe_tokens is 0: no sum was probed."
        return Check("normalization", NOT_RUN, reason)
    text = target.tokens[: settings.probe_tokens + 1]
    mark = target.bos_id if reference.is_reordered else None
    sums = probe_sums(target.evaluator, text, target.vocab_size, mark)
    return check_probed_sums(sums, without_mark=mark is not None)


def _check_text(tokens: Tensor, vocab_size: int, bos_id: int) -> None:
    if not 0 <= bos_id < vocab_size:
        raise UserError(
            f"bos_id is {bos_id}: expected a token of the vocabulary, 0 … {vocab_size - 1}"
        )
    if vocab_size < 3:
        raise UserError(
            f"the vocabulary size is {vocab_size}: expected at least 3, since a flip needs a third "
            "token beside the old one and the document mark"
        )
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
        reach=reach_table(NO_FLIPS),
        track=UNKNOWN,
        detectable_leak_rate_99=None,
        meaning_of_pass="Nothing could be tested: the evaluator's answer has the wrong shape.",
        parameters=parameters,
        seconds={},
    )


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - started


def _null_gains(target: AuditTarget, null_tokens: int, seed: int) -> np.ndarray | None:
    if target.sampler is None or null_tokens == 0:
        return None
    return null_gains(target.evaluator, *target.sampler(null_tokens, seed))


def _track(target: AuditTarget, tokens: Tensor, reference: Answer) -> str:
    if target.base is None:
        return UNKNOWN
    plain = evaluate(target.base, tokens)
    first, second = plain.rows, reference.rows
    if not (plain.has_distributions and reference.has_distributions):
        first, second = plain.nll[:, None], reference.nll[:, None]
    if first.shape != second.shape:
        return UNKNOWN
    changes = largest_changes(first, second.to(first.device))
    largest = float(torch.nan_to_num(changes, nan=math.inf).max())
    return FIXED if largest <= SAME_DISTRIBUTION_NATS else ADAPTIVE
