"""The readers of files: what is written is read; anything else is refused in one line, soon."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fairway import files
from fairway.errors import UserError
from fairway.files import (
    MAXIMUM_JSON_BYTES,
    read_batches,
    read_json,
    read_table,
    read_tensors,
    write_json,
    write_table,
    write_tensors,
)
from fairway.model.weights import load_model
from malformed_products import ODD_TEXTS, time_limit

COLUMNS = {"step": "int64", "loss": "float64", "own": "bool"}
READERS = {
    "JSON": lambda path: read_json(path, "a stage"),
    "parquet": lambda path: read_table(path, "a stage", COLUMNS),
    "parquet in batches": lambda path: list(read_batches(path, "a stage", COLUMNS)),
    "safetensors": lambda path: read_tensors(path, "a stage"),
}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}


def table(rows: int = 7) -> pd.DataFrame:
    step = np.arange(rows, dtype=np.int32)
    return pd.DataFrame({"step": step, "loss": step / 3, "own": step % 2 == 0, "more": "text"})


@pytest.fixture(params=READERS)
def reader(request):
    return READERS[request.param]


def refused(reader, path: Path) -> str:
    """The line in which a reader refuses a file."""
    with time_limit(), pytest.raises(UserError) as caught:
        reader(path)
    line = str(caught.value)
    assert str(path) in line and "a stage" in line and "\n" not in line and len(line) < 600
    return line


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "is missing"),
        (Path.mkdir, "is a folder"),
        (os.mkfifo, "is no file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no file"),
        (lambda path: path.symlink_to(path), "is no file"),
        (lambda path: path.symlink_to("/nothing"), "is missing"),
    ],
)
def test_what_is_no_file_is_not_opened(tmp_path, reader, make, told):
    path = tmp_path / "file"
    make(path)
    assert told in refused(reader, path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/beneath"])
def test_a_name_that_no_file_has_is_told(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="expected a file made by a stage"):
        read_json(tmp_path / name, "a stage")


@pytest.mark.parametrize("text", [one for one in ODD_TEXTS if not one[:1].isalnum()])
def test_a_file_of_another_format_is_refused(tmp_path, text):
    path = tmp_path / "file"
    path.write_bytes(text)
    for name, reader in READERS.items():
        if name != "JSON" or text not in (b"[]", b"{}", b'"text"'):
            refused(reader, path)


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**300), 10**300) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(value=plain_values)
def test_json_that_is_written_is_read(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path, "a stage") == value


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(data)
    for name, reader in READERS.items():
        try:
            reader(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert name == "JSON" and json.loads(data) is not NotImplemented


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "has the key 'a' twice"),
        ('{"a": NaN}', "has the number NaN"),
        ('{"a": -Infinity}', "has the number -Infinity"),
        ('{"a": 1e999}', "has the number 1e999"),
        ('{"a": ' + "9" * 5000 + "}", "has the number 9999"),
        ("[" * 101 + "]" * 101, "nested too deeply"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('"\\ud800"', "surrogates not allowed"),
        ("[1,", "Expecting value"),
        ("", "Expecting value"),
    ],
)
def test_json_says_what_is_wrong_with_it(tmp_path, text, told):
    path = tmp_path / "file.json"
    path.write_text(text)
    assert told in refused(READERS["JSON"], path)


def test_sizes_beyond_reason_are_refused_unread(tmp_path, monkeypatch):
    """A long file, a header of 8 EiB, and a small parquet file of many numbers."""
    long, header, bomb = (tmp_path / name for name in ("long", "header", "bomb"))
    with open(long, "wb") as file:
        file.truncate(MAXIMUM_JSON_BYTES + 1)
    header.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    write_table(bomb, pd.DataFrame({"step": np.zeros(1 << 22, np.int64)}))
    assert bomb.stat().st_size < 1 << 16
    monkeypatch.setattr(files, "MAXIMUM_TABLE_NUMBERS", 1 << 21)
    tracemalloc.start()
    assert "more than" in refused(READERS["JSON"], long)
    assert "header too large" in refused(READERS["safetensors"], header)
    assert "rows" in refused(lambda path: read_table(path, "a stage"), bomb)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_tables_survive_the_file(tmp_path):
    path = tmp_path / "table.parquet"
    write_table(path, table())
    whole, batches = read_table(path, "a stage", COLUMNS), read_batches(path, "a stage", COLUMNS, 3)
    pd.testing.assert_frame_equal(whole, table())
    joined = pd.concat(batches, ignore_index=True)
    pd.testing.assert_frame_equal(joined, table()[[*COLUMNS]].astype(COLUMNS))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: table.drop(columns="loss"), "lacks the columns loss"),
        (lambda table: table.assign(loss="high"), "string in its column loss, expected float64"),
        (lambda table: table.assign(loss=1), "int64 in its column loss, expected float64"),
        (lambda table: table.assign(own=1.0), "double in its column own, expected bool"),
        (lambda table: table.assign(step=[[1]] * 7), "in its column step, expected int64"),
    ],
)
def test_a_table_of_another_shape_is_refused(tmp_path, change, told):
    path = tmp_path / "table.parquet"
    write_table(path, change(table()))
    for name in ("parquet", "parquet in batches"):
        assert told in refused(READERS[name], path)


def test_nulls_are_no_numbers(tmp_path):
    path = tmp_path / "table.parquet"
    write_table(path, table().assign(step=table()["step"].astype("Int64").replace(3, pd.NA)))
    assert "holds a null" in refused(READERS["parquet in batches"], path)


def test_tensors_survive_the_file(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, {"config": "é"})
    tensors, metadata = read_tensors(path, "a stage")
    assert metadata == {"config": "é"} and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    save_file(TENSORS, path, metadata={"config": "no checksum"})
    with pytest.raises(UserError, match=r"file\.safetensors .*checksum is missing"):
        read_tensors(path, "a stage")


@pytest.mark.parametrize("record", ["3", "[]", '{"config": 3}', '{"config": null}', '[["a"]]', "{"])
def test_metadata_of_another_shape_is_refused(tmp_path, record):
    path = tmp_path / "weights.safetensors"
    save_file(TENSORS, path, metadata={"fairway": record})
    with pytest.raises(UserError, match=r"weights\.safetensors"):
        load_model(path)


@settings(deadline=None, max_examples=100)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_bit_of_tensors_flips_unseen(tmp_path_factory, place, bit):
    path = tmp_path_factory.mktemp("flipped") / "file.safetensors"
    write_tensors(path, TENSORS, {"config": "{}"})
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        tensors, _ = read_tensors(path, "a stage")
    except UserError:
        return
    assert tensors.keys() == TENSORS.keys()  # a blank of the header became another
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
