"""Describe shards: cut them into splits, and count each split's tokens, bytes and documents."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from fairway.data.dataset import Span
from fairway.data.manifest_fields import FORMAT, TRAINING_SPLITS
from fairway.data.overlap import find_overlap
from fairway.data.settings import DataSettings
from fairway.data.shards import CHUNK_TOKENS, check_vocabulary, shard_token_count
from fairway.data.token_bytes import ByteCounts, byte_counts, token_bytes
from fairway.data.tokenizer import load_tokenizer
from fairway.data.verified import shard_hashes
from fairway.errors import UserError
from fairway.files import sha256_of

ENOUGH_DOCUMENTS = 20
"""Of validation text. One of the quickstart's 12 holds a third of the bytes, which leaves the test
over documents 2.3 degrees of freedom."""
ENOUGH_TOKENS = 10_000
"""Of validation text. A token's loss scatters by 2 to 3 nats, so the mean of this many by 0.03."""


def describe_dataset(
    settings: DataSettings,
    tokenizer_path: Path,
    train: Sequence[Path],
    val: Sequence[Path],
    threads: int,
) -> dict[str, Any]:
    """The manifest of a dataset, as JSON values; the same whatever the number of threads.

    Every shard is read and hashed, which `data/verified.py` remembers for the stages that follow.
    Shards beside the tokenizer are named relative to it, others by their absolute path. `warnings`
    says where the validation text has fewer than ENOUGH_DOCUMENTS or ENOUGH_TOKENS, and how many of
    its documents are empty or occur in the training text. `original` is left to those who know it.
    Raises UserError for a faulty shard, ids outside the vocabulary, too little training text, text
    without bytes, and validation text without documents.
    """
    folder = tokenizer_path.parent
    tokenizer = load_tokenizer(tokenizer_path, settings.vocab_size)
    whole = {path: Span(path, 0, shard_token_count(path)) for path in (*train, *val)}
    splits = cut_training_text(
        [whole[path] for path in train], settings.selection_tokens, settings.adaptation_tokens
    )
    splits["val"] = [whole[path] for path in val]
    hashes = shard_hashes(folder, dict.fromkeys(_name(path, folder) for path in whole), threads)
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(partial(check_vocabulary, vocab_size=settings.vocab_size), whole):
            pass
        measure = partial(_measure, counts=byte_counts(tokenizer), bos=tokenizer.bos_id())
        spans = [span for split in splits.values() for span in split]
        previous = _predecessors(splits, tokenizer.bos_id())
        measured = dict(zip(spans, pool.map(measure, spans, previous), strict=True))
    totals = {
        split: sum((measured[span] for span in spans), Counter()) for split, spans in splits.items()
    }
    _check_text(totals)
    overlap = None
    if settings.check_overlap:
        with ThreadPoolExecutor(threads) as pool:
            training = [whole[path] for path in train]
            overlap = find_overlap(splits["val"], training, tokenizer.bos_id(), pool)
    return {
        "format": FORMAT,
        "name": settings.name,
        "source": settings.source.name,
        "vocab_size": settings.vocab_size,
        "bos_id": tokenizer.bos_id(),
        "tokenizer": {"path": tokenizer_path.name, "sha256": sha256_of(tokenizer_path)},
        "shards": {
            name: {"tokens": len(span), "sha256": sha256}
            for (name, sha256), span in zip(hashes.items(), whole.values(), strict=True)
        },
        "splits": {
            split: {
                "spans": [
                    {"path": _name(span.path, folder), "start": span.start, "stop": span.stop}
                    for span in spans
                ],
                **{unit: totals[split][unit] for unit in ("tokens", "bytes", "documents")},
            }
            for split, spans in splits.items()
        },
        "original": None,
        "overlap": overlap,
        "warnings": [*_weaknesses(totals["val"]), *_occurrences(overlap)],
    }


