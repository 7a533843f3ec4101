"""Validation documents that occur in the training text are counted, whatever the source."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.data import overlap
from fairway.data.dataset import Span
from fairway.data.overlap import EXAMPLES, NEAR_SHARE, NGRAM_TOKENS, find_overlap
from fairway.data.shards import write_shard

BOS = 1
"""As in every dataset here; documents are lists of other tokens."""

WORDS = [f"{first}{rest}" for first in "bdfgklmnprst" for rest in ("alo", "eri", "otu", "inas")]


def texts(count: int, words: int = 60, seed: int = 0) -> list[str]:
    """Random documents, no two alike for longer than a few words."""
    generator = np.random.default_rng([seed, count, words])
    return [" ".join(generator.choice(WORDS, words)) for _ in range(count)]


def spans(folder: Path, name: str, tokens: list[int], cuts: list[int]) -> list[Span]:
    """A text in shards that end wherever `cuts` say."""
    ends = [*sorted({cut % len(tokens) for cut in cuts} - {0}), len(tokens)]
    found = []
    for start, stop in zip([0, *ends], ends, strict=False):
        path = folder / f"{name}_{start}.bin"
        write_shard(path, np.array(tokens[start:stop], np.uint16))
        found.append(Span(path, 0, stop - start))
    return found


def documents_of(tokens: list[int]) -> list[tuple[int, ...]]:
    """The documents of a text; one that begins without a BOS is its first."""
    marks = [i for i, token in enumerate(tokens) if token == BOS]
    marks = marks if tokens[0] == BOS else [-1, *marks]
    ends = [*marks[1:], len(tokens)]
    return [tuple(tokens[mark + 1 : end]) for mark, end in zip(marks, ends, strict=True)]


def ngrams_of(document: tuple[int, ...]) -> list[tuple[int, ...]]:
    if len(document) < NGRAM_TOKENS:
        return [document] if document else []
    return [document[i : i + NGRAM_TOKENS] for i in range(len(document) - NGRAM_TOKENS + 1)]


def as_defined(val: list[int], training: list[int]) -> dict:
    """What `find_overlap` should find, n-gram by n-gram."""
    known = {one for document in documents_of(training) for one in ngrams_of(document)}
    counts = [[one in known for one in ngrams_of(document)] for document in documents_of(val)]
    shares = [sum(found) / max(1, len(found)) for found in counts]
    return {
        "ngram_tokens": NGRAM_TOKENS,
        "near_share": NEAR_SHARE,
        "documents": len(shares),
        "exact": sum(share == 1 for share in shares),
        "near": sum(NEAR_SHARE <= share < 1 for share in shares),
        "examples": [i for i, share in enumerate(shares) if share >= NEAR_SHARE][:EXAMPLES],
        "ngrams": sum(map(len, counts)),
        "ngrams_found": sum(map(sum, counts)),
    }


few_tokens = st.lists(st.sampled_from([BOS, 2, 3, 4]), min_size=1, max_size=90)
quotes = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)), max_size=3)
cuts = st.lists(st.integers(0, 99), max_size=3)


@settings(deadline=None, max_examples=150)
@given(few_tokens, few_tokens, quotes, cuts, cuts, st.integers(1, 40), st.integers(1, 40))
def test_what_is_found_is_what_the_definition_says(
    tmp_path_factory, val, training, quoted, val_cuts, training_cuts, piece, block
):
    """With any text, any cut into shards, and pieces far smaller than an n-gram, too."""
    for start, length, place in quoted:
        training[place:place] = val[start : start + length]
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(overlap, "PIECE_TOKENS", piece)
        patch.setattr(overlap, "BLOCK_TOKENS", block)
        held_out = spans(folder, "val", val, val_cuts)
        found = find_overlap(held_out, spans(folder, "train", training, training_cuts), BOS, pool)
    assert found == as_defined(val, training)
