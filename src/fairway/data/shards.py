"""Token shards in the challenge's binary format.

256 little-endian int32 (magic 20240520, version 1, token count, zeros), then the tokens as
little-endian uint16.
"""

import os
from pathlib import Path

import numpy as np

from fairway.errors import UserError
from fairway.files import atomic_path, require_file

MAGIC = 20240520
VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = HEADER_WORDS * 4
TOKEN_TYPE = np.dtype("<u2")
MAX_VOCAB_SIZE = 1 << 16
CHUNK_TOKENS = 1 << 22  # 8 MiB at a time, whatever the size of a shard


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write tokens [n] (integers under 65,536) as a shard, atomically."""
    assert tokens.ndim == 1 and 0 < len(tokens) < 1 << 31
    assert tokens.dtype == np.uint16 or (tokens.min() >= 0 and tokens.max() < MAX_VOCAB_SIZE)
    header = np.zeros(HEADER_WORDS, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        header.tofile(file)
        np.ascontiguousarray(tokens, TOKEN_TYPE).tofile(file)


def shard_token_count(path: str | Path) -> int:
    """Number of tokens of a shard, from its header.

    Raises UserError where the file is missing, is no shard, or is not as long as the header says.
    """
    require_file(path, "tokenize, or of a published dataset")
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(
            f"shard {path} could not be read ({error.strerror}): check the path, or make it again"
        ) from error
    if len(header) < HEADER_BYTES:
        raise UserError(
            f"shard {path} is truncated: found {size} bytes, expected a header of {HEADER_BYTES}; "
            "fetch or make it again"
        )
    magic, version, tokens = (int(word) for word in np.frombuffer(header, "<i4", 3))
    if magic != MAGIC or version != VERSION:
        raise UserError(
            f"{path} is not a token shard: found magic {magic} and version {version}, expected "
            f"{MAGIC} and {VERSION}; check data.folder"
        )
    if tokens <= 0:
        raise UserError(f"shard {path} says that it holds {tokens} tokens: remove or replace it")
    expected = HEADER_BYTES + tokens * TOKEN_TYPE.itemsize
    if size != expected:
        fault = "truncated" if size < expected else "followed by foreign bytes"
        raise UserError(
            f"shard {path} is {fault}: found {size} bytes, expected {expected} for its {tokens} "
            "tokens; fetch or make it again"
        )
    return tokens


def read_shard(path: str | Path) -> np.memmap:
    """The tokens of a shard, uint16 [n], mapped into memory; raises as `shard_token_count`."""
    count = shard_token_count(path)
    return np.memmap(path, TOKEN_TYPE, mode="r", offset=HEADER_BYTES, shape=(count,))


def check_vocabulary(path: str | Path, vocab_size: int) -> None:
    """Raise UserError where a shard holds a token outside [0, vocab_size), or is no shard."""
    tokens = read_shard(path)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[start : start + CHUNK_TOKENS]
        if chunk.max() >= vocab_size:
            position = int(np.argmax(chunk >= vocab_size))
            raise UserError(
                f"shard {path} holds token {chunk[position]} at position {start + position}, "
                f"expected ids under data.vocab_size {vocab_size}: use the tokenizer that made it"
            )


class ShardWriter:
    """Cuts a stream of tokens into shards `prefix`_000000.bin, … of `shard_tokens` tokens.

    Holds at most one shard's tokens. `close` writes the rest; `paths` lists what was written.
    """

    def __init__(self, folder: str | Path, prefix: str, shard_tokens: int) -> None:
        self.paths: list[Path] = []
        self._folder = Path(folder)
        self._prefix = prefix
        self._buffer = np.empty(shard_tokens, TOKEN_TYPE)
        self._filled = 0

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens [n], integers under 65,536."""
        while len(tokens):
            taken = tokens[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            tokens = tokens[len(taken) :]
            if self._filled == len(self._buffer):
                self._flush()

    def close(self) -> None:
        """Write the tokens that do not fill a shard."""
        if self._filled:
            self._flush()

    def _flush(self) -> None:
        path = self._folder / f"{self._prefix}_{len(self.paths):06d}.bin"
        write_shard(path, self._buffer[: self._filled])
        self.paths.append(path)
        self._filled = 0
