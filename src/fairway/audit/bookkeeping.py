"""Whether the account adds up: each target scored once, in order, at the price of its distribution.

Two accounts are examined: the one that an evaluator returns with the excerpt (`Scores`), and the
table of the whole evaluation, tokens.parquet, with the totals that were reported from it. The
table may have 60 million rows, so it is read in batches and only counts and sums are kept.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as parquet
from torch import Tensor

from fairway.audit.interface import FAIL, NOT_RUN, PASS, Check, Scores
from fairway.errors import UserError

CLAIM_TOLERANCE_NATS = 1e-4
"""A fiftieth of the smallest gain that the challenge counts, and far above float32 rounding."""

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


@dataclass(frozen=True)
class Faults:
    """What is wrong with a list of scored targets; all zero but the first two where nothing is.

    out_of_order: scored after a later target of the same stream. foreign: scores of no target.
    """

    targets: int
    scores: int
    missing: int
    repeated: int
    foreign: int
    out_of_order: int


@dataclass(frozen=True)
class Sums:
    """Totals over a group of targets, nats in float64."""

    tokens: int
    nats_before: float
    nats_after: float

    @property
    def gain_nats(self) -> float:
        """Nats that adaptation saved."""
        return self.nats_before - self.nats_after

    @property
    def gain_nats_per_token(self) -> float | None:
        return self.gain_nats / self.tokens if self.tokens else None


@dataclass(frozen=True)
class Evaluation:
    """A whole evaluation: what its table of scored targets adds up to, and what was reported.

    own, elsewhere: targets inside and outside the loss of the delta that scored them.
    foreign_tokens: rows whose token is not the stream's at that position. bytes: of all rows;
    split_bytes: of the split's text. val_loss (nats a token) and val_bpb: as reported.
    """

    faults: Faults
    own: Sums
    elsewhere: Sums
    foreign_tokens: int
    bytes: int
    split_bytes: int
    val_loss: float
    val_bpb: float

    @property
    def gain_nats_per_token(self) -> float:
        gained = self.own.gain_nats + self.elsewhere.gain_nats
        return gained / max(1, self.own.tokens + self.elsewhere.tokens)


def read_evaluation(
    path: str | Path, tokens: np.ndarray, *, split_bytes: int, metrics: Mapping[str, float]
) -> Evaluation:
    """Add up tokens.parquet. tokens: integers [n + 1], the stream that was scored; metrics: the
    val_loss and val_bpb that were reported. Raises UserError where a column is missing."""
    file = parquet.ParquetFile(path)
    lacking = sorted(set(COLUMNS) - set(file.schema_arrow.names))
    if lacking:
        raise UserError(f"{path} lacks the columns {', '.join(lacking)}: rerun the slot_eval stage")
    order = _Order(len(tokens) - 1)
    sums = {own: np.zeros(3) for own in (False, True)}
    foreign_tokens = total_bytes = 0
    for batch in file.iter_batches(batch_size=1 << 20, columns=list(COLUMNS)):
        table = batch.to_pandas().astype(COLUMNS)
        order.add(table)
        total_bytes += int(table["bytes"].sum())
        inside = table[table["position"].between(1, len(tokens) - 1)]
        foreign_tokens += int((tokens[inside["position"]] != inside["token"]).sum())
        for own in sums:
            group = table[table["in_own_loss"] == own]
            sums[own] += (len(group), group["nll_before"].sum(), group["nll_after"].sum())
    return Evaluation(
        faults=order.faults(),
        own=Sums(int(sums[True][0]), *sums[True][1:].tolist()),
        elsewhere=Sums(int(sums[False][0]), *sums[False][1:].tolist()),
        foreign_tokens=foreign_tokens,
        bytes=total_bytes,
        split_bytes=split_bytes,
        val_loss=metrics["val_loss"],
        val_bpb=metrics["val_bpb"],
    )


class _Order:
    """Counts faults in the rows of a table that is sorted by position, batch after batch.

    The windows of a lane are scored one after another, so in each lane the windows must not fall
    while the positions rise.
    """

    def __init__(self, num_targets: int) -> None:
        self._times_scored = np.zeros(num_targets, np.uint8)
        self._scores = self._foreign = self._out_of_order = 0
        self._last: dict[int, tuple[int, int]] = {}

    def add(self, table: pd.DataFrame) -> None:
        positions = table["position"].to_numpy()
        is_target = (positions >= 1) & (positions <= len(self._times_scored))
        targets, times = np.unique(positions[is_target] - 1, return_counts=True)
        # Never once, once, or more often: a count that went on could wrap around to once.
        seen = self._times_scored[targets] + np.minimum(times, 2).astype(np.uint8)
        self._times_scored[targets] = np.minimum(seen, 2)
        self._scores += len(table)
        self._foreign += int((~is_target).sum())
        for lane, rows in table.groupby("lane"):
            first = self._last.get(lane, (-1, -1))
            window = np.concatenate([[first[0]], rows["window"].to_numpy()])
            position = np.concatenate([[first[1]], rows["position"].to_numpy()])
            self._out_of_order += int(((np.diff(window) < 0) | (np.diff(position) < 0)).sum())
            self._last[lane] = (int(window[-1]), int(position[-1]))

    def faults(self) -> Faults:
        return Faults(
            targets=len(self._times_scored),
            scores=self._scores,
            missing=int((self._times_scored == 0).sum()),
            repeated=int((self._times_scored > 1).sum()),
            foreign=self._foreign,
            out_of_order=self._out_of_order,
        )


def faults_of_scores(scores: Scores, num_targets: int) -> Faults:
    """The faults of an evaluator's own account; targets are 1 … num_targets."""
    positions = scores.positions.detach().cpu().numpy().astype(np.int64)
    inside = (positions >= 1) & (positions <= num_targets)
    times = np.bincount(positions[inside], minlength=num_targets + 1)[1:]
    streams = np.zeros(len(positions)) if scores.streams is None else scores.streams.cpu().numpy()
    out_of_order = 0
    for stream in np.unique(streams):
        own = positions[streams == stream]
        out_of_order += int((own[1:] < np.maximum.accumulate(own)[:-1]).sum())
    return Faults(
        targets=num_targets,
        scores=len(positions),
        missing=int((times == 0).sum()),
        repeated=int((times > 1).sum()),
        foreign=int((~inside).sum()),
        out_of_order=out_of_order,
    )


