"""The flip test: does any distribution depend on its own target or on one that comes after it?

One token x_t is replaced and the whole evaluator runs again. The distributions of targets that the
declared order puts before t, and t's own, must not change. Each run has one flip: with two,
everything after the earlier one may change legitimately. Some flips replace every later token too;
they do not tell which token leaked, so only single flips count for self-influence and the reach.
The comparison is bitwise where repeated runs agree bitwise, else against the noise between them.

A flip that makes or removes a document's start also changes how an evaluator batches its text, and
with the batches' shapes its rounding. Such flips are judged by what the change is worth to the
score. So is whatever noise may hide: a change of at most ε nats at each target moves the mean by no
more than ε.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fairway.audit.flip_plan import Flip, flipped
from fairway.audit.interface import (
    FAIL,
    NOT_APPLICABLE,
    PASS,
    UNBOUNDED_NATS,
    UNDECIDED,
    Answer,
    Check,
    Evaluator,
    evaluate,
)
from fairway.errors import UserError
from fairway.progress import progress

NOISE_MARGIN = 10.0
"""A change counts above this multiple of the largest difference between repeated runs: the flips
outnumber the repeats, so their largest noise exceeds that of the repeats."""

LARGEST_NOISE_NATS = 0.1
"""With more noise than this a score cannot be reproduced, and no flip test can judge it."""

CONFIRMATIONS = 3
"""So often the first flip that changes an earlier target, and the unchanged text, run again: noise
that shows in few runs is not there in all of them."""

SYSTEMATIC_Z = 8.0
"""Changes whose mean over targets lies so many standard errors from zero are no rounding: the
largest of 10,000 independent ones stays below 5."""

LARGEST_ROUNDING_NATS = 0.5
"""bfloat16 holds a logit between 16 and 32 to 0.06 nats; no rounding of one is as large as this."""

UNFELT_SHARE = 0.5
"""Where more of the flips than this change no later target, the evaluator may not read its text."""


@dataclass(frozen=True)
class FlipResult:
    """What the flip of token t changed.

    changes: float32 [k + 1]; element i is the largest |Δ log p| over the vocabulary in the
    distribution of the i-th target of the declared order; the last is the flipped token's own.
    nll_changes: float64 [k]; the signed change, nats, of the loss of each target before t.
    is_systematic: whether the changes have a direction in common, as rounding has not.
    is_felt: whether any later target changed; None where there is none, or where a document ends.
    is_reordered: whether targets before t come in another order than without the flip.
    """

    flip: Flip
    changes: np.ndarray
    nll_changes: np.ndarray
    is_systematic: bool = False
    is_felt: bool | None = None
    is_reordered: bool = False


@dataclass(frozen=True)
class FlipRun:
    """The results of all flips and the noise, nats, that was seen meanwhile.

    limit_nats: what rounding and noise may be worth, nats a token. limit_bpb: the same in bits per
    byte. has_distributions: False where only losses could be compared.
    """

    results: Sequence[FlipResult]
    noise_nats: float
    limit_nats: float
    limit_bpb: float
    has_distributions: bool = True

    @property
    def threshold_nats(self) -> float:
        return NOISE_MARGIN * self.noise_nats

    def bpb(self, nats: float) -> float:
        """Nats a token in bits per byte."""
        return nats * self.limit_bpb / self.limit_nats


def largest_changes(before: Tensor, after: Tensor) -> Tensor:
    """Largest absolute difference of each row, float32 [rows]; exactly 0 where nothing changed."""
    same = (before == after) | (before.isnan() & after.isnan())
    difference = torch.where(same, 0.0, (before - after).abs().float())
    difference = torch.nan_to_num(difference, nan=UNBOUNDED_NATS, posinf=UNBOUNDED_NATS)
    # An underflowing difference is still a difference.
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(same, 0.0, difference.clamp(min=tiny)).amax(dim=1)


def run_flips(
    evaluator: Evaluator,
    tokens: Tensor,
    references: Sequence[Answer],
    flips: Sequence[Flip],
    *,
    vocab_size: int,
    bos_id: int,
    noise_nats: float = 0.0,
) -> tuple[list[FlipResult], float]:
    """Run the evaluator once for each flip; the results, and the largest noise that was seen.

    references: its answers to the unchanged text. The first flip that fires is run again, and the
    unchanged text too: a change that is not always there is noise, however rare.
    """
    references, results, is_confirmed = list(references), [], False
    with progress(len(flips), "flip test", "flip") as bar:
        for flip in flips:
            text = flipped(tokens, flip, vocab_size, bos_id, references[0].order)
            answer = _evaluate_like(references[0], evaluator, text)
            result = compare(references[0], answer, flip, tokens, bos_id)
            if not is_confirmed and _fires(result, NOISE_MARGIN * noise_nats):
                changes, noise_nats = _confirm(
                    evaluator, tokens, text, references, answer, flip, noise_nats
                )
                is_confirmed = bool((changes > NOISE_MARGIN * noise_nats).any())
                result = replace(result, changes=changes)
            results.append(result)
            bar.update(1)
    return results, noise_nats


def compare(
    reference: Answer, answer: Answer, flip: Flip, tokens: Tensor, bos_id: int
) -> FlipResult:
    """What the flip changed. reference: the answer to `tokens`, int64 [n + 1], without it."""
    rank = int(reference.order[flip.position - 1])
    before, after = _rows_by_rank(reference, reference), _rows_by_rank(answer, reference)
    upto = reference.order.argsort()[: rank + 1]
    nll_changes = (answer.nll - reference.nll)[upto[:-1]].nan_to_num(0.0, 0.0, 0.0).numpy()
    follower = flip.position + 1
    ends_document = follower >= len(tokens) or int(tokens[follower]) == bos_id
    is_felt = None
    if len(before) > rank + 1 and not ends_document:
        is_felt = not torch.equal(before[rank + 1 :], after[rank + 1 :])
    return FlipResult(
        flip,
        _row_changes(before[: rank + 1], after[: rank + 1], reference.has_distributions),
        nll_changes,
        is_systematic=flip.moves_marks and _is_systematic(before[:rank], after[:rank], nll_changes),
        is_felt=is_felt,
        is_reordered=not torch.equal(answer.order[upto], reference.order[upto]),
    )


def _rows_by_rank(answer: Answer, reference: Answer) -> Tensor:
    """The answer's rows in the reference's order, on its device."""
    rows = answer.rows.to(reference.rows.device)
    return rows[reference.order.argsort().to(rows.device)] if reference.is_reordered else rows


def _evaluate_like(reference: Answer, evaluator: Evaluator, text: Tensor) -> Answer:
    answer = evaluate(evaluator, text)
    if answer.rows.shape != reference.rows.shape:
        raise UserError(
            f"the evaluator returned rows of {list(answer.rows.shape)} for a text with one token "
            f"replaced, and of {list(reference.rows.shape)} before: expected the same"
        )
    return answer


def _changes(reference: Answer, answer: Answer, rank: int) -> np.ndarray:
    """Of each target up to `rank`, the flipped one's."""
    before, after = (_rows_by_rank(one, reference)[: rank + 1] for one in (reference, answer))
    return _row_changes(before, after, reference.has_distributions)


