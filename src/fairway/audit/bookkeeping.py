"""Was each target scored once, in order, and reported as -log p of its distribution?

Two sources are examined: the `Scores` that an evaluator returns for the excerpt, and the table of
the whole evaluation, tokens.parquet, with the totals that were reported from it. The table may have
60 million rows, so it is read in batches, and only counts and sums are kept.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from fairway.audit.interface import FAIL, NOT_APPLICABLE, PASS, Check, Scores
from fairway.errors import UserError
from fairway.files import read_batches

MADE_BY = "the slot_eval stage"
SCORE_TOLERANCE_NATS = 1e-4
"""This is a fiftieth of the smallest gain that the challenge counts, and far above float32
rounding."""

COLUMNS = {
    "position": "int64",
    "token": "int64",
    "window": "int64",
    "lane": "int64",
    "nll_before": "float64",
    "nll_after": "float64",
    "bytes": "int64",
    "in_own_loss": "bool",
}
"""The columns of tokens.parquet that the audit reads; the evaluation defines them."""


@dataclass(frozen=True)
class CoverageErrors:
    """How a list of scores departs from one score for each target, in order.

    targets, scores: how many there are; the other counts are zero where nothing is wrong.
    out_of_range: scores of no target. out_of_order: scores after a later target of the same lane.
    """

    targets: int
    scores: int
    missing: int
    repeated: int
    out_of_range: int
    out_of_order: int


@dataclass(frozen=True)
class Totals:
    """Sums over a group of targets, nats in float64."""

    tokens: int
    nats_before: float
    nats_after: float

    @property
    def gain_nats(self) -> float:
        """Nats that adaptation saved."""
        return self.nats_before - self.nats_after

    @property
    def gain_nats_per_token(self) -> float | None:
        """None where the group is empty."""
        return self.gain_nats / self.tokens if self.tokens else None


@dataclass(frozen=True)
class Evaluation:
    """A whole evaluation: the sums of its table of scored targets, and the reported totals.

    in_fit, out_of_fit: targets inside and outside the loss of the fit that scored them.
    token_mismatches: rows whose token is not the text's at that position.
    bytes: of all rows. split_bytes: of the split's text.
    val_loss (nats a token), val_bpb: as reported.
    """

    errors: CoverageErrors
    in_fit: Totals
    out_of_fit: Totals
    token_mismatches: int
    bytes: int
    split_bytes: int
    val_loss: float
    val_bpb: float

    @property
    def gain_nats_per_token(self) -> float:
        """Nats a token that adaptation saved, over all targets."""
        gained = self.in_fit.gain_nats + self.out_of_fit.gain_nats
        return gained / max(1, self.in_fit.tokens + self.out_of_fit.tokens)


def read_evaluation(
    path: str | Path, tokens: np.ndarray, *, split_bytes: int, metrics: Mapping[str, float]
) -> Evaluation:
    """Add up tokens.parquet.

    tokens: integers [n + 1], the text that was scored. split_bytes: the bytes of that text.
    metrics: the `val_loss` and `val_bpb` that were reported.
    Raises UserError where the table is damaged, lacks a column, or has losses that are not finite.
    """
    order = _Order(len(tokens) - 1)
    sums = {in_fit: np.zeros(3) for in_fit in (False, True)}
    token_mismatches = total_bytes = 0
    for table in read_batches(path, MADE_BY, COLUMNS):
        order.add(table)
        total_bytes += int(table["bytes"].sum())
        inside = table[table["position"].between(1, len(tokens) - 1)]
        token_mismatches += int((tokens[inside["position"]] != inside["token"]).sum())
        for in_fit in sums:
            group = table[table["in_own_loss"] == in_fit]
            sums[in_fit] += (len(group), group["nll_before"].sum(), group["nll_after"].sum())
    if not np.isfinite([*sums.values()]).all():
        raise UserError(
            f"{path} holds losses that are not finite: expected the file made by {MADE_BY}"
        )
    return Evaluation(
        errors=order.errors(),
        in_fit=Totals(int(sums[True][0]), *sums[True][1:].tolist()),
        out_of_fit=Totals(int(sums[False][0]), *sums[False][1:].tolist()),
        token_mismatches=token_mismatches,
        bytes=total_bytes,
        split_bytes=split_bytes,
        val_loss=metrics["val_loss"],
        val_bpb=metrics["val_bpb"],
    )


class _Order:
    """Counts coverage errors in a table that is sorted by position, batch after batch.

    The windows of a lane are scored one after another, so neither a lane's windows nor its
    positions may go backward.
    """

    def __init__(self, num_targets: int) -> None:
        self._times_scored = np.zeros(num_targets, np.uint8)
        self._scores = self._out_of_range = self._out_of_order = 0
        self._last: dict[int, tuple[int, int]] = {}

    def add(self, table: pd.DataFrame) -> None:
        positions = table["position"].to_numpy()
        is_target = (positions >= 1) & (positions <= len(self._times_scored))
        targets, times = np.unique(positions[is_target] - 1, return_counts=True)
        # Never once, once, or more often: a count that went on could wrap around to once.
        seen = self._times_scored[targets] + np.minimum(times, 2).astype(np.uint8)
        self._times_scored[targets] = np.minimum(seen, 2)
        self._scores += len(table)
        self._out_of_range += int((~is_target).sum())
        for lane, rows in table.groupby("lane"):
            first = self._last.get(lane, (-1, -1))
            window = np.concatenate([[first[0]], rows["window"].to_numpy()])
            position = np.concatenate([[first[1]], rows["position"].to_numpy()])
            self._out_of_order += int(((np.diff(window) < 0) | (np.diff(position) < 0)).sum())
            self._last[lane] = (int(window[-1]), int(position[-1]))

    def errors(self) -> CoverageErrors:
        return CoverageErrors(
            targets=len(self._times_scored),
            scores=self._scores,
            missing=int((self._times_scored == 0).sum()),
            repeated=int((self._times_scored > 1).sum()),
            out_of_range=self._out_of_range,
            out_of_order=self._out_of_order,
        )


def coverage_errors(scores: Scores, num_targets: int) -> CoverageErrors:
    """The coverage errors of an evaluator's own scores; targets are 1 … num_targets."""
    positions = scores.positions.detach().cpu().numpy().astype(np.int64)
    inside = (positions >= 1) & (positions <= num_targets)
    times = np.bincount(positions[inside], minlength=num_targets + 1)[1:]
    lanes = np.zeros(len(positions)) if scores.lanes is None else scores.lanes.cpu().numpy()
    out_of_order = 0
    for lane in np.unique(lanes):
        scored = positions[lanes == lane]
        out_of_order += int((scored[1:] < np.maximum.accumulate(scored)[:-1]).sum())
    return CoverageErrors(
        targets=num_targets,
        scores=len(positions),
        missing=int((times == 0).sum()),
        repeated=int((times > 1).sum()),
        out_of_range=int((~inside).sum()),
        out_of_order=out_of_order,
    )


