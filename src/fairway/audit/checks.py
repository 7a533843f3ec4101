"""The checks that need no second run: arithmetic, normalisation, coverage, attribution, budgets."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fairway.audit.contract import FAIL, NOT_RUN, PASS, Check, Scores

NORMALISATION_TOLERANCE_NATS = 1e-4
"""Float32 log-softmax over a few thousand entries errs by about 1e-6."""

CLAIM_TOLERANCE_NATS = 1e-4
"""A fiftieth of the smallest gain that the challenge counts, and far above float32 rounding."""


def check_normalisation(log_probs: Tensor, vocab_size: int) -> Check:
    """PASS where every row [n, V] is one distribution over the whole vocabulary: log Σ p = 0."""
    width = log_probs.shape[1]
    if width != vocab_size:
        sentence = (
            f"The distributions have {width} entries where the vocabulary has {vocab_size}: a "
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
            f"{int(off.sum())} of {len(totals)} distributions do not sum to one (off by up to "
            f"{size}): the scores are not comparable."
        )
        return Check("normalisation", FAIL, sentence, evidence)
    sentence = f"All {len(totals)} distributions cover the {vocab_size} tokens and sum to one."
    return Check("normalisation", PASS, sentence, evidence)


def check_claimed_score(scores: Tensor | Scores, tokens: Tensor) -> Check:
    """PASS where each claimed nll is -log p(x_t) of the distribution shown; tokens: [n + 1]."""
    if not isinstance(scores, Scores):
        reason = "The evaluator returned distributions only, so its scores follow from them."
        return Check("claimed_score", NOT_RUN, reason)
    positions = scores.positions.long().cpu()
    valid = (positions >= 1) & (positions < len(tokens))
    positions = positions[valid]
    shown = -scores.log_probs.cpu()[positions - 1, tokens.cpu()[positions]].double()
    claimed = scores.claimed_nll.detach().cpu().double()[valid]
    differences = (claimed - shown).abs()
    off = ~(differences <= CLAIM_TOLERANCE_NATS)
    finite = differences[differences.isfinite()]
    evidence = {
        "scores": len(positions),
        "off_scores": int(off.sum()),
        "largest_difference_nats": float(finite.max()) if len(finite) else None,
        "understated_nats": float((shown - claimed)[differences.isfinite()].sum()),
        "tolerance_nats": CLAIM_TOLERANCE_NATS,
    }
    if off.any():
        sentence = (
            f"{int(off.sum())} of {len(positions)} claimed scores are not -log p of the token "
            f"under the distribution shown; together they understate the loss by "
            f"{evidence['understated_nats']:.4g} nats."
        )
        return Check("claimed_score", FAIL, sentence, evidence)
    sentence = f"All {len(positions)} claimed scores are -log p of their token."
    return Check("claimed_score", PASS, sentence, evidence)


def coverage_faults(
    positions: np.ndarray, streams: np.ndarray | None, num_targets: int
) -> dict[str, int]:
    """Count what is wrong with a list of scored targets.

    positions: int64 [m] in the order of scoring, targets are 1 … num_targets; streams: [m].
    Returns the numbers of targets, scores, missing, repeated, foreign (no target at all) and
    out_of_order (scored after a later target of the same stream).
    """
    positions = np.asarray(positions, np.int64)
    inside = (positions >= 1) & (positions <= num_targets)
    times = np.bincount(positions[inside], minlength=num_targets + 1)[1:]
    streams = np.zeros(len(positions), np.int64) if streams is None else np.asarray(streams)
    out_of_order = 0
    for stream in np.unique(streams):
        own = positions[streams == stream]
        out_of_order += int((own[1:] <= np.maximum.accumulate(own)[:-1]).sum())
    return {
        "targets": num_targets,
        "scores": len(positions),
        "missing": int((times == 0).sum()),
        "repeated": int((times > 1).sum()),
        "foreign": int((~inside).sum()),
        "out_of_order": out_of_order,
    }


def check_coverage(
    scores: Tensor | Scores, num_targets: int, table: pd.DataFrame | None, table_targets: int | None
) -> Check:
    """PASS where every target was scored exactly once, in order within its stream.

    scores: the evaluator's answer to the excerpt, with an account only as `Scores`.
    table: the whole evaluation's tokens.parquet (position, lane, window); it should hold
        `table_targets` targets.
    """
    faults = {}
    if isinstance(scores, Scores):
        streams = None if scores.streams is None else scores.streams.cpu().numpy()
        faults["excerpt"] = coverage_faults(scores.positions.cpu().numpy(), streams, num_targets)
    if table is not None:
        assert table_targets is not None
        ordered = table.sort_values(["lane", "window"], kind="stable")
        faults["whole evaluation"] = coverage_faults(
            ordered["position"].to_numpy(), ordered["lane"].to_numpy(), table_targets
        )
    if not faults:
        reason = (
            "The evaluator returned distributions only; return fairway.audit.contract.Scores to "
            "show which targets were scored, in which order."
        )
        return Check("coverage", NOT_RUN, reason)
    wrong = [
        f"{count[kind]} {words}"
        for count in faults.values()
        for kind, words in (
            ("missing", "targets never scored"),
            ("repeated", "targets scored more than once"),
            ("foreign", "scores of no target"),
            ("out_of_order", "scores out of order"),
        )
        if count[kind]
    ]
    if wrong:
        sentence = f"Not one pass from left to right: {', '.join(wrong)}."
        return Check("coverage", FAIL, sentence, faults)
    where = " and ".join(f"{count['targets']:,} ({name})" for name, count in faults.items())
    sentence = f"Every target was scored exactly once, in order: {where}."
    return Check("coverage", PASS, sentence, faults)


def wrong_row_count(log_probs: Tensor, num_targets: int) -> Check:
    """The coverage check of an evaluator that did not even return one row for each target."""
    rows = len(log_probs)
    sentence = (
        f"The evaluator returned {rows} distributions for {num_targets} targets: expected row i to "
        "be the distribution of tokens[i + 1]."
    )
    return Check("coverage", FAIL, sentence, {"targets": num_targets, "distributions": rows})


def check_attribution(table: pd.DataFrame | None) -> Check:
    """Split the gain of adaptation into targets inside and outside their own delta's loss.

    table: columns nll_before, nll_after (nats) and in_own_loss (bool), one row a scored target.
    """
    if table is None:
        reason = "No table of scored tokens says which targets their own delta was fitted on."
        return Check("attribution", NOT_RUN, reason)
    gain = table["nll_before"].to_numpy() - table["nll_after"].to_numpy()
    own = table["in_own_loss"].to_numpy(dtype=bool)
    total = float(gain.sum())
    evidence = {
        "targets": len(gain),
        "targets_in_own_loss": int(own.sum()),
        "share_of_targets_in_own_loss": float(own.mean()) if len(own) else 0.0,
        "gain_nats": total,
        "gain_in_own_loss_nats": float(gain[own].sum()),
        "gain_elsewhere_nats": float(gain[~own].sum()),
        "gain_nats_per_token": float(gain.mean()) if len(gain) else 0.0,
        "gain_in_own_loss_nats_per_token": float(gain[own].mean()) if own.any() else None,
        "gain_elsewhere_nats_per_token": float(gain[~own].mean()) if (~own).any() else None,
        "share_of_gain_in_own_loss": float(gain[own].sum()) / total if total else None,
    }
    if own.any():
        elsewhere = evidence["gain_elsewhere_nats_per_token"]
        rest = "" if elsewhere is None else f"; the other targets gain {elsewhere:+.4f}"
        sentence = (
            f"{own.mean():.1%} of the targets were in the loss of the delta that scored them; they "
            f"gain {evidence['gain_in_own_loss_nats_per_token']:+.4f} nats a token{rest}."
        )
        return Check("attribution", FAIL, sentence, evidence)
    sentence = (
        "No target was in the loss of the delta that scored it; adaptation gains "
        f"{evidence['gain_nats_per_token']:+.4f} nats a token."
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
