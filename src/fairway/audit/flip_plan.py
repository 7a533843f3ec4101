"""Where to look: which excerpt to audit, and which of its tokens to flip.

A leak may exist only at a *seam*: a window's first target, the boundary between two lanes, a
document's start, a passage that recurs. Half of the flips are therefore aimed at seams, as far as
the geometry of the evaluation is given. The other half are random, and only these support a
statement about leak rates. The first aimed flip, and then one in each round over the kinds of seam,
replaces everything from one token on.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fairway.errors import UserError

NEW_DOCUMENT = "new document"
REST = "everything from here on"
BEFORE_LANE = "before a lane"
RECURRING = "recurring passage"
RANDOM = "random"

PASSAGE_TOKENS = 24
"""Passages of this length are made to recur: caches of the field look up to 16 tokens back."""

RECURRING_TOKENS = 15
"""A token whose last so many predecessors occur twice in the text follows a recurring passage."""

TokenClasses = Mapping[str, np.ndarray]
"""Classes of tokens by the property's name: integers [V], such as each token's first letter's case.
A leak may be open for the tokens of one class only."""


@dataclass(frozen=True)
class Geometry:
    """How the evaluator cuts the text into windows: a hint that aims the flips, and no more.

    window_tokens: context length; the first window scores all its targets.
    stride_tokens: targets that each later window scores.
    lanes: contiguous runs of windows that are scored side by side.
    batch_windows: consecutive windows that are adapted together.
    """

    window_tokens: int
    stride_tokens: int
    lanes: int = 1
    batch_windows: int = 1

    def __post_init__(self) -> None:
        if self.stride_tokens < 1 or self.window_tokens < self.stride_tokens:
            raise UserError(
                f"window of {self.window_tokens} tokens with stride {self.stride_tokens}: "
                "expected 1 ≤ stride ≤ window"
            )
        if self.lanes < 1 or self.batch_windows < 1:
            raise UserError(
                f"{self.lanes} lanes and {self.batch_windows} windows a batch: expected ≥ 1 each"
            )

    def slices(self, num_targets: int) -> list[tuple[int, int]]:
        """First and last target (inclusive, from 1) that each window scores."""
        slices = [(1, min(self.window_tokens, num_targets))]
        while slices[-1][1] < num_targets:
            start = slices[-1][1] + 1
            slices.append((start, min(start + self.stride_tokens - 1, num_targets)))
        return slices


@dataclass(frozen=True)
class Flip:
    """Token `position` is replaced by `token`; `seam` says why there (`random` or a kind of seam).

    rest_seed: unless None, every token that the evaluator's order puts later is replaced too, by
    draws with this seed, but for document marks. Such a flip exposes any leak across its position,
    however rare, but does not tell which token leaked.
    moves_marks: whether documents start elsewhere in the changed text.
    """

    position: int
    token: int
    seam: str
    rest_seed: int | None = None
    moves_marks: bool = False


def flipped(
    tokens: Tensor, flip: Flip, vocab_size: int, bos_id: int, order: Tensor | None = None
) -> Tensor:
    """A copy of tokens int64 [n + 1] with the flip done. order: int64 [n], the declared rank of
    each target; None: the text's."""
    changed = tokens.clone()
    changed[flip.position] = flip.token
    if flip.rest_seed is not None:
        generator = torch.Generator().manual_seed(flip.rest_seed)
        drawn = torch.randint(vocab_size - 1, (len(tokens) - 1,), generator=generator)
        drawn += drawn >= bos_id  # any token but the document mark
        ranks = torch.arange(len(tokens) - 1) if order is None else order
        is_later = (ranks > ranks[flip.position - 1]).to(tokens.device)
        is_later &= tokens[1:] != bos_id
        changed[1:] = torch.where(is_later, drawn.to(tokens.device), changed[1:])
    return changed