def check_coverage(
    scores: Tensor | Scores, num_targets: int, evaluation: Evaluation | None
) -> Check:
    """PASS where every target was scored exactly once, in order within its stream."""
    faults: dict[str, Faults] = {}
    if isinstance(scores, Scores):
        faults["excerpt"] = faults_of_scores(scores, num_targets)
    if evaluation is not None:
        faults["whole evaluation"] = evaluation.faults
    if not faults:
        reason = (
            "The evaluator returned distributions only; return fairway.audit.interface.Scores to "
            "show which targets were scored, in which order."
        )
        return Check("coverage", NOT_RUN, reason)
    evidence = {place: asdict(count) for place, count in faults.items()}
    wrong = [
        f"{count[kind]:,} {words} ({place})"
        for place, count in evidence.items()
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
        return Check("coverage", FAIL, sentence, evidence)
    where = " and ".join(f"{count.targets:,} ({place})" for place, count in faults.items())
    sentence = f"Every target was scored exactly once, in order: {where}."
    return Check("coverage", PASS, sentence, evidence)


def wrong_row_count(log_probs: Tensor, num_targets: int) -> Check:
    """The coverage check of an evaluator that did not even return one row for each target."""
    rows = len(log_probs)
    sentence = (
        f"The evaluator returned {rows} distributions for {num_targets} targets: expected row i to "
        "be the distribution of tokens[i + 1]."
    )
    return Check("coverage", FAIL, sentence, {"targets": num_targets, "distributions": rows})


def check_claimed_score(
    scores: Tensor | Scores, tokens: Tensor, evaluation: Evaluation | None
) -> Check:
    """PASS where each claimed nll is -log p(x_t) of the distribution shown, and the reported
    val_loss and val_bpb are those of the table, whose tokens and bytes are the split's.

    tokens: int64 [n + 1], the excerpt.
    """
    evidence: dict[str, dict] = {}
    faults, good = [], []
    if isinstance(scores, Scores):
        evidence["excerpt"] = _compare_claims(scores, tokens)
        off, count = evidence["excerpt"]["off_scores"], evidence["excerpt"]["scores"]
        if off:
            faults.append(
                f"{off:,} of {count:,} claimed scores are not -log p of their token, together "
                f"{evidence['excerpt']['understated_nats']:.4g} nats too low"
            )
        good.append(f"all {count:,} claimed scores are -log p of their token")
    if evaluation is not None:
        evidence["whole evaluation"], wrong = _compare_totals(evaluation)
        faults += wrong
        good.append("the table of scored targets gives the reported val_loss and val_bpb")
    if not evidence:
        reason = "The evaluator returned distributions only, so its scores follow from them."
        return Check("claimed_score", NOT_RUN, reason)
    sentence = "; ".join(faults or good)
    verdict = FAIL if faults else PASS
    return Check("claimed_score", verdict, f"{sentence[0].upper()}{sentence[1:]}.", evidence)


def _compare_claims(scores: Scores, tokens: Tensor) -> dict:
    positions = scores.positions.detach().long().cpu()
    valid = (positions >= 1) & (positions < len(tokens))
    positions = positions[valid]
    log_probs = scores.log_probs.detach().cpu()
    shown = -log_probs[positions - 1, tokens.cpu()[positions]].double()
    claimed = scores.claimed_nll.detach().cpu().double()[valid]
    differences = (claimed - shown).abs()
    finite = differences.isfinite()
    return {
        "scores": len(positions),
        "off_scores": int((~(differences <= CLAIM_TOLERANCE_NATS)).sum()),
        "largest_difference_nats": float(differences[finite].max()) if finite.any() else None,
        "understated_nats": float((shown - claimed)[finite].sum()),
        "tolerance_nats": CLAIM_TOLERANCE_NATS,
    }


def _compare_totals(evaluation: Evaluation) -> tuple[dict, list[str]]:
    nats = evaluation.own.nats_after + evaluation.elsewhere.nats_after
    loss = nats / max(1, evaluation.faults.scores)
    bpb = nats / (math.log(2) * max(1, evaluation.bytes))
    faults = []
    if evaluation.foreign_tokens:
        faults.append(f"{evaluation.foreign_tokens:,} rows name another token than the text's")
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
        "foreign_tokens": evaluation.foreign_tokens,
    }
    return evidence, faults
