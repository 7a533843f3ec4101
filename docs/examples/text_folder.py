"""A corpus of your own: a folder of .txt files, one document each, in the order of their names.

Put this file beside the config, and name it there:

    data:
      name: letters
      source: {"text_folder:TextFolder": {folder: letters}}
      val_docs: 5
"""

from collections.abc import Iterator
from pathlib import Path

from fairway.data.corpora.base import Corpus
from fairway.settings import Settings


class TextFolder(Corpus):
    """The .txt files of a folder, in UTF-8; changing or adding one makes the dataset anew."""

    class Settings(Settings):
        folder: str
        """Where the files lie."""

    title = "Folder of text files"

    def files(self) -> tuple[Path, ...]:
        """The folder's .txt files, sorted by name."""
        return tuple(sorted(Path(self.settings.folder).glob("*.txt")))

    def documents(self) -> Iterator[str]:
        """One document a file."""
        for path in self.files():
            yield path.read_text(encoding="utf-8")
