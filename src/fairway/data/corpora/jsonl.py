"""Local files of one `{"text": …}` a line."""

import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from fairway.data.corpora.base import Corpus
from fairway.errors import UserError


class Jsonl(Corpus):
    """The `text` of every line of `data.paths`, plain files or .gz, .xz, .zst."""

    title = "JSON lines"
    reads = ("paths",)

    def check(self) -> None:
        """Raise UserError where no file is listed."""
        if not self.data.paths:
            raise UserError("data.source is 'jsonl' but data.paths is empty: list the files")

    def files(self) -> tuple[Path, ...]:
        """The listed files."""
        return tuple(map(Path, self.data.paths))

    def documents(self) -> Iterator[str]:
        """The documents of one file after the other."""
        for path in self.files():
            yield from read_jsonl(path)


def read_jsonl(path: Path) -> Iterator[str]:
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


def _parse_line(line: bytes, where: str) -> str:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is not JSON ({error}): correct or remove the line") from error
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where} has no "text": expected {{"text": "…"}}; correct or remove it')
    if not _is_unicode(text):
        raise UserError(
            f"{where} holds a lone surrogate such as \\ud800, which is no Unicode text: "
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
