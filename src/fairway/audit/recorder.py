"""One line in any script makes it an evaluator that can be audited.

recorder = Recorder()

def my_evaluation(tokens):                      # the script's own loop
    for positions, logits, losses in my_windows(tokens):
        recorder.record(positions, losses, logits=logits)       # the line
        ...

audit(recorder.evaluator(my_evaluation), tokens, vocab_size=1024)
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fairway.audit.interface import Evaluator, Scores
from fairway.errors import UserError


@dataclass(frozen=True)
class Recorded:
    """What one call of `record` was given, on the CPU.

    positions: int64 [m]. losses: float [m], as reported. log_probs: float32 [m, V] or None.
    own_nll: float64 [m], -log p of each target under `log_probs`, or None. lane: the stream's.
    """

    positions: Tensor
    losses: Tensor
    log_probs: Tensor | None
    own_nll: Tensor | None
    lane: int


class Recorder:
    """Collects a script's scores, in the order in which it makes them.

    order: `text`, where a score may depend on all earlier tokens of the text, or `recorded`, where
    the script scores in another order and a score may depend on what was recorded before it.
    seed: unless None, the random generators of Python, NumPy and PyTorch start from it at each call
    of the evaluator, so that a script that draws repeats itself.
    """

    def __init__(
        self, order: Literal["text", "recorded"] = "text", seed: int | None = None
    ) -> None:
        if order not in ("text", "recorded"):
            raise UserError(f"Recorder: found order {order!r}, expected 'text' or 'recorded'")
        self.order, self.seed = order, seed
        self._consume: Callable[[Recorded], None] | None = None
        self._tokens: Tensor | None = None
        self._lanes: dict[Any, int] = {}

    def record(
        self,
        positions: Any,
        losses: Any,
        *,
        logits: Any = None,
        log_probs: Any = None,
        stream: Any = 0,
    ) -> None:
        """Note scores at the moment when the script fixes them.

        positions: integers [m]; the index of each target in the tokens, 1 … n. losses: [m], nats.
        logits, log_probs: [m, V], the distributions that gave the losses; either, or neither.
        stream: the lane, rank or document batch, if several advance side by side: only within one
        must targets come in order. Arrays may be of torch or numpy, of any float type and shape;
        they are flattened. Does nothing outside an audit, so the line may stay in the script.
        Raises UserError where lengths do not fit.
        """
        if self._consume is None:
            return
        targets, values = _flat(positions).long(), _flat(losses)
        if targets.shape != values.shape:
            raise UserError(
                f"record: found {len(targets)} positions and {len(values)} losses, expected a loss "
                "a position"
            )
        rows = own = None
        if logits is not None or log_probs is not None:
            given = _tensor(log_probs if logits is None else logits)
            rows = given.reshape(-1, given.shape[-1]) if given.ndim > 1 else given[None]
            if len(rows) != len(targets):
                raise UserError(
                    f"record: found {len(rows)} distributions for {len(targets)} positions, "
                    "expected [m, V]"
                )
            if logits is not None:
                rows = torch.log_softmax(rows.float(), dim=-1)
            own = self._own_nll(rows, targets)
        lane = self._lanes.setdefault(stream, len(self._lanes))
        self._consume(Recorded(targets, values, rows, own, lane))

    def _own_nll(self, rows: Tensor, targets: Tensor) -> Tensor:
        inside = (targets >= 1) & (targets < len(self._tokens))
        tokens = self._tokens[torch.where(inside, targets, 0)]
        if len(tokens) and int(tokens.max()) >= rows.shape[1]:
            raise UserError(
                f"record: found distributions over {rows.shape[1]} tokens, expected the whole "
                f"vocabulary: the text holds token {int(tokens.max())}"
            )
        return -rows.double().gather(1, tokens[:, None]).squeeze(1)

    def evaluator(self, run: Callable[[Tensor], Any]) -> Evaluator:
        """`run`, the script's evaluation of tokens int64 [n + 1], as the audit asks for it.

        What `run` returns does not count. Its evaluator raises UserError where nothing is recorded.
        """
        return RecordedEvaluator(self, run)


@dataclass(frozen=True)
class RecordedEvaluator:
    """An evaluator whose scores are what `recorder` notes while `run` runs."""

    recorder: Recorder
    run: Callable[[Tensor], Any]

    def __call__(self, tokens: Tensor) -> Scores:
        """Scores of the whole text, with its distributions where each record had them."""
        records: list[Recorded] = []
        self.stream(tokens, records.append)
        return _scores(records, len(tokens) - 1, self.recorder.order)

    def stream(self, tokens: Tensor, consume: Callable[[Recorded], None]) -> None:
        """Hand each record to `consume` as it is made, so that none need be kept."""
        recorder, count = self.recorder, 0

        def counted(recorded: Recorded) -> None:
            nonlocal count
            count += len(recorded.positions)
            consume(recorded)

        recorder._tokens, recorder._lanes, recorder._consume = tokens.cpu(), {}, counted
        if recorder.seed is not None:
            reset_random_generators(recorder.seed)
        try:
            self.run(tokens)
        finally:
            recorder._tokens = recorder._consume = None
        if count == 0:
            raise UserError(
                "the script recorded no score: call recorder.record(positions, losses) where it "
                "makes them"
            )


def reset_random_generators(seed: int) -> None:
    """Start the random generators of Python, NumPy and PyTorch (CUDA's too) from `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def recorded_order(positions: Tensor, num_targets: int) -> Tensor:
    """The rank of each target 1 … n in the order of its first score; unscored ones come last.

    positions: int64 [m]. Returns int64 [num_targets].
    """
    first = torch.full((num_targets,), len(positions), dtype=torch.int64)
    inside = (positions >= 1) & (positions <= num_targets)
    indices = torch.arange(len(positions))[inside]
    first.scatter_reduce_(0, positions[inside] - 1, indices, "amin")
    ranks = torch.empty_like(first)
    ranks[first.argsort(stable=True)] = torch.arange(num_targets)
    return ranks


def _scores(records: list[Recorded], num_targets: int, order: str) -> Scores:
    positions = torch.cat([one.positions for one in records])
    rows = own = None
    if all(one.log_probs is not None for one in records):
        own = torch.cat([one.own_nll for one in records])
        rows = _rows_by_target(records, num_targets)
    return Scores(
        log_probs=rows,
        positions=positions,
        reported_nll=torch.cat([one.losses for one in records]),
        lanes=torch.cat([torch.full((len(one.positions),), one.lane) for one in records]),
        order=recorded_order(positions, num_targets) if order == "recorded" else None,
        own_nll=own,
    )


def _rows_by_target(records: list[Recorded], num_targets: int) -> Tensor:
    """[n, V]: the distribution of each target's first score; uniform where it has none, which
    coverage reports."""
    width, kind = records[0].log_probs.shape[1], records[0].log_probs.dtype
    for one in records:
        if one.log_probs.shape[1] != width:
            raise UserError(
                f"record: found distributions over {width} and over {one.log_probs.shape[1]} "
                "tokens, expected one vocabulary"
            )
    rows = torch.full((num_targets, width), -float(np.log(width)), dtype=kind)
    for one in reversed(records):
        inside = (one.positions >= 1) & (one.positions <= num_targets)
        # Written backward: of a target that is recorded twice the first distribution stays.
        targets = one.positions[inside].flip(0) - 1
        rows[targets] = one.log_probs[inside].flip(0).to(kind)
    return rows


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    return torch.tensor(np.array(value))


def _flat(value: Any) -> Tensor:
    return _tensor(value).reshape(-1)
