"""The challenge's shard format, byte for byte, and what is refused."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.data import shards
from fairway.data.shards import (
    ShardWriter,
    check_vocabulary,
    read_shard,
    shard_token_count,
    write_shard,
)
from fairway.errors import UserError


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "train_000000.bin"
    write_shard(path, np.arange(1000, dtype=np.uint16))
    return path


def test_layout_is_the_challenges(tmp_path):
    path = tmp_path / "train_000000.bin"
    write_shard(path, np.array([1, 513, 65535]))
    expected = struct.pack("<3i", 20240520, 1, 3).ljust(1024, b"\0") + struct.pack(
        "<3H", 1, 513, 65535
    )
    assert path.read_bytes() == expected


def test_the_largest_vocabulary_has_the_largest_id(tmp_path):
    path = tmp_path / "train_000000.bin"
    write_shard(path, np.array([1, 65535]))
    check_vocabulary(path, 65_536)
    with pytest.raises(UserError, match="holds token 65535 at position 1"):
        check_vocabulary(path, 65_535)


def test_reading_gives_back_what_was_written(shard):
    tokens = read_shard(shard)
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens, np.arange(1000))
    assert shard_token_count(shard) == 1000


def word(shard, index: int, value: int) -> None:
    data = bytearray(shard.read_bytes())
    struct.pack_into("<i", data, 4 * index, value)
    shard.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            "truncated: found 3023 bytes",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "truncated.*header of 1024"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"xx"), "followed by foreign bytes"),
        (lambda path: word(path, 0, 20240521), "not a token shard: found magic 20240521"),
        (lambda path: word(path, 1, 2), "version 2, expected 20240520 and 1"),
        (lambda path: word(path, 2, -5), "holds -5 tokens"),
        (lambda path: word(path, 2, 0), "holds 0 tokens"),
        (lambda path: path.write_bytes(bytes(2)), "truncated"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: [path.unlink(), path.mkdir()], "is a folder"),
        (lambda path: [path.unlink(), os.mkfifo(path)], "is no file"),
        (lambda path: [path.unlink(), path.symlink_to(path)], "is no file"),
        (lambda path: [path.unlink(), path.symlink_to("/dev/zero")], "is no file"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(shard, damage, complaint):
    damage(shard)
    with pytest.raises(UserError, match=complaint) as caught:
        read_shard(shard)
    assert str(shard) in str(caught.value)


def test_ids_outside_the_vocabulary_are_named(shard, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_TOKENS", 64)
    check_vocabulary(shard, 1000)
    with pytest.raises(UserError, match=r"token 700 at position 700.*vocab_size 700"):
        check_vocabulary(shard, 700)


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.integers(0, 40), max_size=20),
    shard_tokens=st.integers(1, 30),
)
def test_a_stream_survives_any_cut(tmp_path_factory, pieces, shard_tokens):
    folder = tmp_path_factory.mktemp("shards")
    stream = np.arange(sum(pieces), dtype=np.uint16)
    writer = ShardWriter(folder, "train", shard_tokens)
    for piece in np.split(stream, np.cumsum(pieces)):
        writer.write(piece)
    writer.close()
    parts = [read_shard(path) for path in writer.paths]
    assert [path.name for path in writer.paths] == sorted(path.name for path in folder.iterdir())
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, np.uint16), *parts]), stream)
    assert all(len(part) == shard_tokens for part in parts[:-1])
