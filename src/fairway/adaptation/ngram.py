"""An n-gram cache: what followed the same words earlier in the document, mixed into the model.

For each order k, shortest first, the last k tokens before a target are looked up among the earlier
tokens of its document. Where they occurred, the tokens that followed them make a distribution q,
and the model's p becomes (1 − λ)·p + λ·q, with

    λ = sigmoid(bias + order_weight·k + count_weight·ln(occurrences) − variety_weight·ln(kinds)),

kinds being how many different tokens followed.

A target's distribution depends on the tokens before it, in its document, and on nothing else: the
cache learns nothing and belongs to no lane. What it holds of the text is a function of the text.

Shape suffixes: n targets of the stream, m scored targets, R recent occurrences, V vocabulary.
Sources: Kuhn & De Mori, "A cache-based natural language model" (1990); Cleary & Witten, "Data
compression using adaptive coding and partial string matching" (1984).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fairway.adaptation.stream import Rows, Stream
from fairway.errors import UserError


@dataclass(frozen=True)
class NgramSettings:
    """The config section `ngram`."""

    orders: Sequence[int]
    """Lengths of the contexts that are looked up, in tokens."""
    recent_occurrences: int
    """Of a context, the last ones count."""
    bias: float
    order_weight: float
    count_weight: float
    variety_weight: float

    def __post_init__(self) -> None:
        if not self.orders or len(set(self.orders)) < len(self.orders) or min(self.orders) < 1:
            raise UserError(
                f"ngram.orders is {list(self.orders)}: expected lengths from 1 on, each once"
            )
        if self.recent_occurrences < 1:
            raise UserError(
                f"ngram.recent_occurrences is {self.recent_occurrences}: expected at least 1"
            )


class Occurrences(NamedTuple):
    """The places of a stream, grouped by the k tokens that end there; int64 [n] each."""

    slot: Tensor
    """Where a place stands when all are sorted by group, and in a group by position."""
    earlier: Tensor
    """How many places of its group come before it."""
    follower: Tensor
    """By slot: the token after the place."""


def occurrences(stream: Stream, orders: Sequence[int]) -> dict[int, Occurrences]:
    """For each order. Contexts that reach over a document's start occur nowhere else."""
    groups = {
        1: _renumbered(stream.documents[:-1] * (stream.tokens.max() + 1) + stream.tokens[:-1])
    }
    return {order: _occurrences(_groups(groups, order), stream.tokens) for order in sorted(orders)}


def _groups(groups: dict[int, Tensor], order: int) -> Tensor:
    """int64 [n]: equal where the last `order` tokens, and their document, are; exact, no hashes."""
    if order not in groups:
        late = order // 2
        first, second = _groups(groups, order - late), _groups(groups, late)
        n = len(second)
        joined = -1 - torch.arange(n, device=second.device)  # each alone, near the stream's start
        joined[late:] = first[: n - late] * n + second[late:]
        groups[order] = _renumbered(joined)
    return groups[order]


def _renumbered(values: Tensor) -> Tensor:
    """Equal where `values` are, from 0 on, so that two of them fit into one int64."""
    return torch.unique(values, return_inverse=True)[1]


def _occurrences(groups: Tensor, tokens: Tensor) -> Occurrences:
    places = groups.argsort(stable=True)
    index = torch.arange(len(groups), device=groups.device)
    begins = groups[places].diff(prepend=groups.new_full((1,), -1)) != 0
    slot, earlier = torch.empty_like(index), torch.empty_like(index)
    slot[places] = index
    earlier[places] = index - torch.where(begins, index, 0).cummax(0).values
    return Occurrences(slot, earlier, tokens[places + 1])


class NgramAdapter:
    """The cache as an adapter of the evaluation; `found` is what `occurrences` gave."""

    def __init__(self, found: dict[int, Occurrences], settings: NgramSettings) -> None:
        self.found, self.settings = found, settings

    def needed_places(self, step: int) -> int:
        """None beside the scored ones."""
        return 0

    def adapt(self, rows: Rows, logits: Tensor, scored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the mixture for the scored targets; a pass's logits as they are."""
        p = torch.softmax(scored.float(), dim=1)
        for order, found in self.found.items():
            p = self._mixed(p, order, found, rows.positions - 1)
        return logits, p.log(), rows.positions.new_zeros(0)

    def learn(self, rows: Rows) -> None:
        """Nothing: the text before a target says it all."""

    def _mixed(self, p: Tensor, order: int, found: Occurrences, places: Tensor) -> Tensor:
        """p [m, V] with the followers of the contexts that end at `places` [m] mixed in."""
        settings = self.settings
        back = torch.arange(1, settings.recent_occurrences + 1, device=places.device)
        exists = back <= found.earlier[places].unsqueeze(1)
        followers = found.follower[(found.slot[places].unsqueeze(1) - back).clamp(min=0)]
        counts = torch.zeros_like(p).scatter_add_(1, followers, exists.to(p.dtype))
        number = exists.sum(1, keepdim=True)
        some = number.clamp(min=1)
        variety = (counts > 0).sum(1, keepdim=True).clamp(min=1)
        trust = torch.sigmoid(
            settings.bias
            + settings.order_weight * order
            + settings.count_weight * some.log()
            - settings.variety_weight * variety.log()
        )
        trust = torch.where(number > 0, trust, 0.0)
        return (1 - trust) * p + trust * counts / some
