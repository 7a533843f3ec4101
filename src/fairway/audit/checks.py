"""The checks that only compare numbers: normalization, attribution, budgets."""

import math
from collections.abc import Mapping

from torch import Tensor

from fairway.audit.bookkeeping import Evaluation
from fairway.audit.interface import FAIL, NOT_APPLICABLE, NOT_RUN, PASS, UNDECIDED, Check
from fairway.audit.tally import SCORE_TOLERANCE_NATS, Tally


def check_width(log_probs: Tensor, vocab_size: int) -> Check | None:
    """The normalization check of distributions [n, V] over another vocabulary; None where fine."""
    width = log_probs.shape[1]
    if width == vocab_size:
        return None
    sentence = (
        f"The distributions have {width:,} entries where the vocabulary has {vocab_size:,}: a "
        "score must come from one softmax over the whole vocabulary."
    )
    return Check("normalization", FAIL, sentence, {"width": width, "vocab_size": vocab_size})


def check_normalization(tallies: Mapping[str, Tally], vocab_size: int, limit_nats: float) -> Check:
    """PASS where every distribution covers the whole vocabulary and sums to one: log Σ p = 0.

    tallies: by the text's name. limit_nats: what rounding may be worth, nats a token. FAIL where
    sums are off by more than the rounding of their float type, UNDECIDED where that rounding could
    be worth more than the limit.
    """
    evidence = {
        source: {
            "distributions": tally.distributions,
            "vocab_size": vocab_size,
            "off_distributions": tally.off_distributions,
            "largest_error_nats": _finite(tally.largest_sum_error_nats),
            "worth_nats_per_token": _finite(_sum_error(tally)),
            "tolerance_nats": SCORE_TOLERANCE_NATS,
        }
        for source, tally in tallies.items()
    }
    worst = max(tallies.values(), key=_sum_error)
    count, error = worst.distributions, _sum_error(worst)
    size = f"{worst.largest_sum_error_nats:.3g} nats" if math.isfinite(error) else "infinitely"
    if worst.off_distributions and error > limit_nats:
        off = (
            f"{worst.off_distributions:,} of {count:,} distributions do not sum to one (off by up "
            f"to {size}, on average by {error:.3g} nats)"
        )
        if worst.beyond_rounding:
            verdict, sentence = FAIL, f"{off}: the scores are not comparable."
        else:
            verdict = UNDECIDED
            sentence = f"{off}, as rounding to half precision does: give float32 distributions."
        return Check("normalization", verdict, sentence, evidence)
    covered = " and ".join(f"{one.distributions:,} ({name})" for name, one in tallies.items())
    rounding = (
        f"; rounding of up to {size} is worth {error:.2g} nats a token"
        if worst.off_distributions
        else ""
    )
    sentence = (
        f"All distributions cover the {vocab_size:,} tokens and sum to one: {covered}{rounding}."
    )
    return Check("normalization", PASS, sentence, evidence)


def _sum_error(tally: Tally) -> float:
    """Mean |log Σ p|, nats: what the sums can be worth to a score."""
    return tally.sum_error_nats / max(1, tally.distributions)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
