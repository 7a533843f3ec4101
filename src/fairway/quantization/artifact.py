"""The artifact: one file with the whole model, small, deterministic and safe to load.

    magic, 8 bytes │ version, uint32 │ header length, uint32 │ header, JSON │ payload │ SHA-256

All numbers are little-endian; the checksum covers every byte before it. The header describes the
file by itself:

    {"config": {the model's configuration},
     "tensors": {name: [kind, shape], and for codes perhaps: group columns, has input scales},
     "streams": {stream: [codec, packed length]}}

A tensor's kind is float16, float32, or int2 to int8: codes, each multiplied by the fp16 scale of
its row or of its group of columns (null: of its row), and by that of its column where there are
input scales. The payload has one stream for each kind of number, and one for
the scales, each with its parts of the tensors in the order of their names, packed by whichever
codec needs fewer bytes. Nothing in a file is ever executed, and a reader never unpacks more bytes
than the declared shapes need.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairway.errors import UserError
from fairway.files import parse_json, reading, require_file
from fairway.model.gpt import GPT
from fairway.model.spec import GPTConfig, parameters
from fairway.model.weights import build_model
from fairway.phases import phase
from fairway.quantization.coding import CODECS, expect, pack, unpack
from fairway.quantization.integers import (
    ALLOWED_BITS,
    EMBEDDING,
    QuantizedTensor,
    input_scales_shape,
    largest_code,
    round_to_nearest,
    scales_shape,
)
from fairway.settings import validated

MADE_BY = "the gptq stage"
MAGIC = b"FAIRWAY\0"
VERSION = 3
PREAMBLE = struct.Struct("<8sII")
CHECKSUM_BYTES = hashlib.sha256().digest_size
MAXIMUM_HEADER_BYTES = 1 << 16
MAXIMUM_FILE_BYTES = 1 << 28
MAXIMUM_UNPACKED_BYTES = 1 << 30
"""A file that declares more is refused unread; the challenge allows 16 MB."""
SMALL_UNPACKED_BYTES = 1 << 25
MAXIMUM_EXPANSION = 64
"""Above SMALL_UNPACKED_BYTES, so many times the file's length at most: codes of two bits that are
nearly all zero take a twentieth of a byte each, and only a file that is meant to fill the memory
needs less."""

BITS = {f"int{bits}": bits for bits in ALLOWED_BITS}
STREAM_DTYPES = {
    **dict.fromkeys(BITS, np.dtype("<i1")),
    "scales": np.dtype("<f2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""Every stream that a file can have, in the order of the payload."""

Stored = QuantizedTensor | Tensor


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it."""

    kind: str
    shape: tuple[int, ...]
    group_columns: int | None = None
    has_input_scales: bool = False

    def parts(self) -> list[tuple[str, tuple[int, ...]]]:
        """The streams that hold it, and the shape of its part in each."""
        parts = [(self.kind, self.shape)]
        if self.kind in BITS:
            parts.append(("scales", scales_shape(self.shape, self.group_columns)))
        if self.has_input_scales:
            parts.append(("scales", input_scales_shape(self.shape)))
        return parts


def quantizable(model: GPT, takes_embedding: bool = False) -> dict[str, Tensor]:
    """The parameters that a quantizer makes codes of: name → float32 [N, R, C].

    takes_embedding: the token embedding as well, as one matrix.
    """
    table = parameters(model.config)
    matrices = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if table[name].storage == "quantized"
    }
    if takes_embedding:
        matrices[EMBEDDING] = model.token_embedding.detach().unsqueeze(0)
    return matrices


def storable(model: GPT, quantized: Mapping[str, QuantizedTensor]) -> dict[str, Stored]:
    """What the artifact holds: `quantized` as given, other parameters rounded to their storage.

    Raises UserError where `quantized` lacks a parameter or has another shape for it, and where a
    value is not finite in the precision that it is stored in.
    """
    tensors: dict[str, Stored] = {}
    table = parameters(model.config)
    for name, parameter in model.named_parameters():
        storage, values = table[name].storage, parameter.detach().cpu()
        if storage == "quantized" or (name == EMBEDDING and name in quantized):
            tensors[name] = _given(name, values, quantized)
        elif storage == "int8":
            tensors[name] = round_to_nearest(values, bits=8)
        else:
            tensors[name] = values.to(getattr(torch, storage))
            _require_finite(name, tensors[name])
    return tensors


def restored(tensors: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The float32 parameters that stored tensors stand for."""
    return {
        name: tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor.float()
        for name, tensor in tensors.items()
    }


def kind_of(tensor: Stored) -> str:
    """How the artifact calls what it stores of a tensor: int2 to int8, float16 or float32."""
    if isinstance(tensor, QuantizedTensor):
        return f"int{tensor.bits}"
    return str(tensor.dtype).removeprefix("torch.")