def _row_changes(before: Tensor, after: Tensor, has_distributions: bool) -> np.ndarray:
    """Of each row; the last is the flipped token's."""
    changes = largest_changes(before, after).cpu().numpy()
    if not has_distributions:
        changes[-1] = 0.0  # the loss of a replaced token is another one
    return changes


def _is_systematic(before: Tensor, after: Tensor, nll_changes: np.ndarray) -> bool:
    """Whether some entry of the distributions, or the losses, move in one direction together."""
    if len(before) < 2:
        return False
    moved = (after - before).double().nan_to_num(0.0, UNBOUNDED_NATS, -UNBOUNDED_NATS)
    columns = torch.cat([moved, torch.from_numpy(nll_changes)[:, None].to(moved.device)], dim=1)
    error = columns.std(dim=0) / math.sqrt(len(columns))
    means = columns.mean(dim=0).abs()
    is_large = float(moved.abs().max()) > LARGEST_ROUNDING_NATS
    return is_large or bool((means > SYSTEMATIC_Z * error)[means > 0].any())


def _fires(result: FlipResult, threshold: float) -> bool:
    single = result.flip.rest_seed is None
    judged = result.changes if single else result.changes[:-1]
    return bool((judged > threshold).any())


def _confirm(
    evaluator: Evaluator,
    tokens: Tensor,
    text: Tensor,
    references: list[Answer],
    answer: Answer,
    flip: Flip,
    noise_nats: float,
) -> tuple[np.ndarray, float]:
    """The changes that every pair of runs shows, and the noise among runs of the same text.

    text: `tokens` with the flip. The new answers to `tokens` join `references`.
    """
    rank = int(references[0].order[flip.position - 1])
    answers = [answer]
    shown = np.min([_changes(one, answer, rank) for one in references], axis=0)
    for _ in range(CONFIRMATIONS):
        answers.append(_evaluate_like(references[0], evaluator, text))
        references.append(_evaluate_like(references[0], evaluator, tokens))
        pairs = [(references[-1], one) for one in answers]
        pairs += [(one, answers[-1]) for one in references]
        shown = np.min([shown, *(_changes(*pair, rank) for pair in pairs)], axis=0)
        repeats = [(references[0], references[-1]), (answers[0], answers[-1])]
        for first, second in repeats:
            noise_nats = max(noise_nats, float(largest_changes(first.rows, second.rows).max()))
        if not (shown > 0).any():
            break
    del references[2:]  # each holds a distribution of every target
    return shown, noise_nats


