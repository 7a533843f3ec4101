"""Lossless coding of a stream of arrays: LZMA, or a range coder that knows how widely codes spread.

Codes of a matrix are all but independent, but their spread differs from row to row (where the row
was clipped) and from column to column (how large that input's weights are). The range coder gives
every row and every column a number; a code's class is the sum of the two, and each class has a
frequency table. Numbers and tables are stored, so a reader repeats no choice of the writer.

Codes come as one byte each, and int6 ones are not packed in 6 bits, because an entropy coder
follows. On Gaussian rows of 512 under LZMA, whole bytes come to 0.675 bytes a code (their entropy
is 0.661), packed ones to 0.722.

A range-coded stream is three parts, the first two LZMA-packed: tables, uint16 [256 classes, 256
symbols]; the numbers of all rows, then of all columns, uint8; the coder's words, uint32. All are
little-endian.

Every platform reads the same codes: the tables are made into integers that fill the coder's
fixed-point range exactly, so `Categorical(perfect=False)`, which scales and truncates cumulative
sums, scales them by 1; from there on constriction computes in integers alone.
"""

import lzma
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from fairway.errors import UserError

try:
    import constriction
except ModuleNotFoundError:  # It has no wheel for Linux on ARM.
    constriction = None

CODECS = ("lzma", "range")
"""Both lossless."""
SYMBOLS = 256
MAXIMUM_NUMBER = 127
"""A row and a column have at most this number, so that their sum is a byte."""
TABLE_LIMIT = 2**16 - 1
COUNTS_SUM = 2**24 - SYMBOLS
"""constriction's probabilities are multiples of 2⁻²⁴; it adds one to each, so that none is zero."""
DICTIONARY_BYTES = 1 << 16
"""LZMA's, which looks for matches in so many bytes before."""
SAMPLE_PIECES = 16
PIECE_CODES = 1 << 20
"""So many codes are coded at a time, which bounds the memory beside the arrays."""
MINIMUM_STEP = 1 / 16
"""Numbers are at least so far apart in log spread: spreads from SPREAD_OFFSET to 127 then fit."""
SPREAD_OFFSET = 0.05
"""It is added to a mean absolute code before the logarithm: a row of zeros has a spread as well."""


def pack(arrays: Sequence[np.ndarray], codec: str | None = None) -> tuple[str, bytes]:
    """The codec and the bytes of arrays of one dtype: by `codec`, or by the one that needs least.

    The range coder takes int8 arrays of two or more dimensions. Where a sample of them shows that
    LZMA needs more, LZMA is not tried on all, which takes five times as long as the range coder.
    """
    codable = constriction and any(array.dtype == np.int8 and array.size for array in arrays)
    if codec == "lzma" or (not codable and codec is None):
        return "lzma", _lzma_pack(arrays)
    coded = _range_pack(arrays)
    if codec is None and _lzma_may_need_less(arrays, len(coded)):
        packed = _lzma_pack(arrays)
        if len(packed) <= len(coded):
            return "lzma", packed
    return "range", coded


def _lzma_may_need_less(arrays: Sequence[np.ndarray], coded_bytes: int) -> bool:
    """Whether LZMA needs no more bytes a code for a sample of int8 arrays than for all were needed.

    Of few codes it is not known. The pieces of the sample are as long as LZMA looks back.
    """
    codes = np.concatenate([array.reshape(-1) for array in arrays])
    if len(codes) <= 2 * SAMPLE_PIECES * DICTIONARY_BYTES:
        return True
    starts = np.linspace(0, len(codes) - DICTIONARY_BYTES, SAMPLE_PIECES).astype(int)
    sample = np.concatenate([codes[start : start + DICTIONARY_BYTES] for start in starts])
    return len(_lzma_pack([sample])) * len(codes) <= coded_bytes * len(sample)


def unpack(
    data: bytes, codec: str, dtype: np.dtype, shapes: Sequence[tuple[int, ...]]
) -> list[np.ndarray]:
    """The arrays of `dtype` and `shapes` in `data`, which a stranger may have written.

    Raises UserError where they are not; never unpacks more bytes than they need.
    """
    if codec == "range":
        expect(dtype == np.int8 and all(len(shape) >= 2 for shape in shapes), "the codec")
        return _range_unpack(data, shapes)
    unpacked, rest = _lzma_unpack(data, _total(shapes) * dtype.itemsize, dtype.itemsize)
    expect(not rest, "a stream's length")
    return _split(np.frombuffer(unpacked, dtype), shapes)