def encode_artifact(
    config: GPTConfig, tensors: Mapping[str, Stored], codecs: Mapping[str, str] | None = None
) -> bytes:
    """The artifact's bytes: the same for the same input, whatever the order of its keys.

    codecs: stream → codec, to spare the trial of each; without it each stream takes its smallest.
    """
    entries = {name: _entry(tensors[name]) for name in sorted(tensors)}
    streams: dict[str, list[np.ndarray]] = {name: [] for name in _streams(entries.values())}
    for name, entry in entries.items():
        for (stream, _), array in zip(entry.parts(), _arrays(tensors[name]), strict=True):
            streams[stream].append(array)
    packed = {name: pack(arrays, (codecs or {}).get(name)) for name, arrays in streams.items()}
    header = {
        "config": config.model_dump(mode="json"),
        "tensors": {name: _described(entry) for name, entry in entries.items()},
        "streams": {name: [codec, len(data)] for name, (codec, data) in packed.items()},
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    payload = (data for _, data in packed.values())
    body = b"".join((PREAMBLE.pack(MAGIC, VERSION, len(text)), text, *payload))
    return body + hashlib.sha256(body).digest()


def stream_table(data: bytes) -> dict[str, tuple[str, int]]:
    """Stream → its codec and its packed length in bytes, of an artifact that was just written.

    In the order of the payload; streams of which the artifact has no numbers are left out.
    """
    _, entries, streams, _ = _split(data[:-CHECKSUM_BYTES])
    return {name: streams[name] for name in _streams(entries.values())}


@phase("read")
def load_artifact(path: str | Path, device: torch.device | str = "cpu") -> GPT:
    """The model in an artifact, with bit for bit the weights that were written.

    A file from a stranger is safe to load. Raises UserError as `read_artifact` does, and where the
    weights are not those of a model of its configuration.

    Examples:
        >>> from fairway.quantization.artifact import load_artifact
        >>> model = load_artifact("artifact.bin")
        >>> tokens = torch.tensor([[1, 7, 5]])  # int64 [sequences, positions]
        >>> model(tokens).shape == (1, 3, model.config.vocab_size)  # logits, float32
        True
    """
    config, state = read_artifact(path)
    try:
        return build_model(config, state, device)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_artifact(path: str | Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The configuration and the float32 parameters in an artifact.

    Settings that the file does not have, because it is older than they are, take their defaults.
    Raises UserError where the file is missing, damaged (its checksum does not match), or not
    something that `encode_artifact` makes.
    """
    path = require_file(path, MADE_BY)
    if path.stat().st_size > MAXIMUM_FILE_BYTES:
        raise UserError(f"{path} is larger than {MAXIMUM_FILE_BYTES} bytes: it is no artifact")
    with reading(path, "readable", MADE_BY):
        data = path.read_bytes()
    body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if len(body) < PREAMBLE.size or hashlib.sha256(body).digest() != checksum:
        raise UserError(
            f"{path} does not match its checksum: it is truncated, damaged or no artifact; "
            "copy it again or rerun the gptq stage"
        )
    try:
        config, entries, streams, payload = _split(body)
        return validated(GPTConfig, config, "model"), restored(_unpack(entries, streams, payload))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _given(
    name: str, parameter: Tensor, quantized: Mapping[str, QuantizedTensor]
) -> QuantizedTensor:
    if name not in quantized:
        raise UserError(f"the quantizer gave no codes for {name}")
    found, expected = tuple(quantized[name].codes.shape), tuple(parameter.shape)
    if found != expected:
        raise UserError(f"the quantizer gave codes {found} for {name}, expected {expected}")
    return quantized[name].mapped(Tensor.cpu)


def _entry(tensor: Stored) -> Entry:
    if isinstance(tensor, QuantizedTensor):
        has_input_scales = tensor.input_scales is not None
        shape = tuple(tensor.codes.shape)
        return Entry(kind_of(tensor), shape, tensor.group_columns, has_input_scales)
    return Entry(kind_of(tensor), tuple(tensor.shape))


def _described(entry: Entry) -> list[Any]:
    """`entry` as it stands in the header."""
    described = [entry.kind, list(entry.shape)]
    if entry.has_input_scales:
        return [*described, entry.group_columns, True]
    return described if entry.group_columns is None else [*described, entry.group_columns]


def _arrays(tensor: Stored) -> list[np.ndarray]:
    """The numbers of each of the tensor's parts, little-endian."""
    if isinstance(tensor, QuantizedTensor):
        codes = tensor.codes.contiguous().cpu().numpy()
        inputs = [] if tensor.input_scales is None else _arrays(tensor.input_scales)
        return [codes, *_arrays(tensor.scales), *inputs]
    numbers = tensor.detach().cpu().numpy()
    return [numbers.astype(numbers.dtype.newbyteorder("<"))]


def _streams(entries: Iterable[Entry]) -> list[str]:
    """The streams of a file with these tensors, in the order of the payload."""
    used = {stream for entry in entries for stream, _ in entry.parts()}
    return [stream for stream in STREAM_DTYPES if stream in used]


def _split(
    body: bytes,
) -> tuple[dict[str, Any], dict[str, Entry], dict[str, tuple[str, int]], bytes]:
    """Configuration, tensors, streams (codec and length) and payload; all but the first checked."""
    magic, version, header_bytes = PREAMBLE.unpack_from(body)
    if magic != MAGIC:
        raise UserError(f"starts with {magic!r}, expected {MAGIC!r}: it is no artifact")
    if version != VERSION:
        raise UserError(f"format version {version} found, {VERSION} expected: rerun the gptq stage")
    expect(header_bytes <= MAXIMUM_HEADER_BYTES, "the header's length")
    try:
        header = parse_json(body[PREAMBLE.size : PREAMBLE.size + header_bytes])
    except ValueError as error:
        raise UserError("the header is not JSON: it was not written by this program") from error
    expect(isinstance(header, dict), "the header")
    for key in ("config", "tensors", "streams"):
        expect(isinstance(header.get(key), dict), key)
    entries = {name: _checked_entry(name, header["tensors"][name]) for name in header["tensors"]}
    entries = dict(sorted(entries.items()))
    expect(set(header["streams"]) == set(_streams(entries.values())), "the list of streams")
    for stream in header["streams"].values():
        expect(isinstance(stream, list) and len(stream) == 2, "the list of streams")
        expect(stream[0] in CODECS, "the codec")
        expect(_is_count(stream[1]), "a stream's length")
    streams = {name: (codec, length) for name, (codec, length) in header["streams"].items()}
    payload = body[PREAMBLE.size + header_bytes :]
    expect(sum(length for _, length in streams.values()) == len(payload), "the payload's length")
    return header["config"], entries, streams, payload


def _checked_entry(name: str, described: Any) -> Entry:
    expect(isinstance(described, list) and 2 <= len(described) <= 4, f"the entry of {name}")
    kind, shape, *more = described
    group_columns, has_input_scales = (*more, *(None, False)[len(more) :])
    is_codes = isinstance(kind, str) and kind in BITS
    expect(is_codes or kind in ("float16", "float32"), f"the kind of {name}")
    expect(isinstance(shape, list) and len(shape) <= 4, f"the shape of {name}")
    expect(all(map(_is_count, shape)), f"the shape of {name}")
    expect(len(shape) >= 2 or not is_codes, f"the shape of {name}")
    # No array library can hold such sides, even of an empty tensor.
    expect(math.prod(map(max, shape, repeat(1))) <= MAXIMUM_UNPACKED_BYTES, "the sum of the shapes")
    if group_columns is not None:
        is_groups = is_codes and _is_count(group_columns) and group_columns > 0
        expect(is_groups, f"the groups of {name}")
    expect(has_input_scales in (False, is_codes), f"the input scales of {name}")
    return Entry(kind, tuple(shape), group_columns, has_input_scales)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _unpack(
    entries: Mapping[str, Entry], streams: Mapping[str, tuple[str, int]], payload: bytes
) -> dict[str, Stored]:
    """The stored tensors, in the order of their names."""
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in _streams(entries.values())}
    for entry in entries.values():
        for stream, shape in entry.parts():
            shapes[stream].append(shape)
    unpacked_bytes = sum(
        sum(map(math.prod, parts)) * STREAM_DTYPES[stream].itemsize
        for stream, parts in shapes.items()
    )
    expanded = max(SMALL_UNPACKED_BYTES, MAXIMUM_EXPANSION * len(payload))
    expect(unpacked_bytes <= min(MAXIMUM_UNPACKED_BYTES, expanded), "the sum of the shapes")
    arrays, start = {}, 0
    for stream, parts in shapes.items():
        codec, length = streams[stream]
        data, start = payload[start : start + length], start + length
        arrays[stream] = iter(unpack(data, codec, STREAM_DTYPES[stream], parts))
    tensors: dict[str, Stored] = {}
    for name, entry in entries.items():
        numbers, *scales = (_tensor(stream, next(arrays[stream])) for stream, _ in entry.parts())
        for floats in scales or [numbers]:
            _require_finite(name, floats)
        if entry.kind in BITS:
            row_scales, *input_scales = scales
            layout = (BITS[entry.kind], entry.group_columns, *input_scales)
            tensors[name] = QuantizedTensor(numbers, row_scales, *layout)
        else:
            tensors[name] = numbers
    return tensors


def _tensor(stream: str, array: np.ndarray) -> Tensor:
    """A checked copy, in the machine's byte order."""
    if stream in BITS and array.size:
        least, most, limit = array.min(), array.max(), largest_code(BITS[stream])
        if not -limit <= least <= most <= limit:
            raise UserError(
                f"codes from {least} to {most} found, {stream} allows −{limit} to {limit}: the "
                "artifact was not written by this program"
            )
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _require_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name} holds values that are not finite in {tensor.dtype}")