def cut_training_text(
    shards: Sequence[Span], selection_tokens: int, adaptation_tokens: int
) -> dict[str, list[Span]]:
    """Cut whole training shards, laid end to end, into TRAINING_SPLITS in that order.

    Raises UserError where the tails leave nothing to train on.
    """
    total = sum(map(len, shards))
    reserved = selection_tokens + adaptation_tokens
    if reserved >= total:
        raise UserError(
            f"the training text has {total} tokens, expected more than the {reserved} of "
            "data.selection_tokens and data.adaptation_tokens together: lower them or bring more "
            "text"
        )
    cuts = (0, total - reserved, total - adaptation_tokens, total)
    return {
        split: _spans_between(shards, start, stop)
        for split, start, stop in zip(TRAINING_SPLITS, cuts[:-1], cuts[1:], strict=True)
    }


def _spans_between(shards: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The parts of whole shards, laid end to end, that fall in [start, stop)."""
    offsets = accumulate(map(len, shards[:-1]), initial=0)
    return [
        Span(shard.path, max(start - offset, 0), min(stop - offset, len(shard)))
        for shard, offset in zip(shards, offsets, strict=True)
        if start < offset + len(shard) and offset < stop
    ]


def _name(path: Path, folder: Path) -> str:
    return path.name if path.parent == folder else str(path)


def _predecessors(splits: dict[str, list[Span]], bos: int) -> list[int]:
    """For each span, the token before it in its text; BOS before the first of a text."""
    training = [span for split in TRAINING_SPLITS for span in splits[split]]
    return [
        token
        for text in (training, splits["val"])
        for token in (bos, *(int(span.read()[-1]) for span in text[:-1]))
    ]


def _measure(span: Span, previous: int, counts: ByteCounts, bos: int) -> Counter[str]:
    """tokens, bytes, documents, documents with_text of a span that follows the token `previous`."""
    tokens = span.read()
    total: Counter[str] = Counter(tokens=len(tokens))
    for start in range(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[start : start + CHUNK_TOKENS]
        with_previous = np.concatenate([np.array([previous], chunk.dtype), chunk])
        begins = with_previous == bos
        total["bytes"] += int(token_bytes(with_previous, counts).sum(dtype=np.int64))
        total["documents"] += int(np.count_nonzero(begins[1:]))
        total["with_text"] += int(np.count_nonzero(begins[:-1] & ~begins[1:]))
        previous = int(chunk[-1])
    return total


def _check_text(totals: Mapping[str, Mapping[str, int]]) -> None:
    """Raise UserError for text that no number can be drawn from."""
    training = sum(totals[split]["bytes"] for split in TRAINING_SPLITS)
    for name, text_bytes in (("training", training), ("validation", totals["val"]["bytes"])):
        if text_bytes == 0:
            raise UserError(
                f"the {name} documents stand for no bytes, expected text: bring other documents"
            )
    if totals["val"]["documents"] == 0:
        raise UserError(
            "the validation shards hold no BOS token, which must precede each document: name the "
            "data.tokenizer that made them"
        )


def _weaknesses(val: Mapping[str, int]) -> list[str]:
    """What the validation text is too small to tell, a sentence each."""
    documents, tokens = val["documents"], val["tokens"]
    empty = documents - val["with_text"]
    found = []
    if documents < ENOUGH_DOCUMENTS:
        found.append(
            f"The validation text has {documents} documents: of fewer than {ENOUGH_DOCUMENTS} one "
            "may decide, so intervals over documents are wide."
        )
    if tokens < ENOUGH_TOKENS:
        found.append(
            f"The validation text has {tokens:,} tokens: over fewer than {ENOUGH_TOKENS:,}, chance "
            "moves the mean loss by 0.03 nats or more."
        )
    if empty > 0:
        found.append(f"{empty} of the {documents} validation documents are empty.")
    return found


def _occurrences(overlap: Mapping[str, Any] | None) -> list[str]:
    if overlap is None or overlap["exact"] + overlap["near"] == 0:
        return []
    found = overlap["exact"] + overlap["near"]
    return [
        f"{found} of the {overlap['documents']} validation documents occur in the training text, "
        f"{overlap['exact']} exactly and {overlap['near']} nearly."
    ]
