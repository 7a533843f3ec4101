"""The artifact: one file with the whole model, small, deterministic and safe to load.

    magic, 8 bytes │ version, uint32 │ header length, uint32 │ header, JSON │ payload │ SHA-256

All numbers are little-endian; the checksum covers every byte before it. The header holds the
model's configuration, each tensor's shape, and each stream's codec and packed length. The payload
is the streams, one per kind of number, each with the tensors' data in the order of their names,
packed by whichever codec needs fewer bytes. A tensor's name decides how it is stored. Nothing in a
file is ever executed, and a reader never unpacks more bytes than the declared shapes need.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairway.errors import UserError
from fairway.files import atomic_path, require_file
from fairway.model.gpt import BANKS, GPT, GPTConfig
from fairway.model.weights import build_model
from fairway.quantization.coding import CODECS, expect, pack, unpack
from fairway.quantization.integers import (
    QuantizedTensor,
    bytes_to_codes,
    codes_to_bytes,
    round_to_nearest,
)

MAGIC = b"FAIRWAY\0"
VERSION = 2
PREAMBLE = struct.Struct("<8sII")
CHECKSUM_BYTES = hashlib.sha256().digest_size
MAXIMUM_HEADER_BYTES = 1 << 16
MAXIMUM_FILE_BYTES = 1 << 28
MAXIMUM_UNPACKED_BYTES = 1 << 30
"""Far above the challenge's 16 MB; a file that declares more is refused unread."""

STORAGE = {
    **dict.fromkeys(BANKS, "int6"),
    **dict.fromkeys(("token_embedding", "bigram_embedding", "value_embedding"), "int8"),
    **dict.fromkeys(("bigram_projection", "value_projection"), "float16"),
    **dict.fromkeys(
        (
            "bigram_scale",
            "smear_gate",
            "value_scale",
            "value_layer_scales",
            "residual_mix",
            "attention_scale",
            "mlp_scale",
            "query_gain",
            "skip_weights",
        ),
        "float32",
    ),
}
"""How each parameter is stored. A new parameter must be entered here; there is no default."""

BITS = {"int6": 6, "int8": 8}
STREAM_DTYPES = {"int6": "<i1", "int8": "<i1", "scales": "<f2", "float16": "<f2", "float32": "<f4"}
"""The kinds of numbers, in the order of the payload."""

Stored = QuantizedTensor | torch.Tensor


def storable(
    state: Mapping[str, torch.Tensor], banks: Mapping[str, QuantizedTensor]
) -> dict[str, Stored]:
    """What the artifact holds for a model's parameters: `banks` as given, the rest rounded.

    Raises UserError where a value is not finite in the precision it is stored in.
    """
    tensors: dict[str, Stored] = {}
    for name, parameter in state.items():
        storage = storage_of(name)
        if storage == "int6":
            tensors[name] = QuantizedTensor(banks[name].codes.cpu(), banks[name].scales.cpu())
        elif storage == "int8":
            tensors[name] = round_to_nearest(parameter.detach().cpu(), bits=8)
        else:
            tensors[name] = parameter.detach().cpu().to(getattr(torch, storage))
            _require_finite(name, tensors[name])
    return tensors


def restored(tensors: Mapping[str, Stored]) -> dict[str, torch.Tensor]:
    """The float32 parameters that stored tensors stand for."""
    return {
        name: tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor.float()
        for name, tensor in tensors.items()
    }


def storage_of(name: str) -> str:
    """int6, int8, float16 or float32; UserError for a parameter that the format does not know."""
    if name not in STORAGE:
        raise UserError(
            f"parameter {name!r} is unknown to the artifact format: enter it in STORAGE"
        )
    return STORAGE[name]