def reach_table(run: FlipRun) -> pd.DataFrame:
    """How far back a single token's influence reaches, one row for each distance.

    Columns: distance_tokens (0: the token's own distribution), pairs (flips that have a
    distribution so far back), changed (those in which it changed), largest_change_nats.
    """
    results = _single(_strict(run.results))
    longest = max((len(result.changes) for result in results), default=0)
    pairs, changed = np.zeros(longest, np.int64), np.zeros(longest, np.int64)
    largest = np.zeros(longest)
    for result in results:
        backwards = result.changes[::-1]
        span = len(backwards)
        pairs[:span] += 1
        changed[:span] += backwards > run.threshold_nats
        largest[:span] = np.maximum(largest[:span], backwards)
    return pd.DataFrame(
        {
            "distance_tokens": np.arange(longest, dtype=np.int64),
            "pairs": pairs,
            "changed": changed,
            "largest_change_nats": largest,
        }
    )


def check_flips(run: FlipRun) -> Check:
    """PASS where no flip changed the distribution of an earlier target.

    UNDECIDED where what was seen could be rounding, and could be worth more than the limit, and
    where the evaluator hardly reacts to its text.
    evidence: flips, flips_by_seam, leaking_flips, leaking_share, largest_change_nats, worth_bpb (of
    the flip whose changes are worth most), reach_tokens (the furthest of a single token; 0 where
    none), examples (the five largest), flips_of_marks, unfelt_share, noise_nats.
    """
    results, strict, threshold = run.results, _strict(run.results), run.threshold_nats
    of_marks = [result for result in results if result.flip.moves_marks]
    leaks = [one for one in strict if one.is_reordered or (one.changes[:-1] > threshold).any()]
    costly = [one for one in of_marks if _worth(one) > run.limit_nats and _fires(one, threshold)]
    leaks += [one for one in costly if one.is_systematic]
    reach = max((_reach(one.changes[:-1], threshold) for one in _single(leaks)), default=0)
    felt = [one.is_felt for one in _single(strict) if one.is_felt is not None]
    unfelt_share = felt.count(False) / len(felt) if felt else None
    noise_worth = max((_worth(one) for one in results if one not in leaks), default=0.0)
    evidence = {
        "flips": len(results),
        "flips_by_seam": _count_by_seam(results),
        "leaking_flips": len(leaks),
        "leaking_flips_by_seam": _count_by_seam(leaks),
        "leaking_share": len(leaks) / len(results),
        "largest_change_nats": max((_largest(one) for one in leaks), default=0.0),
        "worth_bpb": run.bpb(max((_worth(one) for one in leaks), default=0.0)),
        "reach_tokens": reach,
        "examples": _examples(leaks, threshold),
        "flips_of_marks": len(of_marks),
        "flips_of_marks_that_changed": sum(_fires(one, 0.0) for one in of_marks),
        "unfelt_share": unfelt_share,
        "noise_nats": run.noise_nats,
        "rounding_bpb": run.bpb(noise_worth),
        "limit_bpb": run.limit_bpb,
        "compared": "distributions" if run.has_distributions else "losses",
        "comparison": "bitwise" if threshold == 0 else f"changes above {threshold:.3g} nats",
    }
    verdict, sentence = _judge(run, leaks, costly, unfelt_share, noise_worth, evidence)
    return Check("flip", verdict, sentence, evidence)


