"""Finished shards in a folder of the challenge's layout, used in place."""

from pathlib import Path

from fairway.data.corpora.base import Corpus, FinishedShards, finished_shards, list_shards
from fairway.errors import UserError


class Shards(Corpus):
    """The shards in `data.folder`, which the SentencePiece model `data.tokenizer` made."""

    title = "Finished shards"
    reads = ("folder", "tokenizer")

    @property
    def brings_shards(self) -> bool:
        return True

    def check(self) -> None:
        """Raise UserError where the folder or the tokenizer is not named."""
        if not self.data.folder:
            raise UserError("data.source is 'shards' but data.folder is not set: name the folder")
        if not self.data.tokenizer:
            raise UserError(
                "data.source is 'shards' but data.tokenizer is not set: name its .model file"
            )

    def files(self) -> tuple[Path, ...]:
        """The shards that lie in the folder now: one more, or a changed one, is another dataset."""
        folder = Path(self.data.folder)
        return (*list_shards(folder, "train"), *list_shards(folder, "val"))

    def shards(self) -> FinishedShards:
        """The shards, where they lie; UserError where a split has none."""
        return finished_shards(Path(self.data.folder), Path(self.data.tokenizer))
