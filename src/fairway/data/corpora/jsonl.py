"""Local files of one `{"text": …}` a line."""

import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from pydantic_core import from_json

from fairway.data.corpora.base import Corpus
from fairway.errors import UserError

MAX_LINE_BYTES = 1 << 26
"""A document is held in memory whole, and one of this size takes 3.3 GB to encode."""
MAX_EMPTY_LINES = 1_000_000
"""In a row; a file of nothing else, which packs to a 30,000th, is no text."""
MAX_WINDOW_BYTES = 1 << 31
"""`zstd --long=31` makes windows of this size, the largest that there are."""
COMPRESSED_BYTES = 1 << 10
"""A block that is decompressed at once: it becomes 32 MiB at most."""


@dataclass(frozen=True)
class _Compression:
    """A format whose files are streams one after the other, as `cat` and parallel tools make them.

    new_stream: makes what decompresses one stream: `decompress`, `eof`, `unused_data`.
    padding: zeros may stand behind a stream, a multiple of this; 0 where none may.
    """

    new_stream: Callable[[], Any]
    padding: int


COMPRESSIONS = {
    ".gz": _Compression(lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS), padding=1),
    ".xz": _Compression(
        lambda: lzma.LZMADecompressor(memlimit=MAX_WINDOW_BYTES + (1 << 27)), padding=4
    ),
    ".zst": _Compression(
        lambda: zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj(),
        padding=0,
    ),
}

DECODER = json.JSONDecoder(parse_int=float)
"""Only the text counts; as an integer a number of 5,000 digits would be an error."""


class Jsonl(Corpus):
    """The `text` of every line of `data.paths`, plain files or .gz, .xz, .zst."""

    title = "JSON lines"
    reads = ("paths",)

    def check(self) -> None:
        """Raise UserError where no file is listed."""
        if not self.data.paths:
            raise UserError("data.source is 'jsonl' but data.paths is empty: list the files")

    def files(self) -> tuple[Path, ...]:
        return tuple(map(Path, self.data.paths))

    def documents(self) -> Iterator[str]:
        for path in self.files():
            yield from read_jsonl(path)


def read_jsonl(path: Path) -> Iterator[str]:
    """The `text` of each line of a .jsonl file, plain or .gz, .xz, .zst; empty lines are skipped.

    Raises UserError as file:line for a bad line and one of more than MAX_LINE_BYTES, and for a file
    that is damaged, truncated, empty, or cannot be read.
    """
    number = empty = documents = 0
    try:
        with _open_binary(path) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                empty = 0 if line.strip() else empty + 1
                _check_size(line, empty, f"{path}:{number}")
                if not empty:
                    yield _parse_line(line, f"{path}:{number}")
                    documents += 1
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
        raise UserError(
            f"{path} is damaged after line {number} ({error}): expected a complete "
            f"{path.suffix} file; fetch it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} could not be read ({error.strerror}): check data.paths and its permissions"
        ) from error
    if documents == 0:
        raise UserError(f'{path} holds no documents: expected one {{"text": …}} a line')


def _check_size(line: bytes, empty: int, where: str) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise UserError(
            f"{where} has more than {MAX_LINE_BYTES:,} bytes, the most that a line may have: "
            "expected one document a line; cut it into documents"
        )
    if empty > MAX_EMPTY_LINES:
        raise UserError(
            f"{where} is empty like the {MAX_EMPTY_LINES:,} lines before it: expected one "
            "document a line; remove the empty lines"
        )


def _parse_line(line: bytes, where: str) -> str:
    try:
        entry = DECODER.decode(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if _is_cut(line):
            raise UserError(
                f"{where} is truncated: the file ends within this line; fetch or make it again"
            ) from error
        if isinstance(error, UnicodeDecodeError):
            raise UserError(
                f"{where} is not UTF-8 ({error}): expected text, plain or compressed in a file "
                f"that ends in {', '.join(COMPRESSIONS)}; convert it, or correct its name"
            ) from error
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


def _is_cut(line: bytes) -> bool:
    """Whether a line that is no JSON would go on, had the file not ended."""
    try:
        from_json(line)
    except ValueError as error:
        return not line.endswith(b"\n") and str(error).startswith("EOF")
    return False


def _is_unicode(text: str) -> bool:
    """Whether the text can be encoded: JSON escapes may name half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _open_binary(path: Path) -> BinaryIO:
    file, compression = path.open("rb"), COMPRESSIONS.get(path.suffix)
    return io.BufferedReader(_Decompressed(file, compression)) if compression else file


class _Decompressed(io.RawIOBase):
    """The bytes of a compressed file. EOFError where it ends within a stream, or before the first.

    Python's own readers of these formats take some files that were cut short for whole ones.
    """

    def __init__(self, file: BinaryIO, compression: _Compression) -> None:
        self._file, self._blocks = file, _decompress(file, compression)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        target = memoryview(buffer)
        taken = self._rest[: len(target)]
        self._rest = self._rest[len(target) :]
        target[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self._file.close()
        super().close()


def _decompress(file: BinaryIO, compression: _Compression) -> Iterator[bytes]:
    stream, zeros = compression.new_stream(), 0
    while block := file.read(COMPRESSED_BYTES):
        while block:
            if stream.eof:
                padded = len(block)
                block = block.lstrip(b"\0") if compression.padding else block
                zeros += padded - len(block)
                if not block:
                    break
                _check_padding(zeros, compression)
                stream, zeros = compression.new_stream(), 0
            yield stream.decompress(block)
            block = stream.unused_data
    if not stream.eof:
        raise EOFError("it is truncated")
    _check_padding(zeros, compression)


def _check_padding(zeros: int, compression: _Compression) -> None:
    if zeros and zeros % compression.padding:
        raise EOFError("it is truncated, or damaged in its padding")
