"""Which validation documents occur in the training text, exactly or nearly.

A document is cut into its n-grams, every sequence of NGRAM_TOKENS tokens within it. The share of
them that occurs anywhere in the training text says how much of the document was there to learn. A
document that is shorter is one n-gram, filled up with BOS, and occurs where it is a whole document.
Tokens are compared, so what the tokenizer's normalization makes equal is equal.

Only 64-bit hashes of the validation text are kept, with some 45 bytes for each of its tokens at
most; the training text streams past them. Other text of the same hash would count as found: of 60
million tokens of validation and 10 billion of training that is to be expected for 0.03 n-grams.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np

from fairway.data.dataset import Span
from fairway.data.shards import MAX_VOCAB_SIZE, TOKEN_TYPE
from fairway.progress import progress

NGRAM_TOKENS = 16
"""6 or 7 English words in a vocabulary of 1,024, about 10 in one of 8,192; a power of two."""
NEAR_SHARE = 0.5
"""A document occurs nearly where at least this share of its n-grams does, and not all."""
EXAMPLES = 20
"""So many documents are listed by their number, at most."""

PIECE_TOKENS = 1 << 24
"""A thread's share at a time; found n-grams are looked up together, which is far faster."""
BLOCK_TOKENS = 1 << 16
"""Hashed at once: a few arrays of this length stay in the processor's cache."""
FILTER_BITS = 16
"""Bits of the filter for each hash: of n-grams that do not occur one in so many passes it."""

_RANDOM = np.random.default_rng(0)
_TOKEN_HASHES = _RANDOM.integers(0, 1 << 64, MAX_VOCAB_SIZE, dtype=np.uint64)
_FACTORS = _RANDOM.integers(0, 1 << 62, NGRAM_TOKENS.bit_length() - 1, dtype=np.uint64) * 4 + 3
"""Of the form 4k + 3: tokens in another order differ in all bits but a few of the lowest."""


def find_overlap(
    val: Sequence[Span], training: Sequence[Span], bos: int, pool: Executor
) -> dict[str, Any]:
    """What of the text `val` occurs in the text `training`, as JSON values for the manifest.

    exact: documents of which all n-grams occur. near: others of which NEAR_SHARE or more do.
    documents: of how many. examples: numbers of the first of both, from 0. ngrams, ngrams_found: of
    the whole validation text.
    """
    hashes, documents, count = _validation_hashes(val, bos)
    seen = np.zeros(len(hashes), np.bool_)
    find = partial(_find, hashes=hashes, bits=_filter(hashes), bos=bos)
    with progress(sum(map(len, training)) + 1, "overlap", "token") as bar:
        for found, tokens in pool.map(find, _pieces(training, bos, PIECE_TOKENS)):
            seen[found] = True
            bar.update(tokens)
    is_first = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
    seen = seen[is_first][np.cumsum(is_first) - 1]  # the same n-gram again
    ngrams = np.bincount(documents, minlength=count)
    share = np.bincount(documents[seen], minlength=count) / np.maximum(ngrams, 1)
    return {
        "ngram_tokens": NGRAM_TOKENS,
        "near_share": NEAR_SHARE,
        "documents": count,
        "exact": int(np.count_nonzero(share == 1)),
        "near": int(np.count_nonzero((share >= NEAR_SHARE) & (share < 1))),
        "examples": np.flatnonzero(share >= NEAR_SHARE)[:EXAMPLES].tolist(),
        "ngrams": len(seen),
        "ngrams_found": int(np.count_nonzero(seen)),
    }


Piece = tuple[np.ndarray, np.ndarray]
"""Tokens, and the NGRAM_TOKENS before them (fewer at the start of the text)."""


def _pieces(spans: Sequence[Span], bos: int, size: int) -> Iterator[Piece]:
    """A text in pieces of `size` tokens at most; a BOS stands before it and after it."""
    mark = np.full(1, bos, TOKEN_TYPE)
    before = mark
    for tokens in (*(span.read() for span in spans), mark):
        for start in range(0, len(tokens), size):
            piece = tokens[start : start + size]
            yield piece, before
            before = np.concatenate([before, piece[-NGRAM_TOKENS:]])[-NGRAM_TOKENS:]


