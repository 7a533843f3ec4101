"""Coding of streams: round trip to the bit, size, and what a stranger may have written."""

import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fairway.errors import UserError
from fairway.quantization import coding
from fairway.quantization.coding import (
    exact_counts,
    frequency_tables,
    pack,
    spread_numbers,
    unpack,
)

pytest.importorskip("constriction")

INT8 = np.dtype(np.int8)


def code_arrays(least, most):
    shapes = hnp.array_shapes(min_dims=2, max_dims=4, min_side=0, max_side=9)
    return st.lists(hnp.arrays(np.int8, shapes, elements=st.integers(least, most)), max_size=4)


def synthetic_codes(shape, seed=0, column_deviation=0.2):
    """int6 codes of Gaussian weights whose columns differ in scale, each row clipped somewhere."""
    generator = np.random.default_rng(seed)
    weights = generator.normal(size=shape)
    weights *= np.exp(generator.normal(size=(shape[0], 1, shape[2])) * column_deviation)
    clip = np.quantile(np.abs(weights), generator.choice([0.999, 1.0]), axis=-1, keepdims=True)
    return np.rint(weights / clip * 31).clip(-31, 31).astype(np.int8)


def shapes_of(arrays):
    return [array.shape for array in arrays]


def same(arrays, others):
    return all(map(np.array_equal, arrays, others)) and shapes_of(arrays) == shapes_of(others)


@pytest.mark.parametrize("codec", coding.CODECS)
@settings(max_examples=40, deadline=None)
@given(arrays=st.one_of(code_arrays(-128, 127), code_arrays(-31, 31), code_arrays(0, 0)))
def test_any_codes_come_back_to_the_bit(codec, arrays):
    _, data = pack(arrays, codec)
    assert same(unpack(data, codec, INT8, shapes_of(arrays)), arrays)
    assert pack(arrays, codec) == (codec, data)


@pytest.mark.parametrize("dtype", [np.dtype("<f2"), np.dtype("<f4")])
def test_floats_come_back_to_the_bit(dtype):
    arrays = [np.arange(12).astype(dtype).reshape(3, 4), np.ones((), dtype), np.ones((0, 2), dtype)]
    codec, data = pack(arrays)
    assert same(unpack(data, codec, dtype, shapes_of(arrays)), arrays)


def test_rows_of_zeros_and_extreme_codes_share_a_stream(monkeypatch):
    monkeypatch.setattr(coding, "PIECE_CODES", 100)
    codes = synthetic_codes((2, 30, 40))
    codes[0, ::3], codes[1, :, ::4], codes[1, 5] = 0, 127, -128
    _, data = pack([codes, codes[:1, :1]], "range")
    assert same(unpack(data, "range", INT8, [codes.shape, (1, 1, 40)]), [codes, codes[:1, :1]])
    monkeypatch.undo()
    assert len(pack([codes, codes[:1, :1]], "range")[1]) == pytest.approx(len(data), abs=8)


def test_of_many_codes_a_sample_tells_whether_lzma_needs_fewer_bytes():
    gaussian = [synthetic_codes((8, 512, 768))]
    assert pack(gaussian) == ("range", pack(gaussian, "range")[1])
    repeated = [np.tile(synthetic_codes((1, 2, 700)), (8, 256, 1))]
    codec, data = pack(repeated)
    assert codec == "lzma" and len(data) < len(pack(repeated, "range")[1]) / 10


@pytest.mark.parametrize("column_deviation", [0.0, 0.3])
def test_range_coding_beats_lzma_and_comes_near_the_entropy(column_deviation):
    arrays = [
        synthetic_codes((4, 256, 512), 1, column_deviation),
        synthetic_codes((2, 256, 768), 2, column_deviation),
    ]
    codec, data = pack(arrays)
    joined = b"".join(array.tobytes() for array in arrays)
    share = np.unique(np.frombuffer(joined, np.int8), return_counts=True)[1] / len(joined)
    entropy_bytes = -(share * np.log2(share)).sum() * len(joined) / 8
    assert codec == "range"
    assert len(data) < 0.985 * len(lzma.compress(joined, preset=9))
    assert len(data) < 0.985 * len(pack(arrays, "lzma")[1])
    # One table for all codes cannot do better than the entropy: what is below it, classes gave.
    assert len(data) < entropy_bytes * (1.003 if column_deviation == 0 else 0.985)


def test_lzma_is_kept_where_it_is_smaller():
    row = np.random.default_rng(0).integers(-31, 32, size=(1, 64), dtype=np.int8)
    assert pack([np.repeat(row, 200, axis=0)])[0] == "lzma"
    assert pack([np.zeros((0, 3), np.int8)])[0] == "lzma" and pack([])[0] == "lzma"