def with_recurring_passages(tokens: Tensor, bos_id: int, seed: int) -> Tensor:
    """A copy of an excerpt, int64 [n + 1], in which passages of some documents recur in others.

    Real excerpts rarely repeat 15 tokens, and a cache's hints show only where they do. One passage
    goes from a short document to a longer one behind it, one from a long document to a shorter one
    behind it: so an evaluator that scores documents in an order of its own meets both directions.
    Texts of shorter documents stay as they are.
    """
    marks = (tokens == bos_id).nonzero().flatten().tolist()
    edges = sorted({0, *marks, len(tokens)})
    documents = [pair for pair in pairwise(edges) if _length(pair) >= 2 * PASSAGE_TOKENS]
    changed, generator = tokens.clone(), random.Random(seed)
    pairs = [
        (source, copy) for k, source in enumerate(documents) for copy in documents[k + 1 :]
    ]  # quadratic in documents, of which an excerpt has a few hundred
    used: set[tuple[int, int]] = set()
    for longer_behind in (True, False):
        free = [pair for pair in pairs if not used & set(pair)]
        if not free:
            break
        sign = 1 if longer_behind else -1
        source, copy = max(free, key=lambda pair: sign * (_length(pair[1]) - _length(pair[0])))
        used |= {source, copy}
        start, place = (
            generator.randrange(first + 1, stop - PASSAGE_TOKENS) for first, stop in (source, copy)
        )
        changed[place : place + PASSAGE_TOKENS] = changed[start : start + PASSAGE_TOKENS]
    return changed


def _length(document: tuple[int, int]) -> int:
    return document[1] - document[0]


def after_recurring_passages(tokens: Tensor) -> list[int]:
    """Targets whose RECURRING_TOKENS predecessors occur elsewhere in the text as well."""
    words = tokens.cpu().numpy()
    if len(words) <= RECURRING_TOKENS:
        return []
    passages = np.lib.stride_tricks.sliding_window_view(words, RECURRING_TOKENS)[:-1]
    _, inverse, counts = np.unique(passages, axis=0, return_inverse=True, return_counts=True)
    return (np.flatnonzero(counts[inverse.reshape(-1)] > 1) + RECURRING_TOKENS).tolist()


def choose_excerpt(tokens: Tensor, num_targets: int, bos_id: int) -> Tensor:
    """The excerpt of `num_targets` + 1 tokens with the most document starts; all where fewer exist.

    It starts at a document start or at token 0; of equally good ones the earliest is taken.
    tokens: int64 [N].
    """
    last_start = len(tokens) - num_targets - 1
    if last_start <= 0:
        return tokens
    is_start = tokens == bos_id
    before = is_start.cumsum(0)
    candidates = torch.cat([is_start.new_zeros(1, dtype=torch.int64), is_start.nonzero()[:, 0]])
    candidates = candidates[candidates <= last_start]
    best = (before[candidates + num_targets] - before[candidates]).tolist()
    start = int(candidates[best.index(max(best))])
    return tokens[start : start + num_targets + 1]


