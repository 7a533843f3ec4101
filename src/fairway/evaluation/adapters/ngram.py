"""N-gram caches: what followed the same words earlier, mixed into the model's distribution.

For each order k of a cache, shortest first, the last k tokens before a target are looked up among
the earlier tokens of its document, or of the whole text. Where they occurred, the tokens that
followed make a distribution q, and p, the model's at first, becomes (1 − λ)·p + λ·q, with

    λ = sigmoid(bias + order_weight·k + count_weight·ln(occurrences) − variety_weight·ln(kinds)),

kinds being how many different tokens followed. A target's distribution depends on the tokens before
it and on nothing else: a cache is a function of the text, learns nothing, and belongs to no lane.

Shape suffixes: n targets of the stream, m scored targets, R recent occurrences, V vocabulary.
Sources: Kuhn & De Mori, "A cache-based natural language model" (1990); Cleary & Witten, "Data
compression using adaptive coding and partial string matching" (1984).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairway.errors import UserError
from fairway.evaluation.stream import Rows, Stream


@dataclass(frozen=True)
class CacheSettings:
    """One of `ngram.caches`."""

    reach: str
    """document: the tokens since the last BOS; stream: all earlier ones."""
    orders: Sequence[int]
    """Lengths of the contexts that are looked up, in tokens."""
    recent_occurrences: int
    """Of a context, the last ones count."""
    bias: float
    order_weight: float
    count_weight: float
    variety_weight: float

    def __post_init__(self) -> None:
        if self.reach not in ("document", "stream"):
            raise UserError(
                f"ngram.caches: reach is {self.reach!r}: expected 'document' or 'stream'"
            )
        if not self.orders or len(set(self.orders)) < len(self.orders) or min(self.orders) < 1:
            raise UserError(
                f"ngram.caches: orders is {list(self.orders)}: expected lengths of 1 or more, "
                "each once"
            )
        if self.recent_occurrences < 1:
            raise UserError(
                f"ngram.caches: recent_occurrences is {self.recent_occurrences}: expected 1 or more"
            )


@dataclass(frozen=True)
class NgramSettings:
    """The config section `ngram`."""

    caches: Sequence[Mapping[str, Any]]
    """Each a CacheSettings, mixed in one after the other."""

    def __post_init__(self) -> None:
        for cache in self.caches:
            CacheSettings(**cache)


class Occurrences(NamedTuple):
    """The places of a stream, grouped by the k tokens that end there; int64 [n] each."""

    slot: Tensor
    """Where a place stands when all are sorted by group, and in a group by position."""
    earlier: Tensor
    """How many places of its group come before it."""
    follower: Tensor
    """By slot: the token after the place."""


class Cache(NamedTuple):
    """A cache over one stream: what its orders find there."""

    settings: CacheSettings
    found: dict[int, Occurrences]


def build_caches(stream: Stream, settings: NgramSettings) -> list[Cache]:
    """One pass over the stream, for all lanes; on its device."""
    caches = [CacheSettings(**cache) for cache in settings.caches]
    return [Cache(cache, _found(stream, cache)) for cache in caches]


def _found(stream: Stream, settings: CacheSettings) -> dict[int, Occurrences]:
    tokens, groups = stream.tokens[:-1], stream.tokens[:-1]
    if settings.reach == "document":
        # Contexts that begin before a document then occur nowhere else.
        groups = stream.documents[:-1] * (tokens.max() + 1) + tokens
    known = {1: _renumbered(groups)}
    return {
        order: _occurrences(_groups(known, order), stream.tokens)
        for order in sorted(settings.orders)
    }


def _groups(groups: dict[int, Tensor], order: int) -> Tensor:
    """int64 [n]: equal where the last `order` entries of groups[1] are; exact, no hashes."""
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
    """The caches as an adapter of the evaluation."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.caches = caches

    def needed_places(self, step: int) -> int:
        """None beside the scored ones."""
        return 0

    def adapt(self, rows: Rows, logits: Tensor, scored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the mixture for the scored targets; a pass's logits as they are."""
        p = torch.softmax(scored.float(), dim=1)
        for settings, found in self.caches:
            for order, occurrences in found.items():
                p = mixed(p, order, occurrences, rows.positions - 1, settings)
        return logits, p.log(), rows.positions.new_zeros(0)

    def learn(self, rows: Rows) -> None:
        """Nothing: the text before a target says it all."""


def mixed(
    p: Tensor, order: int, occurrences: Occurrences, places: Tensor, settings: CacheSettings
) -> Tensor:
    """p [m, V] with what followed the contexts that end at `places` [m] mixed in."""
    followers, exists = recent_followers(occurrences, places, settings.recent_occurrences)
    counts = torch.zeros_like(p).scatter_add_(1, followers, exists.to(p.dtype))
    number = exists.sum(1)
    share = trust(order, number, (counts > 0).sum(1), settings).unsqueeze(1)
    return (1 - share) * p + share * counts / number.clamp(min=1).unsqueeze(1)


def recent_followers(
    occurrences: Occurrences, places: Tensor, recent_occurrences: int
) -> tuple[Tensor, Tensor]:
    """int64 [m, R], the tokens that followed, the last one first, and bool, which there are."""
    back = torch.arange(1, recent_occurrences + 1, device=places.device)
    exists = back <= occurrences.earlier[places].unsqueeze(1)
    at = (occurrences.slot[places].unsqueeze(1) - back).clamp(min=0)
    return occurrences.follower[at], exists


def trust(order: int, number: Tensor, kinds: Tensor, settings: CacheSettings) -> Tensor:
    """λ of the module's formula, [m], for int64 [m] occurrences and kinds; 0 without any."""
    odds = (
        settings.bias
        + settings.order_weight * order
        + settings.count_weight * number.clamp(min=1).log()
        - settings.variety_weight * kinds.clamp(min=1).log()
    )
    return torch.where(number > 0, torch.sigmoid(odds), 0.0)
