"""What a corpus is, for those who write one.

A corpus of your own is one class in a file beside the config, which the config names:

    data:
      name: letters
      source: {"text_folder:TextFolder": {folder: letters}}

docs/examples/text_folder.py is a whole one.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fairway.data.settings import DataSettings
from fairway.errors import UserError
from fairway.files import require_file
from fairway.settings import Settings


@dataclass(frozen=True)
class FinishedShards:
    """Token shards as they are, and the SentencePiece model that made them."""

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    tokenizer: Path


class Corpus:
    """Where the text of a dataset comes from. A subclass has a title, `files` and `documents`.

    settings: its own keys, an instance of its `Settings`.
    data: the whole section `data`, should it matter.

    A corpus is made whenever a config is read, so its module imports nothing heavy, and making one
    opens no file.
    """

    class Settings(Settings):
        """Keys that only this corpus has: by default none."""

    title: ClassVar[str]
    """Its name for people."""
    reads: ClassVar[tuple[str, ...]] = ()
    """The keys of section `data` that only some sources read, and this one does."""
    downloads: ClassVar[bool] = False
    """Whether it fetches over the network; such a job is tried again when it fails."""

    def __init__(self, settings: Settings, data: DataSettings) -> None:
        self.settings, self.data = settings, data

    @property
    def brings_shards(self) -> bool:
        """Whether it has finished shards, from `shards`, instead of `documents` to tokenize."""
        return False

    def check(self) -> None:
        """Raise UserError where section `data` lacks something or does not fit together."""

    def files(self) -> tuple[Path, ...]:
        """The local files that it reads; a change of any of them makes the dataset anew.

        It neither downloads nor reads; the files need not be there yet.
        """
        return ()

    def fetch(self) -> tuple[Path, ...]:
        """Get the files that `documents` reads, before it is called; provenance lists their hashes.

        Raises UserError where one is missing.
        """
        made_by = f"you for data.source {self.data.source.name!r}"
        return tuple(require_file(path, made_by) for path in self.files())

    def documents(self) -> Iterator[str]:
        """The documents, one string each, in a fixed order; validation takes the first.

        It is called twice: once to count the documents and train a tokenizer, once to encode them.
        """
        raise NotImplementedError(f"{type(self).__name__} has no documents")

    def shards(self) -> FinishedShards:
        """The finished shards where `brings_shards`, fetched first if need be."""
        raise NotImplementedError(f"{type(self).__name__} has no shards")


def finished_shards(folder: Path, tokenizer: Path) -> FinishedShards:
    """The shards in a folder of the challenge's layout.

    Raises UserError where a split has none, or where their numbers are not 0, 1, 2, … without gaps.
    """
    return FinishedShards(_require(folder, "train"), _require(folder, "val"), tokenizer)


def list_shards(folder: Path, split: str) -> tuple[Path, ...]:
    """Absolute paths of the shards of `split` (train or val) in `folder`, sorted by name."""
    return tuple(
        path.absolute()
        for pattern in _patterns(split)
        for path in sorted(folder.glob(pattern))
    )  # fmt: skip


def _require(folder: Path, split: str) -> tuple[Path, ...]:
    paths = list_shards(folder, split)
    if not paths:
        raise UserError(
            f"{folder} holds no {split} shards: expected {' or '.join(_patterns(split))}; "
            "check data.folder"
        )
    for pattern in _patterns(split):
        _check_numbers(folder, pattern, [path for path in paths if path.match(pattern)])
    return paths


def _check_numbers(folder: Path, pattern: str, paths: Sequence[Path]) -> None:
    """Require that shards of one pattern are numbered from 0 on, each once: none may be lost."""
    prefix, suffix = pattern.split("*")

    def number(path: Path) -> int:
        digits = path.name.removeprefix(prefix).removesuffix(suffix)
        return int(digits) if re.fullmatch("[0-9]+", digits) else -1

    for expected, path in enumerate(sorted(paths, key=number)):
        if number(path) != expected:
            raise UserError(
                f"{folder} holds {path.name} where {prefix}{expected:06d}{suffix} was expected: "
                "shards are numbered from 0 without gaps; fetch the missing ones, or remove those "
                "of another data set"
            )


def _patterns(split: str) -> tuple[str, ...]:
    return f"fineweb_{split}_*.bin", f"{split}_*.bin"
