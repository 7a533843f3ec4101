"""Section `data`: which text, which tokenizer, and how the tokens are split."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fairway.errors import UserError
from fairway.settings import Choice, Name, PathText, Settings

SOURCE_KEYS = ("paths", "folder", "repository", "revision", "form")
"""Keys that configure sources; each is read by those that name it in `Corpus.reads`."""

TRAINER_KEYS = ("case", "normalization")
"""Keys of a tokenizer to train; a given one says these by itself."""

DOCUMENT_KEYS = ("tokenizer", *TRAINER_KEYS, "max_train_docs", "shard_tokens", "seed")
"""Keys that say how documents become shards; finished shards need none of them."""

CHALLENGE_VAL_DOCS = 50_000

SMALLEST_TRAINED = 300
"""Tokens of a tokenizer to train: 256 bytes, 4 reserved ones, and some characters and merges."""


class SourceChoice(Choice):
    """A corpus: the name of one of Fairway's, or `module:Name` of your own, with its settings."""

    package = "fairway.data.corpora"


class DataSettings(Settings):
    """Which text, which tokenizer, and how the tokens are split."""

    name: Name
    """Folder under results/data."""
    source: SourceChoice
    """Where the text comes from."""
    paths: tuple[PathText, ...] = ()
    """For `jsonl`: the files, plain or .gz, .xz, .zst, in this order."""
    folder: PathText | None = None
    """For `shards`: a folder in the challenge's layout, used in place."""
    repository: str = "willdepueoai/parameter-golf"
    """For `huggingface`: the dataset repository."""
    revision: str | None = None
    """For `huggingface`: a commit or branch; null is the newest."""
    form: Literal["documents", "shards"] = "documents"
    """For `huggingface`: tokenize its documents, or take its shards and their tokenizer."""
    tokenizer: PathText | None = None
    """A SentencePiece .model to use; null trains one."""
    case: Literal["keep", "markers"] = "keep"
    """`markers`: a word with capitals is the same word in lower case after a token that marks them,
    for ASCII letters. Read where a tokenizer is trained; its file then says so to all users."""
    normalization: Literal["nfkc", "none"] = "nfkc"
    """`nfkc` makes equal what looks alike and each stretch of white space one space; `none` keeps
    the text as it is. Read where a tokenizer is trained."""
    vocab_size: int = Field(1024, ge=1, le=65536)
    """Tokens of the vocabulary, those of single bytes included; at least 300 to train one."""
    val_docs: int | None = Field(None, ge=1)
    """The first documents, kept for validation; null: 50,000. Finished shards must hold as many as
    are named here; null: any number."""
    max_train_docs: int | None = Field(None, ge=1)
    """Training documents at most; null takes all."""
    shard_tokens: int = Field(100_000_000, ge=1024, le=2**31 - 1)
    """Tokens of a shard."""
    selection_tokens: int = Field(1_048_576, ge=1)
    """A tail of the training text that train never draws: `ema.decay: auto` is chosen on it."""
    adaptation_tokens: int = Field(8_388_608, ge=1)
    """A tail of the training text that train never draws: `ttt.data: train` reads it."""
    check_overlap: bool = True
    """Whether to look for validation documents in the training text. Without, no audit passes."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Draws the documents that the tokenizer learns from where there are more than 5 million."""

    @model_validator(mode="after")
    def _fits_its_source(self) -> Self:
        corpus = self.corpus()
        corpus.check()
        trains = not corpus.brings_shards and self.tokenizer is None
        if trains and self.vocab_size < SMALLEST_TRAINED:
            raise UserError(
                f"data.vocab_size: found {self.vocab_size}, expected at least {SMALLEST_TRAINED} "
                "where a tokenizer is trained: raise it, or name a data.tokenizer"
            )
        read = {*corpus.reads, *(() if corpus.brings_shards else DOCUMENT_KEYS)}
        for key in (*SOURCE_KEYS, *DOCUMENT_KEYS):
            default = type(self).model_fields[key].default
            if key not in read and getattr(self, key) != default:
                finished = " when it brings finished shards" if corpus.brings_shards else ""
                raise UserError(
                    f"data.{key} is set, but data.source {self.source.name!r} does not read it"
                    f"{finished}: remove it, or give its default, {json.dumps(default)}"
                )
        for key in TRAINER_KEYS:
            default = type(self).model_fields[key].default
            if self.tokenizer is not None and getattr(self, key) != default:
                raise UserError(
                    f"data.{key} is {getattr(self, key)!r}, but data.tokenizer names a tokenizer "
                    "that is trained already: remove one of the two"
                )
        return self

    def check_with(self, sections: Mapping[str, Settings]) -> None:
        """Raise UserError where shards or the adaptation text are too short for a sequence."""
        sequence = sections["train"].sequence_tokens
        for key, is_read in (
            ("shard_tokens", not self.corpus().brings_shards),
            ("adaptation_tokens", sections["ttt"].data == "train"),
        ):
            if is_read and getattr(self, key) <= sequence:
                raise UserError(
                    f"data.{key} {getattr(self, key)} holds no sequence of train.sequence_tokens "
                    f"{sequence} and the token after it: raise it to at least {sequence + 1}"
                )

    @property
    def validation_documents(self) -> int:
        """How many of the first documents are validation."""
        return CHALLENGE_VAL_DOCS if self.val_docs is None else self.val_docs

    def corpus(self) -> Any:
        """The source itself, a `fairway.data.corpora.base.Corpus`."""
        return self.source.type(self.source.settings, self)

    def files(self) -> tuple[Path, ...]:
        """The local files that the dataset is made from: the declared inputs of tokenize."""
        given = () if self.tokenizer is None else (Path(self.tokenizer),)
        return (*self.corpus().files(), *given)
