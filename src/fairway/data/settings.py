"""The `data` section of the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass

from fairway.errors import UserError


@dataclass(frozen=True)
class DataSettings:
    """Which text, which tokenizer, and how the tokens are split; the schema documents each key.

    Raises UserError where a source lacks the key that it needs.
    """

    name: str
    source: str
    paths: Sequence[str]
    folder: str | None
    repository: str
    revision: str | None
    form: str
    tokenizer: str | None
    vocab_size: int
    val_docs: int
    max_train_docs: int | None
    shard_tokens: int
    selection_tokens: int
    adaptation_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if self.source == "jsonl" and not self.paths:
            raise UserError("data.source is 'jsonl' but data.paths is empty: list the files")
        if self.source == "shards" and not self.folder:
            raise UserError("data.source is 'shards' but data.folder is not set: name the folder")
        if self.source == "shards" and not self.tokenizer:
            raise UserError(
                "data.source is 'shards' but data.tokenizer is not set: name its .model file"
            )
        if self.source == "huggingface" and self.has_shards and self.tokenizer:
            raise UserError(
                "data.tokenizer is set but data.form is 'shards', which brings its own tokenizer: "
                "remove data.tokenizer or set data.form to 'documents'"
            )

    @property
    def has_shards(self) -> bool:
        """Whether the source is made of finished shards rather than of documents."""
        return self.source == "shards" or (self.source == "huggingface" and self.form == "shards")