def write_artifact(
    path: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> int:
    """Write the artifact atomically; return its size in bytes."""
    data = encode_artifact(config, tensors)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return len(data)


def encode_artifact(
    config: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    codecs: Mapping[str, str] | None = None,
) -> bytes:
    """The artifact's bytes: the same for the same input, whatever the order of its keys.

    codecs: stream → codec, to spare the trial of each; without it each stream takes its smallest.
    """
    streams: dict[str, list[np.ndarray]] = {name: [] for name in STREAM_DTYPES}
    shapes = {}
    for name in sorted(tensors):
        tensor, storage = tensors[name], storage_of(name)
        if storage in BITS:
            shapes[name] = list(tensor.codes.shape)
            codes = np.frombuffer(codes_to_bytes(tensor.codes), np.int8)
            streams[storage].append(codes.reshape(tensor.codes.shape))
            streams["scales"].append(_floats(tensor.scales, "scales"))
        else:
            shapes[name] = list(tensor.shape)
            streams[storage].append(_floats(tensor, storage))
    packed = {name: pack(arrays, (codecs or {}).get(name)) for name, arrays in streams.items()}
    header = {
        "config": dict(config),
        "shapes": shapes,
        "streams": {name: [codec, len(data)] for name, (codec, data) in packed.items()},
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    payload = (data for _, data in packed.values())
    body = b"".join((PREAMBLE.pack(MAGIC, VERSION, len(text)), text, *payload))
    return body + hashlib.sha256(body).digest()


def stream_table(data: bytes) -> dict[str, tuple[str, int]]:
    """Stream → its codec and its packed length in bytes, of an artifact that was just written."""
    header, _ = _split(data[:-CHECKSUM_BYTES])
    return {name: tuple(header["streams"][name]) for name in STREAM_DTYPES}


def load_artifact(path: str | Path, device: torch.device | str = "cpu") -> GPT:
    """The model in an artifact, with bit for bit the weights that were written."""
    config, state = read_artifact(path)
    try:
        return build_model(_model_config(config), state, device)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_artifact(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the float32 parameters in an artifact.

    Raises UserError where the file is missing, damaged (its checksum does not match), or not
    something that `write_artifact` writes.
    """
    path = require_file(path, "the gptq stage")
    if path.stat().st_size > MAXIMUM_FILE_BYTES:
        raise UserError(f"{path} is larger than {MAXIMUM_FILE_BYTES} bytes: it is no artifact")
    data = path.read_bytes()
    body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if len(body) < PREAMBLE.size or hashlib.sha256(body).digest() != checksum:
        raise UserError(
            f"{path} does not match its checksum: it is truncated, damaged or no artifact; "
            "copy it again or rerun the gptq stage"
        )
    try:
        header, payload = _split(body)
        return header["config"], restored(_unpack(header, payload))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _split(body: bytes) -> tuple[dict[str, Any], bytes]:
    """The checked header and the payload."""
    magic, version, header_bytes = PREAMBLE.unpack_from(body)
    if magic != MAGIC:
        raise UserError(f"starts with {magic!r}, expected {MAGIC!r}: it is no artifact")
    if version != VERSION:
        raise UserError(f"format version {version} found, {VERSION} expected: rerun the gptq stage")
    expect(header_bytes <= MAXIMUM_HEADER_BYTES, "the header's length")
    try:
        header = json.loads(body[PREAMBLE.size : PREAMBLE.size + header_bytes])
    except (ValueError, RecursionError) as error:
        raise UserError("the header is not JSON: it was not written by this program") from error
    expect(isinstance(header, dict), "the header")
    for key in ("config", "shapes", "streams"):
        expect(isinstance(header.get(key), dict), key)
    for name, shape in header["shapes"].items():
        expect(isinstance(shape, list) and len(shape) <= 4, f"the shape of {name}")
        expect(all(type(size) is int and size >= 0 for size in shape), f"the shape of {name}")
        expect(len(shape) >= 2 or storage_of(name) not in BITS, f"the shape of {name}")
    expect(list(header["streams"]) == sorted(STREAM_DTYPES), "the list of streams")
    for stream in header["streams"].values():
        expect(isinstance(stream, list) and len(stream) == 2, "the list of streams")
        expect(stream[0] in CODECS, "the codec")
        expect(type(stream[1]) is int and stream[1] >= 0, "a stream's length")
    payload = body[PREAMBLE.size + header_bytes :]
    packed_bytes = sum(length for _, length in header["streams"].values())
    expect(packed_bytes == len(payload), "the payload's length")
    return header, payload


def _unpack(header: Mapping[str, Any], payload: bytes) -> dict[str, Stored]:
    """The stored tensors, in the order of their names."""
    shapes = {name: tuple(shape) for name, shape in sorted(header["shapes"].items())}
    parts: dict[str, list[tuple[int, ...]]] = {stream: [] for stream in STREAM_DTYPES}
    for name, shape in shapes.items():
        for stream, part in _parts(name, shape):
            parts[stream].append(part)
    expect(
        sum(map(_unpacked_bytes, parts, parts.values())) <= MAXIMUM_UNPACKED_BYTES,
        "the sum of the shapes",
    )
    streams, start = {}, 0
    for stream, stream_shapes in parts.items():
        codec, length = header["streams"][stream]
        data, start = payload[start : start + length], start + length
        streams[stream] = iter(unpack(data, codec, np.dtype(STREAM_DTYPES[stream]), stream_shapes))
    tensors: dict[str, Stored] = {}
    for name, shape in shapes.items():
        arrays = [_tensor(stream, next(streams[stream])) for stream, _ in _parts(name, shape)]
        tensors[name] = QuantizedTensor(*arrays) if len(arrays) == 2 else arrays[0]
        _require_finite(name, arrays[-1])
    return tensors


def _unpacked_bytes(stream: str, shapes: list[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes)) * np.dtype(STREAM_DTYPES[stream]).itemsize


def _parts(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The streams that hold a tensor, and the shape of its part in each."""
    storage = storage_of(name)
    return [(storage, shape), ("scales", shape[:-1])] if storage in BITS else [(storage, shape)]


def _tensor(stream: str, array: np.ndarray) -> torch.Tensor:
    """A checked copy, in the machine's byte order."""
    if stream in BITS:
        return bytes_to_codes(array.tobytes(), array.shape, BITS[stream])
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _floats(tensor: torch.Tensor, stream: str) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(STREAM_DTYPES[stream])


def _model_config(config: Mapping[str, Any]) -> GPTConfig:
    """A GPTConfig of checked types; the weights' shapes bound its sizes when the model is built."""
    annotations = {field.name: field.type for field in fields(GPTConfig)}
    expect(set(config) == set(annotations), "the list of the model's settings")
    for name, kind in annotations.items():
        value = config[name]
        if kind is int:
            expect(type(value) is int and value > 0, f"model.{name}")
        elif kind is float:
            expect(type(value) in (int, float) and 0 < value < math.inf, f"model.{name}")
        else:
            expect(isinstance(value, list | tuple), f"model.{name}")
            layers = range(config["layers"])
            expect(all(type(item) is int and item in layers for item in value), f"model.{name}")
    return GPTConfig(**config)


def _require_finite(name: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name} holds values that are not finite in {tensor.dtype}")
