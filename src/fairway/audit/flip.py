"""The flip test: does any distribution depend on its own target or on a later token?

One token x_t is replaced and the whole evaluator runs again. The distributions of targets 1 … t
must not change. Each run has one flip: with two, everything after the earlier one may change
legitimately. Some flips replace every later token too; they do not tell which token leaked, so only
single flips count for self-influence and for the reach.
The comparison is bitwise where repeated runs agree bitwise, else against the noise between them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fairway.audit.flip_plan import Flip, flipped
from fairway.audit.interface import (
    FAIL,
    PASS,
    UNBOUNDED_NATS,
    Check,
    Evaluator,
    evaluate,
    log_probs_of,
)
from fairway.progress import progress

NOISE_MARGIN = 10.0
"""A change counts above this multiple of the largest difference between repeated runs: the flips
outnumber the repeats, so their largest noise exceeds that of the repeats."""

LARGEST_NOISE_NATS = 0.1
"""With more noise than this a score cannot be reproduced, and no flip test can judge it."""


@dataclass(frozen=True)
class FlipResult:
    """What the flip of token t changed.

    changes: float32 [t]; element i is the largest |Δ log p| over the vocabulary in the distribution
    of target i + 1.
    """

    flip: Flip
    changes: np.ndarray


def largest_changes(before: Tensor, after: Tensor) -> Tensor:
    """Largest absolute difference of each row, float32 [rows]; exactly 0 where nothing changed."""
    same = (before == after) | (before.isnan() & after.isnan())
    difference = torch.where(same, 0.0, (before - after).abs().float())
    difference = torch.nan_to_num(difference, nan=UNBOUNDED_NATS, posinf=UNBOUNDED_NATS)
    # An underflowing difference is still a difference.
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(same, 0.0, difference.clamp(min=tiny)).amax(dim=1)


def measure_noise(evaluator: Evaluator, tokens: Tensor, reference: Tensor, repeats: int) -> float:
    """Largest change, nats, between `reference` [n, V] and `repeats` runs on the same text."""
    noise = 0.0
    for _ in range(repeats):
        again = log_probs_of(evaluate(evaluator, tokens))
        noise = max(noise, float(largest_changes(reference, again).max()))
    return noise


def run_flips(
    evaluator: Evaluator, tokens: Tensor, reference: Tensor, flips: Sequence[Flip]
) -> list[FlipResult]:
    """Run the evaluator once for each flip. reference: its answer [n, V] to the unchanged text."""
    results = []
    with progress(len(flips), "flip test", "flip") as bar:
        for flip in flips:
            changed = flipped(tokens, flip, reference.shape[1])
            answer = log_probs_of(evaluate(evaluator, changed))
            rows = flip.position
            changes = largest_changes(reference[:rows], answer[:rows])
            results.append(FlipResult(flip, changes.cpu().numpy()))
            bar.update(1)
    return results


def reach_table(results: Sequence[FlipResult], noise_nats: float) -> pd.DataFrame:
    """How far back a single token's influence reaches, one row for each distance.

    Columns: distance_tokens (0: the token's own distribution), pairs (flips that have a
    distribution so far back), changed (those in which it changed), largest_change_nats.
    """
    results = _single(results)
    longest = max((len(result.changes) for result in results), default=0)
    pairs, changed = np.zeros(longest, np.int64), np.zeros(longest, np.int64)
    largest = np.zeros(longest)
    for result in results:
        backwards = result.changes[::-1]
        span = len(backwards)
        pairs[:span] += 1
        changed[:span] += backwards > NOISE_MARGIN * noise_nats
        largest[:span] = np.maximum(largest[:span], backwards)
    return pd.DataFrame(
        {
            "distance_tokens": np.arange(longest, dtype=np.int64),
            "pairs": pairs,
            "changed": changed,
            "largest_change_nats": largest,
        }
    )


def check_flips(results: Sequence[FlipResult], noise_nats: float) -> Check:
    """PASS where no flip changed the distribution of an earlier target.

    evidence: flips, flips_by_seam, leaking_flips, leaking_share, largest_change_nats,
    reach_tokens (the furthest of a single token; 0 where none), examples (the five largest),
    noise_nats.
    """
    threshold = NOISE_MARGIN * noise_nats
    leaks = [result for result in results if (result.changes[:-1] > threshold).any()]
    reach = max((_reach(leak.changes[:-1], threshold) for leak in _single(leaks)), default=0)
    evidence = {
        "flips": len(results),
        "flips_by_seam": _count_by_seam(results),
        "leaking_flips": len(leaks),
        "leaking_flips_by_seam": _count_by_seam(leaks),
        "leaking_share": len(leaks) / len(results),
        "largest_change_nats": max((float(leak.changes[:-1].max()) for leak in leaks), default=0.0),
        "reach_tokens": reach,
        "examples": _examples(leaks, threshold),
        "noise_nats": noise_nats,
        "comparison": "bitwise" if noise_nats == 0 else f"changes above {threshold:.3g} nats",
    }
    if noise_nats > LARGEST_NOISE_NATS:
        sentence = (
            f"Two runs on the same text differ by {noise_nats:.3g} nats: a score that cannot be "
            "reproduced cannot be shown to be causal. Make the evaluator deterministic."
        )
        return Check("flip", FAIL, sentence, evidence)
    if leaks:
        far = f" and up to {reach:,} tokens back" if reach else ""
        sentence = (
            f"{len(leaks)} of {len(results)} replacements changed the distribution of an earlier "
            f"target, by up to {evidence['largest_change_nats']:.3g} nats{far}: scores depend on "
            "tokens that come later."
        )
        return Check("flip", FAIL, sentence, evidence)
    limit = "" if noise_nats == 0 else f" by more than {threshold:.3g} nats, this backend's noise"
    sentence = f"{_replacements(results)}: no earlier target's distribution changed{limit}."
    return Check("flip", PASS, sentence, evidence)


def check_self_influence(results: Sequence[FlipResult], noise_nats: float) -> Check:
    """PASS where no token changed its own distribution. evidence: flips, influenced_flips, …"""
    threshold = NOISE_MARGIN * noise_nats
    single = _single(results)
    influenced = [result for result in single if result.changes[-1] > threshold]
    evidence = {
        "flips": len(single),
        "influenced_flips": len(influenced),
        "influenced_flips_by_seam": _count_by_seam(influenced),
        "influenced_share": len(influenced) / len(single),
        "largest_change_nats": max((float(one.changes[-1]) for one in influenced), default=0.0),
        "noise_nats": noise_nats,
    }
    if influenced:
        sentence = (
            f"{len(influenced)} of {len(single)} tokens changed the very distribution that scores "
            f"them, by up to {evidence['largest_change_nats']:.3g} nats: the answer was used "
            "before it was predicted."
        )
        return Check("self_influence", FAIL, sentence, evidence)
    sentence = f"None of {len(single)} replaced tokens changed the distribution that scores it."
    return Check("self_influence", PASS, sentence, evidence)


def detectable_leak_rate(random_flips: int, confidence: float = 0.99) -> float | None:
    """Smallest share of leaking tokens that so many clean random flips rule out: a share r stays
    unseen with probability (1 - r)^flips. None without random flips."""
    if random_flips == 0:
        return None
    return 1.0 - (1.0 - confidence) ** (1.0 / random_flips)


def _single(results: Sequence[FlipResult]) -> list[FlipResult]:
    """Those that replaced one token and left the rest as it was."""
    return [result for result in results if result.flip.rest_seed is None]


def _replacements(results: Sequence[FlipResult]) -> str:
    single = len(_single(results))
    rest = len(results) - single
    times = "once" if rest == 1 else f"{rest} times"
    return f"{single} tokens were replaced one at a time" + (
        f", and {times} everything from a token on" if rest else ""
    )


def _reach(changes: np.ndarray, threshold: float) -> int:
    """How far back the earliest changed target is, tokens. changes: of targets 1 … t - 1."""
    return len(changes) - int(np.flatnonzero(changes > threshold)[0])


def _examples(leaks: Sequence[FlipResult], threshold: float) -> list[dict]:
    largest = sorted(leaks, key=lambda leak: float(leak.changes[:-1].max()), reverse=True)[:5]
    return [
        {
            "position": leak.flip.position,
            "seam": leak.flip.seam,
            "replacement": leak.flip.token,
            "earliest_changed_target": int(np.flatnonzero(leak.changes[:-1] > threshold)[0]) + 1,
            "changed_targets": int((leak.changes[:-1] > threshold).sum()),
            "largest_change_nats": float(leak.changes[:-1].max()),
        }
        for leak in largest
    ]


def _count_by_seam(results: Iterable[FlipResult]) -> dict[str, int]:
    return dict(Counter(result.flip.seam for result in results))
