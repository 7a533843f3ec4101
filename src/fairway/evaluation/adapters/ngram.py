"""N-gram caches: what followed the same words earlier, mixed into the model's distribution.

For each order k of a cache, shortest first, the last k tokens before a target are looked up among
the earlier tokens of its document, or of the whole text. Where they occurred, the tokens that
followed, each with the weight distance^−distance_power, make a distribution q, and p, the model's
at first, becomes (1 − λ)·p + λ·q, with

    λ = sigmoid(bias + order_weight·k + count_weight·ln(occurrences) − variety_weight·ln(distinct)),

where `distinct` is how many different tokens followed. A target's distribution depends on the
tokens before it and on nothing else: a cache is a function of the text, learns nothing, and belongs
to no lane.

Shape suffixes: n targets of the text, m scored targets, R recent occurrences, V vocabulary.
Sources: Kuhn & De Mori, "A cache-based natural language model" (1990); Cleary & Witten, "Data
compression using adaptive coding and partial string matching" (1984).
"""

from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairway.errors import UserError
from fairway.evaluation.adapters.base import Adapted, Adapter
from fairway.evaluation.text import Text, WindowBatch
from fairway.settings import Settings

WEIGHT_UNIT = 2.0**-16
"""Sums of up to 256 weights of at most 1 are exact in float32."""


class CacheSettings(Settings):
    """One cache: what it searches, and how much what it finds counts."""

    reach: Literal["document", "stream"] = "document"
    """What is searched: the target's document so far, or all of the text before it."""
    orders: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (2, 3, 4, 6, 8, 12, 16, 24), min_length=1
    )
    """Lengths of the contexts that are looked up, in tokens."""
    recent_occurrences: int = Field(8, ge=1, le=256)
    """Of a context, the last occurrences count."""
    bias: float = -4.2
    """The share of what is found is the sigmoid of this plus the weighted terms."""
    order_weight: float = 0.2
    """Times the order."""
    count_weight: float = 1.5
    """Times ln(occurrences)."""
    variety_weight: float = 2.4
    """Times ln(different followers), taken off."""
    distance_power: float = Field(0.0, ge=0, le=8)
    """An occurrence d tokens back has the weight 1 / d^this; 0 gives all the same weight."""

    @model_validator(mode="after")
    def _orders_are_distinct(self) -> Self:
        if len(set(self.orders)) < len(self.orders):
            raise UserError(
                f"evaluation.adapters.ngram.caches: orders is {list(self.orders)}: expected each "
                "length once"
            )
        return self


class NgramSettings(Adapter.Settings):
    """The caches of a text."""

    caches: tuple[CacheSettings, ...] = (CacheSettings(),)
    """Mixed into the model's distribution one after the other."""


class Occurrences(NamedTuple):
    """The positions of a text, grouped by the k tokens that end there; 10 bytes each."""

    rank: Tensor
    """int32 [n]: where a position stands when all are sorted, by group and then by position."""
    earlier: Tensor
    """int16 [n]: how many positions of its group come before it, up to those that count."""
    position: Tensor
    """int32 [n], by rank: the position itself."""
    tokens: Tensor
    """The text, int64 [n + 1]."""


class Cache(NamedTuple):
    """A cache over one text: what its orders find there."""

    settings: CacheSettings
    found: dict[int, Occurrences]


def build_caches(text: Text, settings: NgramSettings) -> list[Cache]:
    """One pass over the text, for all lanes; on its device."""
    return [Cache(cache, _found(text, cache)) for cache in settings.caches]


def _found(text: Text, settings: CacheSettings) -> dict[int, Occurrences]:
    tokens, entries = text.tokens[:-1], text.tokens[:-1]
    if settings.reach == "document":
        # Contexts that begin before a document then occur nowhere else.
        entries = text.documents[:-1] * (tokens.max() + 1) + tokens
    groups: dict[int, Tensor] = {}
    return {
        order: _occurrences(*_grouped(groups, entries, order), text.tokens, settings)
        for order in sorted(settings.orders)
    }


