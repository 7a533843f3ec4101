"""Fit the artifact into the size limit by zeroing the codes that cost least."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fairway.errors import UserError
from fairway.quantization.artifact import Stored, encode_artifact, storage_of, stream_table
from fairway.quantization.integers import QuantizedTensor

MAXIMUM_SEARCH_STEPS = 8
SLACK_FRACTION = 0.0005
"""The search stops this close under the limit: each step compresses the whole model."""
LARGEST_SAVING_BITS = 2
"""A code. To save more, another number of bits would be the thing to change."""


def code_bytes(files: Iterable[str | Path]) -> int:
    """Size in bytes of the source files that the artifact needs to run."""
    return sum(Path(file).stat().st_size for file in files)


def fit_to_limit(
    config: Mapping[str, Any], tensors: Mapping[str, Stored], limit_bytes: int
) -> tuple[dict[str, Stored], int]:
    """Zero as few ±1 codes of the int6 banks as make the artifact at most `limit_bytes` long.

    Codes go in the order of their row's squared scale, least first: that is the squared change
    of the weight. The number is found by interpolation between one that is too small and one that
    is large enough. Returns the tensors and the number zeroed; UserError where even all of them
    are too few.
    """
    data = encode_artifact(config, tensors)
    size = len(data)
    if size <= limit_bytes:
        return dict(tensors), 0
    # A few zeros do not change which codec is smaller; if they do, what is written is smaller yet.
    codecs = {stream: codec for stream, (codec, _) in stream_table(data).items()}
    order = _cheapest_ones(tensors)
    too_few, too_large_size = 0, size
    enough = len(order)
    fitted = _with_zeros(tensors, order)
    fitting_size = len(encode_artifact(config, fitted, codecs))
    if fitting_size > limit_bytes:
        raise UserError(
            f"the artifact needs {fitting_size} bytes even with all {enough} codes of ±1 zeroed, "
            f"but {limit_bytes} are left of budgets.artifact_bytes beside the code: "
            f"{_remedy(tensors, fitting_size - limit_bytes)}"
        )
    for _ in range(MAXIMUM_SEARCH_STEPS):
        if enough - too_few <= 1 or limit_bytes - fitting_size <= limit_bytes * SLACK_FRACTION:
            break
        # Aimed at the middle of the slack, so that the step is as likely to fit as to be close.
        target = limit_bytes * (1 - SLACK_FRACTION / 2)
        share = (too_large_size - target) / (too_large_size - fitting_size)
        middle = too_few + round((enough - too_few) * share)
        middle = min(max(middle, too_few + 1), enough - 1)
        candidate = _with_zeros(tensors, order[:middle])
        size = len(encode_artifact(config, candidate, codecs))
        if size <= limit_bytes:
            enough, fitted, fitting_size = middle, candidate, size
        else:
            too_few, too_large_size = middle, size
    return fitted, enough


def _remedy(tensors: Mapping[str, Stored], excess_bytes: int) -> str:
    """What to change to save that many bytes; scales f times as wide save log₂ f bits a code."""
    codes = sum(tensors[name].codes.numel() for name in _int6_names(tensors))
    bits = 8 * excess_bytes / codes
    if bits > LARGEST_SAVING_BITS:
        return "make the model smaller or raise the budget"
    factor = f"multiply gptq.scale_factor by {1.01 * 2**bits:.2f}"
    return f"{factor}, make the model smaller or raise the budget"


def count_zeros(layers: pd.DataFrame, tensors: Mapping[str, Stored]) -> pd.DataFrame:
    """The per-matrix table of GPTQ with a column `zeros`: codes that are zero in `tensors`."""
    zeros = [
        int((tensors[bank].codes[matrix] == 0).sum())
        for bank, matrix in zip(layers["bank"], layers["matrix"], strict=True)
    ]
    return layers.assign(zeros=zeros)


def _int6_names(tensors: Mapping[str, Stored]) -> list[str]:
    return [name for name in sorted(tensors) if storage_of(name) == "int6"]


def _cheapest_ones(tensors: Mapping[str, Stored]) -> torch.Tensor:
    """Positions of the ±1 codes in the joined banks, the cheapest to zero first: int64."""
    positions, scales, offset = [], [], 0
    for name in _int6_names(tensors):
        codes = tensors[name].codes
        ones = (codes.abs() == 1).flatten().nonzero().flatten()
        positions.append(ones + offset)
        scales.append(tensors[name].scales.flatten()[ones // codes.shape[-1]])
        offset += codes.numel()
    # Scales are positive, so their order is that of their squares.
    order = torch.cat(scales).float().argsort(stable=True)
    return torch.cat(positions)[order]


def _with_zeros(tensors: Mapping[str, Stored], positions: torch.Tensor) -> dict[str, Stored]:
    """A copy of `tensors` with the codes at `positions` of the joined banks zeroed."""
    result, offset = dict(tensors), 0
    for name in _int6_names(tensors):
        codes = tensors[name].codes.clone()
        inside = (positions >= offset) & (positions < offset + codes.numel())
        codes.view(-1)[positions[inside] - offset] = 0
        offset += codes.numel()
        result[name] = QuantizedTensor(codes, tensors[name].scales)
    return result
