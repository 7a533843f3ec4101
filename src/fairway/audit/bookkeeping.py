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

from fairway.audit.interface import FAIL, NOT_APPLICABLE, PASS, UNDECIDED, Check
from fairway.audit.tally import SCORE_TOLERANCE_NATS, CoverageErrors, Tally
from fairway.errors import UserError
from fairway.files import read_batches
from fairway.phases import phase

MADE_BY = "the slot_eval stage"

ROUNDING_Z = 5.0
"""The mean of rounded scores is off by less than so many of its standard errors."""

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
    bytes: of all rows. split_bytes: of the split's text, as its tokens decode. original_bytes: of
    that text before it was normalized. None where one is not known.
    val_loss (nats a token), val_bpb, val_bpb_original (by original_bytes): as reported; None where
    they were not.
    """

    errors: CoverageErrors
    in_fit: Totals
    out_of_fit: Totals
    token_mismatches: int
    bytes: int
    split_bytes: int | None
    val_loss: float | None
    val_bpb: float | None
    original_bytes: int | None = None
    val_bpb_original: float | None = None

    @property
    def gain_nats_per_token(self) -> float:
        """Nats a token that adaptation saved, over all targets."""
        gained = self.in_fit.gain_nats + self.out_of_fit.gain_nats
        return gained / max(1, self.in_fit.tokens + self.out_of_fit.tokens)


@phase("read")
def read_evaluation(
    path: str | Path,
    tokens: np.ndarray,
    *,
    split_bytes: int | None,
    metrics: Mapping[str, float | None],
    original_bytes: int | None = None,
) -> Evaluation:
    """Add up tokens.parquet.

    tokens: integers [n + 1], the text that was scored. split_bytes: the bytes of that text, if
    known; original_bytes: those before normalization. metrics: the `val_loss`, `val_bpb` and
    `val_bpb_original` that were reported, as far as they were.
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
        val_loss=metrics.get("val_loss"),
        val_bpb=metrics.get("val_bpb"),
        original_bytes=original_bytes,
        val_bpb_original=metrics.get("val_bpb_original"),
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


def check_coverage(tallies: Mapping[str, Tally], evaluation: Evaluation | None) -> Check:
    """PASS where every target was scored exactly once, in order within its lane.

    tallies: of the scores that an evaluator returned, by the text's name; empty where it returned
    distributions only.
    """
    errors = {source: tally.coverage_errors() for source, tally in tallies.items()}
    if evaluation is not None:
        errors["whole evaluation"] = evaluation.errors
    if not errors:
        reason = (
            "The evaluator returned one distribution for each target and no order of scoring; it "
            "can return fairway.audit.Scores."
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
        effect = max(
            (counts.effect_nats_per_token for counts in errors.values()), key=abs, default=0.0
        )
        repeated = f" Repeats change the mean by {effect:+.3g} nats a token." if effect else ""
        sentence = f"Not one pass in the declared order: {', '.join(wrong)}.{repeated}"
        return Check("coverage", FAIL, sentence, evidence)
    scored = " and ".join(f"{counts.targets:,} ({source})" for source, counts in errors.items())
    marks = max(counts.missing_marks for counts in errors.values())
    but = f", but for {marks:,} marks of documents, which stand for no bytes" if marks else ""
    sentence = f"Every target was scored exactly once, in order: {scored}{but}."
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
    tallies: Mapping[str, Tally], evaluation: Evaluation | None, limit_nats: float
) -> Check:
    """PASS where each reported loss is -log p(x_t) of the distribution that made it, and where
    val_loss and val_bpb follow from the table, whose tokens and bytes are the split's.

    tallies: as in `check_coverage`. limit_nats: what rounding may be worth, nats a token.
    """
    evidence: dict[str, dict] = {}
    faults, rounded, good = [], [], []
    for source, tally in tallies.items():
        if not tally.compared:
            continue
        effect = tally.understated_nats / tally.compared
        rounding = ROUNDING_Z * math.sqrt(tally.rounding_variance) / tally.compared
        evidence[source] = {
            "scores": tally.compared,
            "off_scores": tally.off_scores,
            "largest_difference_nats": tally.largest_difference_nats,
            "understated_nats": tally.understated_nats,
            "understated_nats_per_token": effect,
            "tolerance_nats": SCORE_TOLERANCE_NATS,
        }
        if tally.off_scores or abs(effect) > limit_nats:
            is_rounding = not tally.off_scores and abs(effect) <= rounding
            (rounded if is_rounding else faults).append(
                f"{tally.off_scores:,} of {tally.compared:,} reported scores ({source}) are not "
                f"-log p of their token, together {tally.understated_nats:.4g} nats too low, "
                f"{effect:.3g} nats a token"
            )
        good.append(f"all {tally.compared:,} reported scores ({source}) are -log p of their token")
    if evaluation is not None:
        compared, wrong = _compare_totals(evaluation)
        evidence["whole evaluation"] = compared
        faults += wrong
        good.append("the table of scored targets gives the reported val_loss and val_bpb")
        good += _original_bytes(compared)
    if not evidence:
        reason = (
            "The evaluator returned losses only, so there is nothing to compare them with."
            if tallies
            else "The evaluator returned distributions only, so its scores follow from them."
        )
        return Check("reported_score", NOT_APPLICABLE, reason)
    if rounded:
        rounded[-1] += ", as rounding to half precision gives: report float32"
    sentence = "; ".join(faults or rounded or good)
    verdict = FAIL if faults else UNDECIDED if rounded else PASS
    return Check("reported_score", verdict, f"{sentence[0].upper()}{sentence[1:]}.", evidence)