def _lzma_pack(arrays: Sequence[np.ndarray]) -> bytes:
    data = b"".join(array.tobytes() for array in arrays)
    itemsize = arrays[0].itemsize if arrays else 1
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=_filters(itemsize))


def _lzma_unpack(data: bytes, size: int, itemsize: int) -> tuple[bytes, bytes]:
    """The `size` bytes that were packed, and what follows them in `data`."""
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(itemsize))
    try:
        unpacked = decompressor.decompress(data, max_length=size + 1)
    except lzma.LZMAError as error:
        raise UserError("a stream cannot be decompressed: the file is damaged") from error
    expect(len(unpacked) == size and decompressor.eof, "a stream's unpacked length")
    return unpacked, decompressor.unused_data


def _filters(itemsize: int) -> list[dict[str, int]]:
    """LZMA's settings for numbers of 1, 2 or 4 bytes that are all but independent.

    Contexts of earlier bytes would only dilute the statistics, but a byte's position in its number
    counts. Matches are chance: a small dictionary and one candidate each find few of them, which
    on Gaussian int6 codes gives 0.6749 bytes a code instead of the preset's 0.6764, 8 times faster.
    """
    position_bits = int(math.log2(itemsize))
    return [
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 9,
            "dict_size": DICTIONARY_BYTES,
            "lc": 0,
            "lp": position_bits,
            "pb": position_bits,
            "mf": lzma.MF_HC3,
            "nice_len": 273,
            "depth": 1,
        }
    ]


def _range_pack(arrays: Sequence[np.ndarray]) -> bytes:
    stacks = [array.reshape(_stack_shape(array.shape)) for array in arrays]
    rows, columns = spread_numbers(stacks)
    tables = frequency_tables(stacks, rows, columns)
    models, encoder = _models(tables), constriction.stream.queue.RangeEncoder()
    for stack, *numbers in zip(stacks, rows, columns, strict=True):
        symbols = stack.reshape(-1).view(np.uint8)
        for number, positions in _positions_by_class(*numbers):
            encoder.encode(symbols[positions].astype(np.int32), models[number])
    words = encoder.get_compressed().astype("<u4").tobytes()
    return _lzma_pack([tables.astype("<u2")]) + _lzma_pack([*rows, *columns]) + words


