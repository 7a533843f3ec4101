"""A tokenized dataset as later stages see it: a manifest that cuts shards into splits."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairway.data.shards import check_vocabulary, read_shard, shard_token_count
from fairway.errors import UserError
from fairway.files import read_json, require_file

FORMAT = 1
SPLITS = ("train", "selection", "adaptation", "val")


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

    splits: for each of SPLITS its spans in reading order. `selection` and `adaptation` are tails
    of the training text that `train` does not contain.
    """

    vocab_size: int
    bos_id: int
    tokenizer_path: Path
    splits: dict[str, tuple[Span, ...]]


def load_dataset(manifest_path: str | Path) -> Dataset:
    """Read manifest.json, and check every shard that it names.

    Raises UserError for a missing or foreign manifest, and for a shard that is missing, truncated,
    of another length than when the manifest was written, or has ids outside the vocabulary.
    """
    manifest_path = Path(manifest_path)
    manifest = read_json(manifest_path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"{manifest_path} is not a dataset manifest of format {FORMAT}: rerun tokenize"
        )
    folder = manifest_path.parent
    vocab_size = manifest["vocab_size"]

    def check(entry: tuple[str, dict]) -> None:
        path, shard = folder / entry[0], entry[1]
        tokens = shard_token_count(path)
        if tokens != shard["tokens"]:
            raise UserError(
                f"shard {path} holds {tokens} tokens, expected {shard['tokens']} as "
                f"{manifest_path} says: rerun tokenize"
            )
        check_vocabulary(path, vocab_size)

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, manifest["shards"].items()))
    return Dataset(
        vocab_size=vocab_size,
        bos_id=manifest["bos_id"],
        tokenizer_path=require_file(folder / manifest["tokenizer"]["path"], "tokenize"),
        splits={
            split: tuple(
                Span(folder / span["path"], span["start"], span["stop"])
                for span in manifest["splits"][split]["spans"]
            )
            for split in SPLITS
        },
    )


def read_split(dataset: Dataset, split: str) -> np.ndarray:
    """All tokens of a split in order, uint16 [n], copied into memory."""
    return np.concatenate([span.read() for span in dataset.splits[split]])