def _original_bytes(compared: Mapping[str, float | None]) -> list[str]:
    """What the score would be by the bytes of the text before it was normalized."""
    if compared["original_bytes"] is None:
        return []
    return [
        f"the text had {compared['original_bytes']:,.0f} bytes before normalization where its "
        f"tokens count {compared['bytes']:,.0f}, so per original byte the score is "
        f"{compared['val_bpb_original']:.4f} ({compared['difference_bpb_original']:+.4f})"
    ]


def _compare_totals(evaluation: Evaluation) -> tuple[dict, list[str]]:
    nats = evaluation.in_fit.nats_after + evaluation.out_of_fit.nats_after
    loss = nats / max(1, evaluation.errors.scores)
    bits = nats / math.log(2)
    bpb = bits / max(1, evaluation.bytes)
    original = evaluation.original_bytes
    original_bpb = None if original is None else bits / max(1, original)
    faults = []
    if evaluation.token_mismatches:
        faults.append(f"{evaluation.token_mismatches:,} rows name another token than the text's")
    if evaluation.split_bytes is not None and evaluation.bytes > evaluation.split_bytes:
        # Fewer are no fault: a first token without predecessor is not scored.
        faults.append(
            f"the table counts {evaluation.bytes:,} bytes where the text has "
            f"{evaluation.split_bytes:,}"
        )
    for name, reported, summed in (
        ("val_loss", evaluation.val_loss, loss),
        ("val_bpb", evaluation.val_bpb, bpb),
        ("val_bpb_original", evaluation.val_bpb_original, original_bpb),
    ):
        if None not in (reported, summed) and not math.isclose(reported, summed, rel_tol=1e-6):
            faults.append(f"{name} is reported as {reported:.6f}, the table gives {summed:.6f}")
    evidence = {
        "val_loss": loss,
        "val_bpb": bpb,
        "val_bpb_original": original_bpb,
        "difference_bpb_original": None if original_bpb is None else original_bpb - bpb,
        "reported_val_loss": evaluation.val_loss,
        "reported_val_bpb": evaluation.val_bpb,
        "reported_val_bpb_original": evaluation.val_bpb_original,
        "bytes": evaluation.bytes,
        "split_bytes": evaluation.split_bytes,
        "original_bytes": original,
        "token_mismatches": evaluation.token_mismatches,
    }
    return evidence, faults
