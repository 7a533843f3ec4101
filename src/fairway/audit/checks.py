"""The checks that only compare numbers: normalization, attribution, budgets."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fairway.audit.bookkeeping import Evaluation
from fairway.audit.interface import FAIL, NOT_APPLICABLE, NOT_RUN, PASS, Check

NORMALIZATION_TOLERANCE_NATS = 1e-4
"""A float32 log-softmax over a few thousand entries errs by about 1e-6."""


def check_normalization(log_probs: Tensor, vocab_size: int) -> Check:
    """PASS where every row [n, V] is one distribution over the whole vocabulary: log Σ p = 0."""
    width = log_probs.shape[1]
    if width != vocab_size:
        sentence = (
            f"The distributions have {width:,} entries where the vocabulary has {vocab_size:,}: a "
            "score must come from one softmax over the whole vocabulary."
        )
        return Check("normalization", FAIL, sentence, {"width": width, "vocab_size": vocab_size})
    totals = torch.logsumexp(log_probs.double(), dim=1).abs()
    off = ~(totals <= NORMALIZATION_TOLERANCE_NATS)  # also catches NaN
    worst = float(torch.nan_to_num(totals, nan=math.inf).max())
    evidence = {
        "distributions": len(totals),
        "vocab_size": vocab_size,
        "off_distributions": int(off.sum()),
        "largest_error_nats": worst if math.isfinite(worst) else None,
        "tolerance_nats": NORMALIZATION_TOLERANCE_NATS,
    }
    if off.any():
        size = f"{worst:.3g} nats" if math.isfinite(worst) else "infinitely"
        sentence = (
            f"{int(off.sum()):,} of {len(totals):,} distributions do not sum to one (off by up to "
            f"{size}): the scores are not comparable."
        )
        return Check("normalization", FAIL, sentence, evidence)
    sentence = f"All {len(totals):,} distributions cover the {vocab_size:,} tokens and sum to one."
    return Check("normalization", PASS, sentence, evidence)


def check_attribution(evaluation: Evaluation | None) -> Check:
    """Split the gain of adaptation into targets inside and outside the fit that scored them.

    PASS where none is inside. As exact as the table, which says for each target whether the loss
    of the fit that scored it contained it.
    """
    if evaluation is None:
        reason = "No table of scored targets was given that tells which of them were fitted on."
        return Check("attribution", NOT_APPLICABLE, reason)
    inside, outside = evaluation.in_fit, evaluation.out_of_fit
    targets, total = inside.tokens + outside.tokens, inside.gain_nats + outside.gain_nats
    share = inside.tokens / targets if targets else 0.0
    evidence = {
        "targets": targets,
        "targets_in_fit": inside.tokens,
        "share_of_targets_in_fit": share,
        "gain_nats": total,
        "gain_in_fit_nats": inside.gain_nats,
        "gain_out_of_fit_nats": outside.gain_nats,
        "gain_nats_per_token": evaluation.gain_nats_per_token,
        "gain_in_fit_nats_per_token": inside.gain_nats_per_token,
        "gain_out_of_fit_nats_per_token": outside.gain_nats_per_token,
        "share_of_gain_in_fit": inside.gain_nats / total if total else None,
    }
    if inside.tokens:
        rest = outside.gain_nats_per_token
        others = "" if rest is None else f"; the other targets gain {rest:+.4f}"
        sentence = (
            f"{share:.1%} of the targets were in the loss of the fit that scored them; they gain "
            f"{inside.gain_nats_per_token:+.4f} nats a token{others}."
        )
        return Check("attribution", FAIL, sentence, evidence)
    sentence = (
        "No target was in the loss of the fit that scored it; adaptation gains "
        f"{evaluation.gain_nats_per_token:+.4f} nats a token."
    )
    return Check("attribution", PASS, sentence, evidence)


def check_budgets(used: Mapping[str, float | None], limits: Mapping[str, float]) -> Check:
    """PASS where nothing used exceeds its limit, NOT RUN where the use of a limit is unknown.

    used, limits: by name, such as `artifact_bytes`. The evidence gives both for each limit.
    """
    if not limits:
        return Check("budgets", NOT_APPLICABLE, "No limits were given.")
    unknown = sorted(name for name in limits if used.get(name) is None)
    evidence = {
        name: {"used": used.get(name), "limit": limit} for name, limit in sorted(limits.items())
    }
    over = [
        f"{name} {used[name]:,.0f} > {limit:,.0f}"
        for name, limit in sorted(limits.items())
        if name not in unknown and used[name] > limit
    ]
    if over:
        return Check("budgets", FAIL, f"Over budget: {'; '.join(over)}.", evidence)
    if unknown:
        return Check("budgets", NOT_RUN, f"Not measured: {', '.join(unknown)}.", evidence)
    shares = ", ".join(f"{name} {used[name] / limit:.1%}" for name, limit in sorted(limits.items()))
    return Check("budgets", PASS, f"Within budget: {shares} of the limit.", evidence)