def check_coverage(
    scores: Tensor | Scores, num_targets: int, evaluation: Evaluation | None
) -> Check:
    """PASS where every target was scored exactly once, in order within its lane."""
    errors: dict[str, CoverageErrors] = {}
    if isinstance(scores, Scores):
        errors["excerpt"] = coverage_errors(scores, num_targets)
    if evaluation is not None:
        errors["whole evaluation"] = evaluation.errors
    if not errors:
        reason = (
            "The evaluator returned one distribution for each target and no order of scoring; it "
            "can return fairway.audit.interface.Scores."
        )
        return Check("coverage", NOT_APPLICABLE, reason)
    evidence = {source: asdict(counts) for source, counts in errors.items()}
    wrong = [
        f"{counts[kind]:,} {words} ({source})"
        for source, counts in evidence.items()
        for kind, words in (
            ("missing", "targets never scored"),
            ("repeated", "targets scored more than once"),
            ("out_of_range", "scores of no target"),
            ("out_of_order", "scores out of order"),
        )
        if counts[kind]
    ]
    if wrong:
        sentence = f"Not one pass from left to right: {', '.join(wrong)}."
        return Check("coverage", FAIL, sentence, evidence)
    scored = " and ".join(f"{counts.targets:,} ({source})" for source, counts in errors.items())
    sentence = f"Every target was scored exactly once, in order: {scored}."
    return Check("coverage", PASS, sentence, evidence)