def test_old_bytes_are_read_as_the_same_codes_on_every_platform_and_version():
    codes = unpack(bytes.fromhex(GOLDEN_BYTES), "range", INT8, [(2, 3, 5)])[0]
    assert codes.tolist() == GOLDEN_CODES


def test_a_models_probabilities_are_integers_that_need_no_rounding():
    stacks = [synthetic_codes((1, 64, 64))]
    tables = frequency_tables(stacks, *spread_numbers(stacks))
    counts, shares = exact_counts(tables), tables.astype(np.int64)
    assert (counts.sum(1) == coding.COUNTS_SUM).all()
    # What rounding down leaves over goes to the first symbol: less than one for each symbol.
    rounded_down = shares * coding.COUNTS_SUM // shares.sum(1, keepdims=True).clip(1)
    left_over = (counts - rounded_down)[shares.any(1)]
    assert (left_over >= 0).all() and (left_over[:, 1:] == 0).all()
    assert left_over.max() < coding.SYMBOLS
    assert float(np.float32(coding.COUNTS_SUM)) == coding.COUNTS_SUM


def test_without_constriction_lzma_is_written_and_range_coded_files_are_refused(monkeypatch):
    codes = [synthetic_codes((1, 64, 64))]
    codec, data = pack(codes, "range")
    monkeypatch.setattr(coding, "constriction", None)
    assert pack(codes)[0] == "lzma"
    with pytest.raises(UserError, match="install constriction"):
        unpack(data, codec, INT8, shapes_of(codes))


@pytest.mark.parametrize("kept", [0, 1, 40, -5, -1])
def test_a_cut_stream_is_refused(kept):
    codes = [synthetic_codes((1, 64, 64))]
    for codec in coding.CODECS:
        _, data = pack(codes, codec)
        with pytest.raises(UserError):
            unpack(data[:kept], codec, INT8, shapes_of(codes))


@pytest.mark.parametrize("codec", coding.CODECS)
def test_bytes_after_the_stream_are_refused(codec):
    codes = [synthetic_codes((1, 64, 64))]
    _, data = pack(codes, codec)
    with pytest.raises(UserError, match="a stream's length"):
        unpack(data + b"\xff" * 12, codec, INT8, shapes_of(codes))


@pytest.mark.parametrize("codec", coding.CODECS)
def test_a_decompression_bomb_is_cut_off(codec):
    bomb = [np.zeros((1 << 12, 1 << 12), np.int8)]
    _, data = pack(bomb, codec)
    assert len(data) < 15_000
    assert same(unpack(data, codec, INT8, shapes_of(bomb)), bomb)
    with pytest.raises(UserError, match="unpacked length"):
        unpack(data, codec, INT8, [(10, 10)])


def test_an_empty_shape_with_long_sides_needs_no_memory():
    _, data = pack([np.zeros((0, 3), np.int8)], "range")
    shape = (1 << 30, 0, 1 << 30)
    assert unpack(data, "range", INT8, [shape])[0].shape == shape


@settings(max_examples=40, deadline=None)
@given(words=st.binary(max_size=64), numbers=st.binary(min_size=9, max_size=9), seed=st.integers(0))
def test_any_words_numbers_and_tables_give_codes_or_one_clear_error(words, numbers, seed):
    generator = np.random.default_rng(seed)
    tables = generator.integers(0, 2**16, size=(256, 256)) * (generator.random((256, 256)) < 0.1)
    tables[generator.random(256) < 0.3] = 0
    parts = [tables.astype("<u2")], [np.frombuffer(numbers, np.uint8)]
    data = b"".join(pack(part, "lzma")[1] for part in parts) + words
    try:
        (codes,) = unpack(data, "range", INT8, [(4, 5)])
    except UserError:
        return
    assert codes.shape == (4, 5) and codes.dtype == np.int8


GOLDEN_CODES = [
    [[0, 1, -2, 31, -31], [5, -5, 0, 0, 2], [9, 8, -7, 1, 0]],
    [[0, 0, 0, 0, 0], [1, -1, 1, -1, 1], [127, -128, 3, -4, 0]],
]
GOLDEN_BYTES = (
    "e1ffff008536007fdfff7ffdf53b33d98b86258ef3762d0e4a9b44dfc6301cb4b3617fb75fbeee54bb5e1ba640"
    "e558bb7835ecb4f913bd13d3eaaed5f345a0e8a8306d73eaf461cc5aa226847b15e710a770c717b0ac81d68035"
    "73a949baf3cc28d33e531a8ded6a055d353e486d9a38a47cd0c6f542301e310f3ac5b3f8884c4c6bb562eb8aad"
    "66c5a5fa000001000f03020300020401010102020303010100008d849fac844697cb"
)