def _range_unpack(data: bytes, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    if not constriction:
        raise UserError("its codes are range-coded: install constriction to read it")
    stack_shapes = [_stack_shape(shape) for shape in shapes]
    sizes = [(stack[0], stack[axis]) for axis in (1, 2) for stack in stack_shapes]
    tables, data = _lzma_unpack(data, SYMBOLS * SYMBOLS * 2, itemsize=2)
    numbers, data = _lzma_unpack(data, _total(sizes), itemsize=1)
    expect(len(data) % 4 == 0, "a stream's length")
    models = _models(np.frombuffer(tables, "<u2").reshape(SYMBOLS, SYMBOLS))
    split = _split(np.frombuffer(numbers, np.uint8), sizes)
    words = np.frombuffer(data, "<u4").astype(np.uint32)
    decoder = constriction.stream.queue.RangeDecoder(words)
    arrays = []
    for shape, *pair in zip(shapes, split[: len(shapes)], split[len(shapes) :], strict=True):
        symbols = np.empty(math.prod(shape), np.uint8)
        for number, positions in _positions_by_class(*pair):
            try:
                symbols[positions] = decoder.decode(models[number], len(positions))
            except AssertionError as error:  # So constriction says that no code has these bits.
                raise UserError("a stream cannot be decoded: the file is damaged") from error
        arrays.append(symbols.view(np.int8).reshape(shape))
    expect(decoder.maybe_exhausted(), "a stream's length")
    return arrays


def _stack_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """[..., rows, columns] as [matrices, rows, columns]; nothing is left of an empty one."""
    return (math.prod(shape[:-2]), *shape[-2:]) if math.prod(shape) else (0, 0, 0)


def spread_numbers(stacks: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each stack [N, R, C] the numbers of its rows and of its columns: uint8 [N, R], [N, C].

    They are logarithms of mean absolute codes, in steps of one width. Steps of width s cost a code
    s²/12 nats for the table that is not quite its own (a scale's Fisher information is 2), and save
    log s nats for each number stored: with n codes to a number, s = √(6/n) costs least.
    """
    numbers = sum(len(stack) * sum(stack.shape[1:]) for stack in stacks)
    codes = sum(stack.size for stack in stacks)
    step = max(MINIMUM_STEP, math.sqrt(6 * numbers / max(1, codes)))
    rows, columns = [], []
    for stack in stacks:
        magnitude = np.abs(stack, dtype=np.int16)
        _, row_count, column_count = stack.shape
        spread = np.log(magnitude.sum(1) / row_count + SPREAD_OFFSET) / step
        columns.append(spread - spread.sum(1, keepdims=True) / column_count)
        rows.append(np.log(magnitude.sum(2) / column_count + SPREAD_OFFSET) / step)
    return _from_zero(rows), _from_zero(columns)


def _from_zero(groups: list[np.ndarray]) -> list[np.ndarray]:
    """Rounded, with the least one at zero: uint8."""
    least = min((group.min() for group in groups if group.size), default=0.0)
    return [np.rint(group - least).clip(0, MAXIMUM_NUMBER).astype(np.uint8) for group in groups]


def _positions_by_class(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(class, positions in the flattened array) for every code, piece by piece."""
    for start, piece in _pieces(_classes(rows, columns)):
        order = np.argsort(piece, kind="stable") + start
        ends = np.cumsum(np.bincount(piece))
        for number, (first, last) in enumerate(pairwise((0, *ends))):
            if first < last:
                yield number, order[first:last]


def _classes(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Of every code of a stack, flat: uint8."""
    return (rows[:, :, None] + columns[:, None, :]).reshape(-1)


def _pieces(codes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Where each piece of a flat array begins, and the piece."""
    return ((at, codes[at : at + PIECE_CODES]) for at in range(0, len(codes), PIECE_CODES))


def _cells(stack: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Iterator[np.ndarray]:
    """Where every code stands in the flattened tables, piece by piece: int64."""
    symbols = stack.reshape(-1).view(np.uint8)
    for start, classes in _pieces(_classes(rows, columns)):
        yield classes.astype(np.int64) * SYMBOLS + symbols[start : start + len(classes)]


def frequency_tables(
    stacks: Sequence[np.ndarray], rows: list[np.ndarray], columns: list[np.ndarray]
) -> np.ndarray:
    """How often each symbol occurs in each class: uint16 [256 classes, 256 symbols].

    Scaled to 65,535 for a class's most frequent symbol; one that occurs never gets zero.
    """
    counts = np.zeros(SYMBOLS * SYMBOLS, np.int64)
    for stack in zip(stacks, rows, columns, strict=True):
        for cells in _cells(*stack):
            counts += np.bincount(cells, minlength=len(counts))
    counts = counts.reshape(SYMBOLS, SYMBOLS)
    largest = counts.max(1, keepdims=True).clip(1)
    return (-(-counts * TABLE_LIMIT // largest)).astype(np.uint16)


def exact_counts(tables: np.ndarray) -> np.ndarray:
    """Tables scaled to rows that sum up to COUNTS_SUM, so that nothing rounds them: int64."""
    shares = tables.astype(np.int64)
    counts = shares * COUNTS_SUM // shares.sum(1, keepdims=True).clip(1)
    counts[:, 0] += COUNTS_SUM - counts.sum(1)
    return counts


def code_bits(stacks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Mean bits of a code in each matrix of int8 stacks [N, R, C] under the coder's tables: [N]."""
    rows, columns = spread_numbers(stacks)
    counts = exact_counts(frequency_tables(stacks, rows, columns)) + 1
    costs = -np.log2(counts / counts.sum(1, keepdims=True)).astype(np.float32).reshape(-1)
    means = []
    for stack in zip(stacks, rows, columns, strict=True):
        bits = np.concatenate([costs[cells] for cells in _cells(*stack)])
        means.append(bits.reshape(len(stack[0]), -1).mean(1, dtype=np.float64))
    return means


def _models(tables: np.ndarray) -> list:
    """constriction's models of the classes."""
    categorical = constriction.stream.model.Categorical
    counts = exact_counts(tables).astype(np.float64)
    return [categorical(row, perfect=False) for row in counts]


def _split(array: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    ends = np.cumsum([math.prod(shape) for shape in shapes], dtype=np.int64)
    parts = np.split(array, ends[:-1]) if shapes else []
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _total(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def expect(condition: bool, what: str) -> None:
    """For a file that a stranger wrote: its checksum matches, but its contents need not."""
    if not condition:
        raise UserError(f"{what} is not what an artifact holds: it was not written by this program")
