"""Fit the artifact into the size limit by zeroing the codes that cost least."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fairway.errors import UserError
from fairway.model.spec import GPTConfig, parameters
from fairway.quantization.artifact import Stored, encode_artifact, stream_table
from fairway.quantization.quantizers.base import Quantizer

MAXIMUM_SEARCH_STEPS = 8
SLACK_FRACTION = 0.0005
"""The search stops this close under the limit: each step compresses the whole model."""
LEAST_BITS = 3
"""With fewer, ±1 are all the codes there are: zeroing them would be to drop the weights."""


def fit_to_limit(
    config: GPTConfig, tensors: Mapping[str, Stored], limit_bytes: int, quantizer: Quantizer
) -> tuple[bytes, dict[str, Stored], int]:
    """Zero as few ±1 codes of the quantizer as make the artifact at most `limit_bytes` long.

    Codes go in the order of their squared scale, least first: that is the squared change of the
    weight. The number is found by interpolation between one that is too small and one that is
    large enough (the "Illinois" variant of false position). Codes of 2 bits are left alone.
    Returns the artifact, its tensors and the number zeroed; UserError where even all are too few.
    """
    data = encode_artifact(config, tensors)
    size = len(data)
    if size <= limit_bytes:
        return data, dict(tensors), 0
    # A few zeros do not change which codec is smaller; if they do, what is written is smaller yet.
    codecs = {stream: codec for stream, (codec, _) in stream_table(data).items()}
    names = [name for name in _quantized(config, tensors) if tensors[name].bits >= LEAST_BITS]
    order = _cheapest_ones(names, tensors)
    too_few, enough = 0, len(order)
    fitted = _with_zeros(names, tensors, order)
    fitting_size = len(encode_artifact(config, fitted, codecs))
    if fitting_size > limit_bytes:
        codes = sum(tensors[name].codes.numel() for name in _quantized(config, tensors))
        remedy = quantizer.remedy(8 * (fitting_size - limit_bytes) / max(1, codes))
        zeroed = f"even with all {enough} codes of ±1 zeroed"
        raise UserError(
            f"the artifact needs {fitting_size} bytes "
            f"{zeroed if names else 'and codes of 2 bits are not zeroed'}, "
            f"but {limit_bytes} are left of budgets.artifact_bytes beside the code: "
            f"{f'{remedy}, ' if remedy else ''}make the model smaller or raise the budget"
        )
    # Aimed at the middle of the slack, so that a step is as likely to fit as to be close.
    target = limit_bytes * (1 - SLACK_FRACTION / 2)
    excess, room = size - target, target - fitting_size
    fitted_last = None
    for _ in range(MAXIMUM_SEARCH_STEPS):
        if enough - too_few <= 1 or limit_bytes - fitting_size <= limit_bytes * SLACK_FRACTION:
            break
        middle = too_few + round((enough - too_few) * excess / (excess + room))
        middle = min(max(middle, too_few + 1), enough - 1)
        candidate = _with_zeros(names, tensors, order[:middle])
        size = len(encode_artifact(config, candidate, codecs))
        fits = size <= limit_bytes
        if fits:
            enough, fitted, fitting_size, room = middle, candidate, size, target - size
        else:
            too_few, excess = middle, size - target
        # The bytes saved are no straight line: an end that stays put twice counts half.
        if fits and fitted_last is True:
            excess /= 2
        elif not fits and fitted_last is False:
            room /= 2
        fitted_last = fits
    return encode_artifact(config, fitted), fitted, enough


def _quantized(config: GPTConfig, tensors: Mapping[str, Stored]) -> list[str]:
    """The names of the tensors that the quantizer made; embeddings are not among them."""
    table = parameters(config)
    return [name for name in sorted(tensors) if table[name].storage == "quantized"]


def _cheapest_ones(names: Iterable[str], tensors: Mapping[str, Stored]) -> Tensor:
    """Positions of the ±1 codes in the joined tensors, the cheapest to zero first: int64."""
    positions, scales = [torch.empty(0, dtype=torch.int64)], [torch.empty(0)]
    offset = 0
    for name in names:
        codes = tensors[name].codes
        ones = codes.abs() == 1
        positions.append(ones.flatten().nonzero().flatten() + offset)
        scales.append(tensors[name].steps().expand(codes.shape)[ones])
        offset += codes.numel()
    # Scales are positive, so their order is that of their squares.
    return torch.cat(positions)[torch.cat(scales).argsort(stable=True)]


def _with_zeros(
    names: Iterable[str], tensors: Mapping[str, Stored], positions: Tensor
) -> dict[str, Stored]:
    """A copy of `tensors` with the codes at `positions` of the joined tensors zeroed."""
    result, offset = dict(tensors), 0
    for name in names:
        codes = tensors[name].codes.clone(memory_format=torch.contiguous_format)
        inside = (positions >= offset) & (positions < offset + codes.numel())
        codes.view(-1)[positions[inside] - offset] = 0
        offset += codes.numel()
        result[name] = replace(tensors[name], codes=codes)
    return result
