"""English Wikipedia text that comes with a dependency.

The package pyate 0.5.3 carries sections of articles (license CC BY-SA 3.0,
https://creativecommons.org/licenses/by-sa/3.0/) as a CSV file in its source archive. Only that file
is read: the package is not imported, and its dependencies are not installed. The file is checked by
SHA-256, cleaned lightly, and kept in its order.
"""

import csv
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from fairway.data.corpora.base import Corpus
from fairway.errors import UserError
from fairway.files import sha256_of

EMBEDDED_PACKAGE = "pyate"
EMBEDDED_FILE = "pyate/default_general_domain.en.csv"
EMBEDDED_SHA256 = "b0f9e13f005e25090901169d430869c44945abe530b891afd05d5c9eb20a777e"
EMBEDDED_INSTALL = "pip install --no-deps --require-hashes -r corpus-requirements.txt"

SHORTEST_SECTION = 500  # characters; shorter sections are stubs and remnants of tables
SHORTEST_PARAGRAPH = 120  # characters; bibliographies, link lists and tables have shorter lines


class Embedded(Corpus):
    """English Wikipedia text, the same on every machine, from a package that is installed.

    It declares no `files`: the package's file is none of the user's, and its hash is fixed here.
    """

    title = "Wikipedia sections (pyate)"

    def fetch(self) -> tuple[Path, ...]:
        return (embedded_file(),)

    def documents(self) -> Iterator[str]:
        """Cleaned sections with prose in them, in the file's order, each text once."""
        seen: set[str] = set()
        with embedded_file().open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                text = clean_section(row["SECTION_TEXT"])
                if len(text) >= SHORTEST_SECTION and text not in seen and _is_prose(text):
                    seen.add(text)
                    yield text


def embedded_file() -> Path:
    """Path of the embedded corpus's CSV file, located without importing its package.

    Raises UserError that names the pip command where it is not installed or has other contents.
    """
    try:
        distribution = metadata.distribution(EMBEDDED_PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"the embedded corpus is not installed: run `{EMBEDDED_INSTALL}`"
        ) from error
    path = Path(str(distribution.locate_file(EMBEDDED_FILE)))
    if not path.is_file() or sha256_of(path) != EMBEDDED_SHA256:
        raise UserError(
            f"{path} is not the embedded corpus (SHA-256 {EMBEDDED_SHA256[:16]}… of "
            f"{EMBEDDED_PACKAGE} 0.5.3): run `{EMBEDDED_INSTALL} --force-reinstall`"
        )
    return path


def clean_section(text: str) -> str:
    """Wiki markup to plain text: no quote marks for emphasis, headings as lines of their own."""
    text = re.sub(r"'{2,}", "", text).replace("\N{NO-BREAK SPACE}", " ")
    text = re.sub(r"^=+\s*(.*?)\s*=+\s*$", r"\1", text, flags=re.MULTILINE)
    lines = (line.strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _is_prose(text: str) -> bool:
    """Whether at least half of the characters are in lines as long as paragraphs."""
    lengths = [len(line) for line in text.split("\n")]
    return 2 * sum(length for length in lengths if length >= SHORTEST_PARAGRAPH) >= len(text)
