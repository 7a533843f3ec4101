"""A tokenized dataset as later stages see it: a manifest that cuts shards into splits."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairway.data.manifest_fields import MADE_BY, SPLITS, Manifest, read_manifest, refuse
from fairway.data.shards import check_vocabulary, read_shard, shard_token_count
from fairway.data.tokenizer import load_tokenizer
from fairway.errors import UserError
from fairway.files import require_file, sha256_of
from fairway.phases import phase


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a shard."""

    path: Path
    start: int
    stop: int

    def read(self) -> np.ndarray:
        """The span's tokens, uint16 [stop - start], mapped into memory."""
        return read_shard(self.path)[self.start : self.stop]

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Dataset:
    """Splits of one tokenized text.

    splits: for each that was loaded its spans in reading order. `selection` and `adaptation` are
    tails of the training text that `train` does not contain.
    original_bytes: of the validation text before normalization; None where that is not known.
    """

    vocab_size: int
    bos_id: int
    tokenizer_path: Path
    splits: dict[str, tuple[Span, ...]]
    original_bytes: int | None = None


@phase("read")
def load_dataset(
    manifest_path: str | Path, splits: Iterable[str] = SPLITS, *, check_hashes: bool = True
) -> Dataset:
    """Read manifest.json; check it against itself, its tokenizer and the splits' shards.

    splits: those of SPLITS that will be read; only their shards are looked at.
    check_hashes: whether tokenizer and shards must be those that the manifest describes. Only the
    audit, which has a verdict for others, does without.
    Raises UserError for a missing, foreign or contradictory manifest, for another tokenizer, and
    for a shard that is missing, truncated, of another length or content than when the manifest was
    written, or has ids outside the vocabulary.
    """
    manifest_path = Path(manifest_path)
    manifest, folder = read_manifest(manifest_path), manifest_path.parent
    tokenizer_path = require_file(folder / manifest.tokenizer.path, MADE_BY)
    if check_hashes:
        _check_hash(tokenizer_path, manifest.tokenizer.sha256, manifest_path)
        _check_tokenizer(tokenizer_path, manifest, manifest_path)

    def check(name: str) -> None:
        path, shard = folder / name, manifest.shards[name]
        tokens = shard_token_count(path)
        if tokens != shard.tokens:
            raise UserError(
                f"shard {path} holds {tokens} tokens, {manifest_path} lists {shard.tokens}: "
                f"expected the file made by {MADE_BY}"
            )
        check_vocabulary(path, manifest.vocab_size)
        if check_hashes:
            _check_hash(path, shard.sha256, manifest_path)

    spans = {split: manifest.split(split).spans for split in splits}
    names = dict.fromkeys(span.path for split in spans.values() for span in split)
    with ThreadPoolExecutor() as pool:
        list(pool.map(check, names))
    return Dataset(
        vocab_size=manifest.vocab_size,
        bos_id=manifest.bos_id,
        tokenizer_path=tokenizer_path,
        splits={
            split: tuple(Span(folder / span.path, span.start, span.stop) for span in cut)
            for split, cut in spans.items()
        },
        original_bytes=manifest.original and manifest.original.validation.bytes,
    )


def _check_hash(path: Path, listed: str, manifest_path: Path) -> None:
    found = sha256_of(path)
    if found != listed:
        raise UserError(
            f"{path} has changed since it was made: found SHA-256 {found[:12]}, {manifest_path} "
            f"lists {listed[:12]}; expected the file made by {MADE_BY}"
        )


def _check_tokenizer(path: Path, manifest: Manifest, manifest_path: Path) -> None:
    tokenizer = load_tokenizer(path)
    for field, expected in (
        ("vocab_size", tokenizer.vocab_size()),
        ("bos_id", tokenizer.bos_id()),
    ):
        if getattr(manifest, field) != expected:
            refuse(manifest_path, field, getattr(manifest, field), f"{expected}, as {path} has")


@phase("read")
def read_split(dataset: Dataset, split: str) -> np.ndarray:
    """All tokens of a split in order, uint16 [n], copied into memory."""
    return np.concatenate([span.read() for span in dataset.splits[split]])