def plan_flips(
    tokens: Tensor,
    *,
    vocab_size: int,
    bos_id: int,
    num_flips: int,
    seed: int,
    guesses: Tensor | None = None,
    geometry: Geometry | None = None,
    classes: TokenClasses | None = None,
) -> list[Flip]:
    """At most `num_flips` flips of distinct (position, token), the first half of them random.

    tokens: int64 [n + 1]. Targets are positions 1 … n. guesses: int64 [n], the evaluator's
    likeliest token for each target; flips insert it in turn with random tokens, because a leak
    tells whether a guess was right, and with tokens of another class, property by property. The
    random half takes one position from each of equally long sections of the text, so that it finds
    a leak of a given rate at least as often as independent draws would.
    """
    assert vocab_size > 2, "a flip needs a third token beside the old one and the document mark"
    generator = random.Random(seed)
    num_targets = len(tokens) - 1
    num_random = min(num_targets, (num_flips + 1) // 2)
    drawn = [(RANDOM, target) for target in _one_per_section(num_targets, num_random, generator)]
    aimed = _round_robin(_seams(tokens, bos_id, geometry, generator))
    choose = _Replacements(tokens, vocab_size, bos_id, guesses, classes or {}, generator)
    taken = set()
    flips = []
    for seam, target in [*drawn, *aimed]:
        key = (target, seam in (NEW_DOCUMENT, REST))
        if key in taken or len(flips) == num_flips:
            continue
        taken.add(key)
        is_mark = int(tokens[target]) == bos_id
        rest_seed = generator.randrange(2**31) if seam == REST else None
        token = bos_id if seam == NEW_DOCUMENT else choose(target, len(flips))
        flips.append(Flip(target, token, seam, rest_seed, (token == bos_id) != is_mark))
    return flips


class _Replacements:
    """Which token replaces another: a random one, the guess, one of each other class, in turn."""

    def __init__(
        self,
        tokens: Tensor,
        vocab_size: int,
        bos_id: int,
        guesses: Tensor | None,
        classes: TokenClasses,
        generator: random.Random,
    ) -> None:
        self.old = tokens.tolist()
        self.guesses = None if guesses is None else guesses.tolist()
        self.bos_id, self.generator = bos_id, generator
        self.any = np.array([token for token in range(vocab_size) if token != bos_id])
        self.classes = list(classes.values())

    def __call__(self, target: int, turn: int) -> int:
        old, kinds = self.old[target], 2 + len(self.classes)
        kind = turn % kinds
        if kind == 1 and self.guesses is not None:
            guess = self.guesses[target - 1]
            if guess not in (old, self.bos_id):
                return guess
        allowed = self.any[self.any != old]
        if kind >= 2:
            labels = self.classes[kind - 2]
            others = allowed[labels[allowed] != labels[old]]
            allowed = others if len(others) else allowed
        return int(allowed[self.generator.randrange(len(allowed))])


def _one_per_section(num_targets: int, sections: int, generator: random.Random) -> list[int]:
    edges = [1 + section * num_targets // sections for section in range(sections + 1)]
    return [generator.randrange(*pair) for pair in zip(edges, edges[1:], strict=False)]


def _seams(
    tokens: Tensor, bos_id: int, geometry: Geometry | None, generator: random.Random
) -> dict[str, list[int]]:
    """Targets at each kind of seam, shuffled; the kinds at which leaks are likeliest come first."""
    num_targets = len(tokens) - 1
    documents = [start for start in (tokens == bos_id).nonzero().flatten().tolist() if start > 0]
    words = [target for target in range(1, num_targets + 1) if int(tokens[target]) != bos_id]
    between = {} if geometry is None else _geometry_seams(geometry, num_targets)
    within = {
        "document start": documents,
        "after a document start": [start + 1 for start in documents if start < num_targets],
        RECURRING: after_recurring_passages(tokens),
        "last target": [num_targets],
        "first target": [1],
    }
    seams = {NEW_DOCUMENT: words} | between | within
    for targets in seams.values():
        generator.shuffle(targets)
    middle = list(range(max(1, num_targets // 4), max(2, num_targets * 3 // 4)))
    generator.shuffle(middle)
    # Lanes are what must not learn from the text of the next one.
    before_lanes = seams.pop(BEFORE_LANE, [])
    rest = [target for target in (*before_lanes, *middle) if int(tokens[target]) != bos_id]
    return {REST: rest} | seams


def _geometry_seams(geometry: Geometry, num_targets: int) -> dict[str, list[int]]:
    slices = geometry.slices(num_targets)
    count = len(slices)
    edges = sorted({lane * count // geometry.lanes for lane in range(geometry.lanes + 1)})
    lane_starts = edges[1:-1]
    batch_starts = [
        start
        for lane in zip(edges, edges[1:], strict=False)
        for start in range(*lane, geometry.batch_windows)[1:]
    ]
    return {
        "first target of a window": [start for start, _ in slices[1:]],
        BEFORE_LANE: [slices[k - 1][1] for k in lane_starts],
        "lane boundary": _around(slices, lane_starts),
        "batch boundary": _around(slices, batch_starts) if geometry.batch_windows > 1 else [],
        "late in a batch": [slices[k - 2][1] for k in batch_starts if geometry.batch_windows > 1],
        "last window": [slices[-1][0]],
        "last target of a window": [stop for _, stop in slices],
    }


def _around(slices: list[tuple[int, int]], windows: Iterable[int]) -> list[int]:
    """The last target before each of these windows, and its first."""
    return [target for k in windows for target in (slices[k - 1][1], slices[k][0])]


def _round_robin(groups: dict[str, list[int]]) -> Iterator[tuple[str, int]]:
    """One of each kind, then a second of each, and so on."""
    longest = max((len(targets) for targets in groups.values()), default=0)
    for turn in range(longest):
        for seam, targets in groups.items():
            if turn < len(targets):
                yield seam, targets[turn]