def wrong_row_count(log_probs: Tensor, num_targets: int) -> Check:
    """The coverage check of an evaluator that did not even return one row for each target."""
    rows = len(log_probs)
    sentence = (
        f"The evaluator returned {rows} distributions for {num_targets} targets: expected row i to "
        "be the distribution of tokens[i + 1]."
    )
    return Check("coverage", FAIL, sentence, {"targets": num_targets, "distributions": rows})


def check_reported_score(
    scores: Tensor | Scores, tokens: Tensor, evaluation: Evaluation | None
) -> Check:
    """PASS where each reported nll is -log p(x_t) of the distribution that was returned, and where
    val_loss and val_bpb follow from the table, whose tokens and bytes are the split's.

    tokens: int64 [n + 1], the excerpt.
    """
    evidence: dict[str, dict] = {}
    faults, good = [], []
    if isinstance(scores, Scores):
        compared = evidence["excerpt"] = _compare_scores(scores, tokens)
        count = compared["scores"]
        if compared["off_scores"]:
            faults.append(
                f"{compared['off_scores']:,} of {count:,} reported scores are not -log p of their "
                f"token, together {compared['understated_nats']:.4g} nats too low"
            )
        good.append(f"all {count:,} reported scores are -log p of their token")
    if evaluation is not None:
        evidence["whole evaluation"], wrong = _compare_totals(evaluation)
        faults += wrong
        good.append("the table of scored targets gives the reported val_loss and val_bpb")
    if not evidence:
        reason = "The evaluator returned distributions only, so its scores follow from them."
        return Check("reported_score", NOT_APPLICABLE, reason)
    sentence = "; ".join(faults or good)
    verdict = FAIL if faults else PASS
    return Check("reported_score", verdict, f"{sentence[0].upper()}{sentence[1:]}.", evidence)


def _compare_scores(scores: Scores, tokens: Tensor) -> dict:
    positions = scores.positions.detach().long().cpu()
    valid = (positions >= 1) & (positions < len(tokens))
    positions = positions[valid]
    log_probs = scores.log_probs.detach().cpu()
    shown = -log_probs[positions - 1, tokens.cpu()[positions]].double()
    reported = scores.reported_nll.detach().cpu().double()[valid]
    differences = (reported - shown).abs()
    finite = differences.isfinite()
    return {
        "scores": len(positions),
        "off_scores": int((~(differences <= SCORE_TOLERANCE_NATS)).sum()),
        "largest_difference_nats": float(differences[finite].max()) if finite.any() else None,
        "understated_nats": float((shown - reported)[finite].sum()),
        "tolerance_nats": SCORE_TOLERANCE_NATS,
    }


def _compare_totals(evaluation: Evaluation) -> tuple[dict, list[str]]:
    nats = evaluation.in_fit.nats_after + evaluation.out_of_fit.nats_after
    loss = nats / max(1, evaluation.errors.scores)
    bpb = nats / (math.log(2) * max(1, evaluation.bytes))
    faults = []
    if evaluation.token_mismatches:
        faults.append(f"{evaluation.token_mismatches:,} rows name another token than the text's")
    if evaluation.bytes > evaluation.split_bytes:
        # Fewer are no fault: a first token without predecessor is not scored.
        faults.append(
            f"the table counts {evaluation.bytes:,} bytes where the text has "
            f"{evaluation.split_bytes:,}"
        )
    for name, reported, summed in (
        ("val_loss", evaluation.val_loss, loss),
        ("val_bpb", evaluation.val_bpb, bpb),
    ):
        if not math.isclose(reported, summed, rel_tol=1e-6):
            faults.append(f"{name} is reported as {reported:.6f}, the table gives {summed:.6f}")
    evidence = {
        "val_loss": loss,
        "val_bpb": bpb,
        "reported_val_loss": evaluation.val_loss,
        "reported_val_bpb": evaluation.val_bpb,
        "bytes": evaluation.bytes,
        "split_bytes": evaluation.split_bytes,
        "token_mismatches": evaluation.token_mismatches,
    }
    return evidence, faults
