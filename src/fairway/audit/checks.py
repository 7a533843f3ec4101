"""The checks that only compare numbers: normalisation, attribution, budgets."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fairway.audit.bookkeeping import Evaluation
from fairway.audit.interface import FAIL, NOT_RUN, PASS, Check

NORMALISATION_TOLERANCE_NATS = 1e-4
"""Float32 log-softmax over a few thousand entries errs by about 1e-6."""


def check_normalisation(log_probs: Tensor, vocab_size: int) -> Check:
    """PASS where every row [n, V] is one distribution over the whole vocabulary: log Σ p = 0."""
    width = log_probs.shape[1]
    if width != vocab_size:
        sentence = (
            f"The distributions have {width:,} entries where the vocabulary has {vocab_size:,}: a "
            "score must come from one softmax over the whole vocabulary."
        )
        return Check("normalisation", FAIL, sentence, {"width": width, "vocab_size": vocab_size})
    totals = torch.logsumexp(log_probs.double(), dim=1).abs()
    off = ~(totals <= NORMALISATION_TOLERANCE_NATS)  # also catches NaN
    worst = float(torch.nan_to_num(totals, nan=math.inf).max())
    evidence = {
        "distributions": len(totals),
        "vocab_size": vocab_size,
        "off_distributions": int(off.sum()),
        "largest_error_nats": worst if math.isfinite(worst) else None,
        "tolerance_nats": NORMALISATION_TOLERANCE_NATS,
    }
    if off.any():
        size = f"{worst:.3g} nats" if math.isfinite(worst) else "infinitely"
        sentence = (
            f"{int(off.sum()):,} of {len(totals):,} distributions do not sum to one (off by up to "
            f"{size}): the scores are not comparable."
        )
        return Check("normalisation", FAIL, sentence, evidence)
    sentence = f"All {len(totals):,} distributions cover the {vocab_size:,} tokens and sum to one."
    return Check("normalisation", PASS, sentence, evidence)


def check_attribution(evaluation: Evaluation | None) -> Check:
    """Split the gain of adaptation into targets inside and outside their own delta's loss.

    PASS where none is inside. Exact where the table is: it says which targets each delta was
    fitted on.
    """
    if evaluation is None:
        reason = "No table of scored targets says which of them their own delta was fitted on."
        return Check("attribution", NOT_RUN, reason)
    own, elsewhere = evaluation.own, evaluation.elsewhere
    targets, total = own.tokens + elsewhere.tokens, own.gain_nats + elsewhere.gain_nats
    share = own.tokens / targets if targets else 0.0
    evidence = {
        "targets": targets,
        "targets_in_own_loss": own.tokens,
        "share_of_targets_in_own_loss": share,
        "gain_nats": total,
        "gain_in_own_loss_nats": own.gain_nats,
        "gain_elsewhere_nats": elsewhere.gain_nats,
        "gain_nats_per_token": evaluation.gain_nats_per_token,
        "gain_in_own_loss_nats_per_token": own.gain_nats_per_token,
        "gain_elsewhere_nats_per_token": elsewhere.gain_nats_per_token,
        "share_of_gain_in_own_loss": own.gain_nats / total if total else None,
    }
    if own.tokens:
        rest = elsewhere.gain_nats_per_token
        others = "" if rest is None else f"; the other targets gain {rest:+.4f}"
        sentence = (
            f"{share:.1%} of the targets were in the loss of the delta that scored them; they "
            f"gain {own.gain_nats_per_token:+.4f} nats a token{others}."
        )
        return Check("attribution", FAIL, sentence, evidence)
    sentence = (
        "No target was in the loss of the delta that scored it; adaptation gains "
        f"{evaluation.gain_nats_per_token:+.4f} nats a token."
    )
    return Check("attribution", PASS, sentence, evidence)


def check_budgets(used: Mapping[str, float | None], limits: Mapping[str, float]) -> Check:
    """PASS where nothing used exceeds its limit. used, limits: by name, such as `artifact_bytes`;
    the evidence also gives each share. A limit whose use is unknown makes the check NOT RUN."""
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
    if unknown or not limits:
        reason = f"Not measured: {', '.join(unknown)}." if unknown else "No limits were given."
        return Check("budgets", NOT_RUN, reason, evidence)
    shares = ", ".join(f"{name} {used[name] / limit:.1%}" for name, limit in sorted(limits.items()))
    return Check("budgets", PASS, f"Within budget: {shares} of the limit.", evidence)
