"""The `data` section of the configuration."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fairway.config import check_data


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
        check_data(asdict(self))

    @property
    def has_shards(self) -> bool:
        """Whether the source is made of finished shards rather than of documents."""
        return self.source == "shards" or (self.source == "huggingface" and self.form == "shards")
