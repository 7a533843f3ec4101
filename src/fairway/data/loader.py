"""Training batches in coprime-stride order: every block once before any repeats.

Each span is cut in blocks of `sequence_length` tokens from a random phase on, and its blocks are
visited in the order (start + k·stride) mod blocks, with stride coprime to the number of blocks;
each epoch draws new phases, starts and strides. A batch draws its blocks from all spans without
replacement (multivariate hypergeometric), so a span is drawn in proportion to the blocks it has
left. Everything follows from the seed, the epoch and the number of the batch, so the state is a few
integers, and any number of processes sees the same global batches.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fairway.data.dataset import Span
from fairway.errors import UserError

BLOCK_ORDER, BATCH_MIX = 1, 2
"""The uses of random numbers. Each is part of its seed, so that no two draw the same."""


class CoprimeLoader:
    """Draws global batches of `batch_sequences` blocks and returns this rank's rows of them."""

    def __init__(
        self,
        spans: Sequence[Span],
        sequence_length: int,
        batch_sequences: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Spans that are too short for a block are left out.

        Raises UserError where no span holds a block, or where world_size does not divide the batch.
        """
        if batch_sequences % world_size:
            raise UserError(
                f"a batch of {batch_sequences} sequences cannot be shared by {world_size} "
                "processes: change the batch size or the number of processes so that it divides"
            )
        # A block's last target is the token after it.
        self._tokens = [np.asarray(span.read()) for span in spans if len(span) > sequence_length]
        if not self._tokens:
            total = sum(map(len, spans))
            change = (
                "raise data.shard_tokens, or join finished shards"
                if total > sequence_length
                else "bring more text"
            )
            raise UserError(
                f"no shard of the training text is longer than a sequence of {sequence_length} "
                f"tokens (the longest has {max(map(len, spans), default=0)}, all have {total}): "
                f"{change}, or lower train.sequence_tokens"
            )
        self._sequence_length = sequence_length
        self._batch_sequences = batch_sequences
        self._seed = seed
        rows = batch_sequences // world_size
        self._rank_rows = slice(rank * rows, (rank + 1) * rows)
        self._batch = 0
        self._start_epoch(0)

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """The next inputs and targets, int64 [batch_sequences / world_size, sequence_length].

        targets are the tokens that follow the inputs.
        """
        positions = self._draw()[self._rank_rows]
        length = self._sequence_length
        inputs = np.empty((len(positions), length), np.int64)
        targets = np.empty_like(inputs)
        for row, (span, start) in enumerate(positions):
            tokens = self._tokens[span]
            inputs[row] = tokens[start : start + length]
            targets[row] = tokens[start + 1 : start + length + 1]
        return inputs, targets

    def state(self) -> dict[str, Any]:
        """The loader's position as JSON values: batch, epoch, and blocks drawn of each span."""
        return {"batch": self._batch, "epoch": self._epoch, "drawn": self._drawn.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where a loader over the same spans, with the same settings, saved `state`."""
        assert len(state["drawn"]) == len(self._tokens), "the state is of other spans"
        self._start_epoch(state["epoch"])
        self._batch = state["batch"]
        self._drawn = np.array(state["drawn"], np.int64)

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        orders = [
            _block_order(
                len(tokens),
                self._sequence_length,
                np.random.default_rng((self._seed, BLOCK_ORDER, epoch, span)),
            )
            for span, tokens in enumerate(self._tokens)
        ]
        self._phase, self._start, self._stride, self._blocks = np.array(orders, np.int64).T
        self._drawn = np.zeros(len(orders), np.int64)

    def _draw(self) -> list[tuple[int, int]]:
        """The next global batch: (span, first token) of each of its blocks."""
        generator = np.random.default_rng((self._seed, BATCH_MIX, self._batch))
        self._batch += 1
        positions: list[tuple[int, int]] = []
        while len(positions) < self._batch_sequences:
            left = self._blocks - self._drawn
            wanted = min(self._batch_sequences - len(positions), int(left.sum()))
            if wanted == 0:
                self._start_epoch(self._epoch + 1)
                continue
            for span, count in enumerate(generator.multivariate_hypergeometric(left, wanted)):
                positions.extend((span, first) for first in self._take(span, int(count)))
        return positions

    def _take(self, span: int, count: int) -> list[int]:
        """First tokens of the span's next `count` blocks."""
        visits = self._drawn[span] + np.arange(count)
        self._drawn[span] += count
        blocks = (self._start[span] + visits * self._stride[span]) % self._blocks[span]
        return (self._phase[span] + blocks * self._sequence_length).tolist()


def _block_order(
    tokens: int, sequence_length: int, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """(phase, start, stride, blocks) of one visit to all blocks of a span of `tokens` tokens."""
    room = tokens - 1 - sequence_length  # at least one block must fit behind the phase
    phase = int(generator.integers(min(sequence_length, room + 1)))
    blocks = (tokens - 1 - phase) // sequence_length
    start = int(generator.integers(blocks))
    stride = int(generator.integers(1, blocks + 1))
    while math.gcd(stride, blocks) != 1:
        stride = int(generator.integers(1, blocks + 1))
    return phase, start, stride, blocks