def _judge(
    run: FlipRun,
    leaks: Sequence[FlipResult],
    costly: Sequence[FlipResult],
    unfelt_share: float | None,
    noise_worth: float,
    evidence: dict,
) -> tuple[str, str]:
    what = "distribution" if run.has_distributions else "loss"
    worth, limit = run.bpb(noise_worth), run.limit_bpb
    if run.noise_nats > LARGEST_NOISE_NATS:
        return FAIL, (
            f"Two runs on the same text differ by {run.noise_nats:.3g} nats: a score that cannot "
            "be reproduced cannot be shown to be causal. Make the evaluator deterministic."
        )
    if leaks:
        far = (
            f" and up to {evidence['reach_tokens']:,} tokens back"
            if evidence["reach_tokens"]
            else ""
        )
        order = (
            "; the order of scoring itself changed"
            if any(one.is_reordered for one in leaks)
            else ""
        )
        return FAIL, (
            f"{len(leaks)} of {len(run.results)} replacements changed the {what} of an earlier "
            f"target, by up to {evidence['largest_change_nats']:.3g} nats{far}: scores depend on "
            f"tokens that come later{order}."
        )
    if unfelt_share is not None and unfelt_share > UNFELT_SHARE:
        return UNDECIDED, (
            f"{unfelt_share:.0%} of the replaced tokens changed no later {what} either: the "
            "evaluator may not read the text that it is given, so the test could not see a leak."
        )
    if noise_worth > run.limit_nats:
        cause = (
            "Replacing a document's start moves earlier scores as rounding does"
            if costly
            else "Runs on the same text differ"
        )
        return UNDECIDED, (
            f"{cause}, and what was seen could be worth {worth:.2g} bpb, more than {limit:g}: a "
            "leak as large would not show. Compute in float32, with batches whose shapes do not "
            "depend on the text."
        )
    rounding = f"; what was seen of rounding is worth at most {worth:.2g} bpb" if worth else ""
    below = f" by more than {run.threshold_nats:.3g} nats, the noise" if run.noise_nats else ""
    text = f"{_replacements(run.results)}: no earlier target's {what} changed{below}{rounding}."
    return PASS, text


