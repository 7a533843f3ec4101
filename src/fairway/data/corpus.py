"""Documents, one string each, from whichever source the configuration names.

The `embedded` corpus is English Wikipedia text (sections of articles, licence CC BY-SA 3.0,
https://creativecommons.org/licenses/by-sa/3.0/) that the package pyate 0.5.3 carries as a CSV file
in its source archive. Only that file is read: the package is neither imported nor are its
dependencies installed. It is checked by SHA-256, cleaned lightly, and kept in its order.
"""

import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

import zstandard

from fairway.data.hub import fetch_documents
from fairway.data.settings import DataSettings
from fairway.errors import UserError
from fairway.files import require_file, sha256_of

EMBEDDED_PACKAGE = "pyate"
EMBEDDED_FILE = "pyate/default_general_domain.en.csv"
EMBEDDED_SHA256 = "b0f9e13f005e25090901169d430869c44945abe530b891afd05d5c9eb20a777e"
EMBEDDED_INSTALL = "pip install --no-deps --require-hashes -r corpus-requirements.txt"

SHORTEST_SECTION = 500  # characters; shorter sections are stubs and remnants of tables
SHORTEST_PARAGRAPH = 120  # characters; bibliographies, link lists and tables have shorter lines


def source_files(settings: DataSettings) -> tuple[Path, ...]:
    """The local files that `read_documents` reads, fetched or located; UserError where missing."""
    if settings.source == "embedded":
        return (embedded_file(),)
    if settings.source == "huggingface":
        return (fetch_documents(settings.repository, settings.revision),)
    assert settings.source == "jsonl", settings.source
    return tuple(
        require_file(path, "you: data.paths names the jsonl files") for path in settings.paths
    )


def read_documents(settings: DataSettings, files: Sequence[Path]) -> Iterator[str]:
    """The documents in `files` (from `source_files`) in their order, one at a time.

    Raises UserError for a line that is not `{"text": …}` (named as file:line), a damaged file, and
    a file without documents.
    """
    read = embedded_documents if settings.source == "embedded" else jsonl_documents
    for path in files:
        yield from read(path)


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


def embedded_documents(path: Path) -> Iterator[str]:
    """Cleaned sections with prose in them, in the file's order, each text once."""
    seen: set[str] = set()
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = clean_section(row["SECTION_TEXT"])
            if len(text) >= SHORTEST_SECTION and text not in seen and _is_prose(text):
                seen.add(text)
                yield text


def clean_section(text: str) -> str:
    """Wiki markup to plain text: no quote marks for emphasis, headings as lines of their own."""
    text = re.sub(r"'{2,}", "", text).replace("\N{NO-BREAK SPACE}", " ")
    text = re.sub(r"^=+\s*(.*?)\s*=+\s*$", r"\1", text, flags=re.MULTILINE)
    lines = (line.strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _is_prose(text: str) -> bool:
    """Whether at least half of the characters stand in lines as long as paragraphs."""
    lengths = [len(line) for line in text.split("\n")]
    return 2 * sum(length for length in lengths if length >= SHORTEST_PARAGRAPH) >= len(text)


def jsonl_documents(path: Path) -> Iterator[str]:
    """The `text` of each line of a .jsonl file, plain or .gz, .xz, .zst; empty lines are skipped.

    Raises UserError as file:line for a bad line, and for a damaged or empty file.
    """
    number = documents = 0
    try:
        with _open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, f"{path}:{number}")
                    documents += 1
    except (gzip.BadGzipFile, EOFError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(
            f"{path} is damaged after line {number} ({error}): expected a complete "
            f"{path.suffix} file; fetch it again"
        ) from error
    if documents == 0:
        raise UserError(f'{path} holds no documents: expected one {{"text": …}} a line')


def _parse_line(line: bytes, place: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{place} is not JSON ({error}): correct or remove the line") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{place} has no "text": expected {{"text": "…"}}; correct or remove it')
    if not _is_unicode(text):
        raise UserError(
            f"{place} holds a lone surrogate such as \\ud800, which is no Unicode text: "
            "correct or remove the line"
        )
    return text


def _is_unicode(text: str) -> bool:
    """Whether the text can be encoded: JSON escapes may name half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _open_binary(path: Path) -> BinaryIO:
    openers: dict[str, Callable[[Path], BinaryIO]] = {
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".zst": _open_zstandard,
    }
    return openers.get(path.suffix, lambda plain: plain.open("rb"))(path)


def _open_zstandard(path: Path) -> BinaryIO:
    # A file may be several frames one after the other, as pzstd and `cat` make them.
    reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
    return io.BufferedReader(reader)
