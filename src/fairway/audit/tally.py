"""What is counted of an evaluator's scores, piece by piece, so that no distribution is kept.

A `Tally` takes the excerpt's scores at once, or those of a whole text as they are made.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fairway.audit.interface import Answer, Scores

SCORE_TOLERANCE_NATS = 1e-4
"""This is a fiftieth of the smallest gain that the challenge counts, and far above float32
rounding."""


@dataclass(frozen=True)
class CoverageErrors:
    """How a list of scores departs from one score for each target, in order.

    targets, scores: how many there are; the other counts are zero where nothing is wrong.
    missing: targets without a score, but for document marks that an evaluator with a declared order
    leaves out; missing_marks counts those.
    out_of_range: scores of no target. out_of_order: scores after a later target of the same lane.
    effect_nats_per_token: mean of all scores minus the mean of each target's first one.
    """

    targets: int
    scores: int
    missing: int
    repeated: int
    out_of_range: int
    out_of_order: int
    missing_marks: int = 0
    effect_nats_per_token: float = 0.0


@dataclass
class Tally:
    """Counts of a text of `num_targets` targets.

    ranks: int64 [n], of the declared order; None: the text's. marks: indices of targets that need
    no score, since they only say where a document starts, which a declared order may use anyway.
    A target that is scored twice is a fault of coverage, and counts with its first score.
    """

    num_targets: int
    ranks: np.ndarray | None = None
    marks: np.ndarray | None = None
    scores: int = 0
    out_of_range: int = 0
    out_of_order: int = 0
    nats: float = 0.0
    first_nats: float = 0.0
    compared: int = 0
    off_scores: int = 0
    understated_nats: float = 0.0
    largest_difference_nats: float = 0.0
    rounding_variance: float = 0.0
    distributions: int = 0
    off_distributions: int = 0
    beyond_rounding: int = 0
    sum_error_nats: float = 0.0
    largest_sum_error_nats: float = 0.0
    _times: np.ndarray = field(init=False)
    _last: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._times = np.zeros(self.num_targets, np.uint8)

    def add_scores(
        self, positions: Tensor, reported: Tensor, own_nll: Tensor | None, lanes: Tensor | None
    ) -> None:
        """positions int64 [m], reported float [m], own_nll float64 [m] or None, lanes [m] or None;
        on the CPU, in the order in which they were fixed."""
        targets = positions.numpy()
        inside = (targets >= 1) & (targets <= self.num_targets)
        self.scores += len(targets)
        self.out_of_range += int((~inside).sum())
        nats = reported.double().numpy()
        indices = targets[inside] - 1
        unique, first, times = np.unique(indices, return_index=True, return_counts=True)
        is_new = self._times[unique] == 0
        self.nats += float(nats[inside].sum())
        self.first_nats += float(nats[inside][first[is_new]].sum())
        # Never once, once, or more often: a count that went on could wrap around to once.
        seen = self._times[unique] + np.minimum(times, 2).astype(np.uint8)
        self._times[unique] = np.minimum(seen, 2)
        self._add_order(indices, None if lanes is None else lanes.numpy()[inside])
        if own_nll is not None:
            self._compare(reported, own_nll, torch.from_numpy(inside))

    def _add_order(self, indices: np.ndarray, lanes: np.ndarray | None) -> None:
        ranks = indices if self.ranks is None else self.ranks[indices]
        for lane in np.unique(lanes) if lanes is not None else (0,):
            scored = ranks if lanes is None else ranks[lanes == lane]
            if len(scored):
                before = np.concatenate([[self._last.get(int(lane), -1)], scored])
                highest = np.maximum.accumulate(before)
                self.out_of_order += int((scored < highest[:-1]).sum())
                self._last[int(lane)] = int(highest[-1])

    def _compare(self, reported: Tensor, own_nll: Tensor, inside: Tensor) -> None:
        rounding = torch.finfo(reported.dtype).eps if reported.is_floating_point() else 0.0
        said, shown = reported.double()[inside], own_nll[inside]
        difference = (said - shown).abs()
        rounded = (rounding if rounding > 1e-6 else 0.0) * shown.abs()
        allowed = SCORE_TOLERANCE_NATS + rounded
        finite = difference.isfinite()
        self.rounding_variance += float((rounded[finite] ** 2).sum())
        self.compared += len(said)
        self.off_scores += int((~(difference <= allowed)).sum())
        self.understated_nats += float((shown - said)[finite].sum())
        if finite.any():
            largest = float(difference[finite].max())
            self.largest_difference_nats = max(self.largest_difference_nats, largest)

    def add_distributions(self, log_probs: Tensor) -> None:
        """log_probs: float [m, V]."""
        rows = log_probs.double()
        totals = torch.logsumexp(rows, dim=1)
        eps = torch.finfo(log_probs.dtype).eps
        entropy = -(rows.exp() * rows.clamp(min=-1e3)).sum(dim=1)
        # Each log p is off by up to eps |log p|, and their mean under p by eps times the entropy.
        allowed = SCORE_TOLERANCE_NATS + (2 * eps * entropy if eps > 1e-6 else 0.0)
        self.distributions += len(totals)
        self.off_distributions += int((~(totals.abs() <= SCORE_TOLERANCE_NATS)).sum())
        self.beyond_rounding += int((~(totals.abs() <= allowed)).sum())
        sizes = torch.nan_to_num(totals.abs(), nan=math.inf)
        self.sum_error_nats += float(sizes.sum())
        if len(sizes):
            self.largest_sum_error_nats = max(self.largest_sum_error_nats, float(sizes.max()))

    def coverage_errors(self) -> CoverageErrors:
        scored = int((self._times > 0).sum())
        unscored_marks = 0 if self.marks is None else int((self._times[self.marks] == 0).sum())
        inside = self.scores - self.out_of_range
        effect = self.nats / inside - self.first_nats / scored if scored else 0.0
        return CoverageErrors(
            targets=self.num_targets,
            scores=self.scores,
            missing=self.num_targets - scored - unscored_marks,
            missing_marks=unscored_marks,
            repeated=int((self._times > 1).sum()),
            out_of_range=self.out_of_range,
            out_of_order=self.out_of_order,
            effect_nats_per_token=effect,
        )


def tally_of(answer: Answer, tokens: Tensor, bos_id: int) -> Tally:
    """The counts of one answer to tokens, int64 [n + 1]."""
    tally = Tally(len(tokens) - 1)
    if answer.is_reordered:
        tally.ranks, tally.marks = answer.order.numpy(), _marks(tokens, bos_id)
    if answer.has_distributions:
        tally.add_distributions(answer.rows)
    scores = answer.scores
    if scores is not None:
        own = _own_nll(scores, answer, tokens) if answer.has_distributions else None
        tally.add_scores(scores.positions, scores.reported_nll, own, scores.lanes)
    return tally


def _marks(tokens: Tensor, bos_id: int) -> np.ndarray:
    return (tokens[1:] == bos_id).nonzero().flatten().cpu().numpy()


def _own_nll(scores: Scores, answer: Answer, tokens: Tensor) -> Tensor:
    """float64 [m]: what each score should be. A target that is scored twice has one row: its other
    scores stand for themselves."""
    if scores.own_nll is not None:
        return scores.own_nll.double()
    targets = scores.positions.clamp(1, len(tokens) - 1) - 1
    shown, said = answer.nll[targets], scores.reported_nll.double()
    best = torch.full((len(tokens) - 1,), math.inf, dtype=torch.float64)
    difference = torch.nan_to_num((said - shown).abs(), nan=math.inf)
    best.scatter_reduce_(0, targets, difference, "amin")
    times = torch.bincount(targets, minlength=len(tokens) - 1)
    is_other = (times[targets] > 1) & (difference > best[targets])
    return torch.where(is_other, said, shown)


def tally_whole_text(
    stream: Callable[[Tensor, Callable], None], tokens: Tensor, bos_id: int, in_recorded_order: bool
) -> Tally:
    """The counts of a whole text, whose scores `stream` hands over as they are made."""
    marks = _marks(tokens, bos_id) if in_recorded_order else None
    tally = Tally(len(tokens) - 1, marks=marks)

    def add(recorded) -> None:
        lanes = torch.full((len(recorded.positions),), recorded.lane)
        tally.add_scores(recorded.positions, recorded.losses, recorded.own_nll, lanes)
        if recorded.log_probs is not None:
            tally.add_distributions(recorded.log_probs)

    stream(tokens, add)
    if in_recorded_order:  # that is the order
        tally.out_of_order = 0
    return tally