def check_self_influence(run: FlipRun) -> Check:
    """PASS where no token changed its own distribution. evidence: flips, influenced_flips, …"""
    if not run.has_distributions:
        reason = (
            "The loss of a replaced token is another one by right; the sum over all tokens, which "
            "normalization probes, shows whether the distribution knew it."
        )
        return Check("self_influence", NOT_APPLICABLE, reason)
    threshold = run.threshold_nats
    single = _single(_strict(run.results))
    influenced = [result for result in single if result.changes[-1] > threshold]
    mean = float(np.mean([min(one.changes[-1], UNBOUNDED_NATS) for one in single] or [0.0]))
    evidence = {
        "flips": len(single),
        "influenced_flips": len(influenced),
        "influenced_flips_by_seam": _count_by_seam(influenced),
        "influenced_share": len(influenced) / max(1, len(single)),
        "largest_change_nats": max((float(one.changes[-1]) for one in influenced), default=0.0),
        "noise_nats": run.noise_nats,
    }
    if influenced:
        sentence = (
            f"{len(influenced)} of {len(single)} tokens changed the very distribution that scores "
            f"them, by up to {evidence['largest_change_nats']:.3g} nats: the answer was used "
            "before it was predicted."
        )
        return Check("self_influence", FAIL, sentence, evidence)
    if mean > run.limit_nats:
        sentence = (
            f"Noise moves a replaced token's own distribution by {mean:.2g} nats on average, worth "
            f"{run.bpb(mean):.2g} bpb, more than {run.limit_bpb:g}: a leak as large would not show."
        )
        return Check("self_influence", UNDECIDED, sentence, evidence)
    sentence = f"None of {len(single)} replaced tokens changed the distribution that scores it."
    return Check("self_influence", PASS, sentence, evidence)


def detectable_leak_rate(random_flips: int) -> float | None:
    """Smallest share of leaking tokens that so many clean random flips rule out with 99 %
    confidence: a share r stays unseen with probability (1 - r)^flips. None without any."""
    if random_flips == 0:
        return None
    return 1.0 - (1.0 - 0.99) ** (1.0 / random_flips)


def _single(results: Sequence[FlipResult]) -> list[FlipResult]:
    """Those that replaced one token and left the rest as it was."""
    return [result for result in results if result.flip.rest_seed is None]


def _strict(results: Sequence[FlipResult]) -> list[FlipResult]:
    """Those that left documents where they were."""
    return [result for result in results if not result.flip.moves_marks]


def _worth(result: FlipResult) -> float:
    """What the changes before the flipped token can be worth, nats a token: their mean size."""
    return float(np.abs(result.nll_changes).mean()) if len(result.nll_changes) else 0.0


def _largest(result: FlipResult) -> float:
    return float(result.changes[:-1].max(initial=0.0))


def _replacements(results: Sequence[FlipResult]) -> str:
    single = len(_single(results))
    rest = len(results) - single
    times = "once" if rest == 1 else f"{rest} times"
    return f"{single} tokens were replaced one at a time" + (
        f", and {times} everything from a token on" if rest else ""
    )


def _reach(changes: np.ndarray, threshold: float) -> int:
    """How far back the earliest changed target is, tokens. changes: of targets 1 … t - 1."""
    changed = np.flatnonzero(changes > threshold)
    return len(changes) - int(changed[0]) if len(changed) else 0


def _examples(leaks: Sequence[FlipResult], threshold: float) -> list[dict]:
    shown = [leak for leak in leaks if (leak.changes[:-1] > threshold).any()]
    largest = sorted(shown, key=_largest, reverse=True)[:5]
    return [
        {
            "position": leak.flip.position,
            "seam": leak.flip.seam,
            "replacement": leak.flip.token,
            "earliest_changed_target": int(np.flatnonzero(leak.changes[:-1] > threshold)[0]) + 1,
            "changed_targets": int((leak.changes[:-1] > threshold).sum()),
            "largest_change_nats": _largest(leak),
        }
        for leak in largest
    ]


def _count_by_seam(results: Iterable[FlipResult]) -> dict[str, int]:
    return dict(Counter(result.flip.seam for result in results))