def _grouped(
    groups: dict[int, Tensor], entries: Tensor, order: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The positions of `entries` [n], sorted by the last `order` entries there; exact, no hashes.

    Returns, by rank: the positions int64 [n], where a group begins, bool [n], and the group's
    number, int32 [n]. Adds the number of each position's group to `groups`, for longer orders.
    """
    ordered, positions = _keys(groups, entries, order).sort(stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    numbers = begins.cumsum(0, dtype=torch.int32).sub_(1)
    groups[order] = torch.empty_like(numbers)
    groups[order][positions] = numbers
    return positions, begins, numbers


def _keys(groups: dict[int, Tensor], entries: Tensor, order: int) -> Tensor:
    """int64 [n]: equal where the last `order` entries are, from the groups of its two halves."""
    if order == 1:
        return entries
    late = order // 2
    for part in {order - late, late} - groups.keys():
        _grouped(groups, entries, part)
    n = len(entries)
    keys = torch.arange(-1, -n - 1, -1, device=entries.device)  # each alone, near the text's start
    first, second = groups[order - late][: max(0, n - late)], groups[late][late:]
    keys[late:] = first.long() * n + second
    return keys


def _occurrences(
    positions: Tensor, begins: Tensor, numbers: Tensor, tokens: Tensor, settings: CacheSettings
) -> Occurrences:
    index = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
    before = (index - index[begins][numbers]).clamp(max=settings.recent_occurrences)
    rank, earlier = torch.empty_like(index), torch.empty_like(index, dtype=torch.int16)
    rank[positions] = index
    earlier[positions] = before.short()
    return Occurrences(rank, earlier, positions.int(), tokens)


class Ngram(Adapter):
    """The caches as an adapter of the evaluation."""

    title = "n-gram cache"
    is_mixture = True
    Settings = NgramSettings

    @classmethod
    def prepare(cls, settings: NgramSettings, text: Text) -> list[Cache]:
        """The caches of the whole text, of which a target is shown its prefix."""
        return build_caches(text, settings)

    def adapt(self, batch: WindowBatch, logits: Tensor, scored: Tensor) -> Adapted:
        """Log-probabilities of the mixture for the scored targets; a batch's logits as they are."""
        p = torch.softmax(scored.float(), dim=1)
        for settings, found in self.context.prepared:
            for order, occurrences in found.items():
                p = mixed(p, order, occurrences, batch.positions - 1, settings)
        return Adapted(logits, p.log())


def mixed(
    p: Tensor, order: int, occurrences: Occurrences, positions: Tensor, settings: CacheSettings
) -> Tensor:
    """p [m, V] with what followed the contexts that end at `positions` [m] mixed in."""
    found = recent_occurrences(occurrences, positions, settings.recent_occurrences)
    weights = found.weights(settings.distance_power)
    sums = torch.zeros_like(p).scatter_add_(1, found.followers, weights)
    number = found.exists.sum(1)
    share = mixture_weight(order, number, (sums > 0).sum(1), settings).unsqueeze(1)
    return (1 - share) * p + share * sums / weights.sum(1, keepdim=True).clamp(min=WEIGHT_UNIT)


class Recent(NamedTuple):
    """The last occurrences of the contexts of m targets, the last one first; [m, R] each."""

    followers: Tensor
    """int64: the tokens that followed."""
    distances: Tensor
    """int64: how many tokens back, at least 1."""
    exists: Tensor
    """bool: which there are."""

    def weights(self, power: float) -> Tensor:
        """float32, of every occurrence; 0 where there is none.

        They are multiples of a unit, so that their sums do not depend on the order of adding.
        """
        weights = self.distances.to(torch.float32).pow(-power)
        return (weights / WEIGHT_UNIT).ceil() * WEIGHT_UNIT * self.exists


def recent_occurrences(occurrences: Occurrences, positions: Tensor, count: int) -> Recent:
    """The last `count` occurrences of the contexts that end at `positions`, int64 [m]."""
    back = torch.arange(1, count + 1, device=positions.device)
    exists = back <= occurrences.earlier[positions].unsqueeze(1)
    rank = (occurrences.rank[positions].unsqueeze(1) - back).clamp(min=0)
    found = occurrences.position[rank]
    distances = (positions.unsqueeze(1) - found).clamp(min=1)
    return Recent(occurrences.tokens[found + 1], distances, exists)


def mixture_weight(order: int, number: Tensor, distinct: Tensor, settings: CacheSettings) -> Tensor:
    """λ of the module's formula, [m], for int64 [m] occurrences and distinct followers.

    It is 0 without any occurrence.
    """
    odds = (
        settings.bias
        + settings.order_weight * order
        + settings.count_weight * number.clamp(min=1).log()
        - settings.variety_weight * distinct.clamp(min=1).log()
    )
    return torch.where(number > 0, torch.sigmoid(odds), 0.0)