def _validation_hashes(spans: Sequence[Span], bos: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The sorted hashes uint64 [n] of the n-grams within documents, the documents' numbers int32
    [n], and how many documents there are."""
    hashes, documents = [], []
    begun = -int(spans[0].read()[0] == bos)  # a text without one begins in its first document
    for piece, before in _pieces(spans, bos, BLOCK_TOKENS):
        tokens = np.concatenate([before, piece])
        marks = np.cumsum(tokens == bos, dtype=np.int32)
        number = marks + (begun - marks[len(before) - 1])
        ngrams, last = _ngrams(tokens, len(before))
        within = marks[last] == np.append(0, marks)[last - NGRAM_TOKENS + 1]
        short, short_last = _short_documents(tokens, len(before), bos)
        hashes += [ngrams[within], short]
        documents += [number[last[within]], number[short_last]]
        begun = number[-1]
    hashes, documents = np.concatenate(hashes), np.concatenate(documents)
    order = np.argsort(hashes)
    return hashes[order], documents[order], int(begun)


def _find(
    piece: Piece, *, hashes: np.ndarray, bits: np.ndarray, bos: int
) -> tuple[np.ndarray, int]:
    """The first indices of the sorted `hashes` that occur in a piece, and its tokens."""
    tokens = np.concatenate(piece[::-1])
    begin = len(piece[1])
    candidates = []
    for start in range(begin, len(tokens), BLOCK_TOKENS):
        block = tokens[max(0, start - NGRAM_TOKENS) : start + BLOCK_TOKENS]
        before = min(start, NGRAM_TOKENS)
        for found, _ in (_ngrams(block, before), _short_documents(block, before, bos)):
            candidates.append(found[_passes(found, bits)])
    candidates = np.sort(np.concatenate(candidates))
    index = np.minimum(np.searchsorted(hashes, candidates), len(hashes) - 1)
    return index[hashes[index] == candidates], len(piece[0])


def _ngrams(tokens: np.ndarray, begin: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of the n-grams that end at `begin` or later, and the indices where they end."""
    hashes = _hash(tokens[max(0, begin - NGRAM_TOKENS + 1) :])
    return hashes, np.arange(len(tokens) - len(hashes), len(tokens))


def _short_documents(tokens: np.ndarray, begin: int, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of documents shorter than an n-gram whose next BOS is at `begin` or later, and the
    indices where they end."""
    marks = np.flatnonzero(tokens == bos)
    size = np.diff(marks) - 1
    is_short = (size > 0) & (size < NGRAM_TOKENS) & (marks[1:] >= begin)
    start, size = marks[:-1][is_short] + 1, size[is_short]
    offset = np.arange(NGRAM_TOKENS)
    inside = offset < size[:, None]
    filled = np.where(inside, tokens[(start[:, None] + offset) * inside], bos)
    return _hash(filled)[:, 0], start + size - 1


def _hash(tokens: np.ndarray) -> np.ndarray:
    """uint64 [..., n − NGRAM_TOKENS + 1], of each n-gram of tokens [..., n]: from those of its
    halves, and these from theirs."""
    hashes = _TOKEN_HASHES[tokens]
    for level, factor in enumerate(_FACTORS):
        half = 1 << level
        whole = hashes[..., :-half] * factor
        whole += hashes[..., half:]
        hashes = whole
    return hashes


def _filter(hashes: np.ndarray) -> np.ndarray:
    """A bit for each value of a hash's topmost bits, set where one of `hashes` has it."""
    places = max(8, FILTER_BITS * len(hashes))
    bits = np.zeros(1 << (places - 1).bit_length() - 3, np.uint8)
    for start in range(0, len(hashes), BLOCK_TOKENS):
        byte, place = _place(hashes[start : start + BLOCK_TOKENS], bits)
        np.bitwise_or.at(bits, byte, np.uint8(1) << place)
    return bits


def _passes(hashes: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Whether each hash is one of those of the filter, or has their topmost bits by chance."""
    byte, place = _place(hashes, bits)
    return (bits[byte] >> place & np.uint8(1)).view(np.bool_)


def _place(hashes: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    top = hashes >> np.uint64(64 - (8 * len(bits) - 1).bit_length())
    return (top >> np.uint64(3)).view(np.int64), (top & np.uint64(7)).astype(np.uint8)
