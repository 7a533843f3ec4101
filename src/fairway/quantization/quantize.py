"""From a model to its artifact: calibration, quantization, rounding of the rest, the size limit."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fairway.data.dataset import Dataset
from fairway.files import write_bytes
from fairway.model.gpt import GPT
from fairway.quantization.artifact import Stored, quantizable, storable, stream_table
from fairway.quantization.calibration import (
    calibration_tokens,
    collect_hessians,
    collect_sensitivities,
)
from fairway.quantization.coding import code_bits
from fairway.quantization.filling import fill_limit
from fairway.quantization.integers import EMBEDDING
from fairway.quantization.pruning import fit_to_limit
from fairway.quantization.quantizers.base import Quantizer
from fairway.quantization.settings import QuantizationSettings, quantizer_of


def quantize_to_file(
    path: str | Path,
    model: GPT,
    settings: QuantizationSettings,
    dataset: Dataset,
    *,
    seed: int,
    limit_bytes: int,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Write the model's artifact, at most `limit_bytes` long; return what there is to say of it.

    That is the quantizer's table, one row a matrix, with columns `zeros` and `bits_per_code`, and
    the metrics that the gptq stage reports. Nothing is written where a UserError is raised: by the
    quantizer, by `storable`, or because the limit is out of reach.
    """
    quantizer = quantizer_of(settings)
    stored_at = prepared_model(model, quantizer, settings, dataset, seed)
    factor, zeroed = 1.0, 0
    if quantizer.fills_budget:
        data, tensors, layers, factor = fill_limit(model.config, stored_at, limit_bytes)
    else:
        tensors, layers = stored_at(factor)
        data, tensors, zeroed = fit_to_limit(model.config, tensors, limit_bytes, quantizer)
    write_bytes(path, data)
    streams = stream_table(data)
    errors = ("error", "error_round_to_nearest")
    return with_code_columns(layers, tensors), {
        "quantizer": settings.quantizer.name,
        "calibration": settings.calibration if quantizer.needs_hessians else None,
        "artifact_bytes": len(data),
        "streams": {name: length for name, (_, length) in streams.items()},
        "codecs": {name: codec for name, (codec, _) in streams.items()},
        "zeros": zeroed,
        "step_factor": factor,
        **{f"mean_{name}": float(layers[name].mean()) for name in errors if name in layers},
    }


def prepared_model(
    model: GPT, quantizer: Quantizer, settings: QuantizationSettings, dataset: Dataset, seed: int
) -> Callable[[float], tuple[dict[str, Stored], pd.DataFrame]]:
    """A function from a factor on every step to the stored tensors of all the model's parameters,
    and the quantizer's table of matrices; it raises UserError as the quantizer and `storable` do.

    Where the quantizer needs Hessians they are taken on calibration text, which `settings` says how
    to make and which depends on `seed`; sensitivities likewise.
    """
    hessians = sensitivities = None
    if quantizer.needs_hessians:
        tokens = calibration_tokens(model, dataset, settings, seed)
        hessians = collect_hessians(model, tokens, settings.batch_sequences)
        if quantizer.needs_sensitivities:
            sensitivities = collect_sensitivities(model, tokens, settings.batch_sequences)
    matrices = quantizable(model, quantizer.takes_embedding)
    quantized_at = quantizer.prepared(matrices, hessians, sensitivities)

    def stored_at(factor: float) -> tuple[dict[str, Stored], pd.DataFrame]:
        quantized, layers = quantized_at(factor)
        if quantizer.takes_embedding:
            quantized[EMBEDDING] = quantized[EMBEDDING].mapped(lambda part: part[0])
        return storable(model, quantized), layers

    return stored_at


def with_code_columns(layers: pd.DataFrame, tensors: Mapping[str, Stored]) -> pd.DataFrame:
    """The quantizer's table with `zeros`, codes of a matrix that are zero in `tensors`, and
    `bits_per_code`, their entropy given the spreads of rows and columns, as the range coder has it.
    """
    stacks = {name: tensors[name].codes for name in layers["bank"].unique()}
    stacks = {name: codes.view(-1, *codes.shape[-2:]) for name, codes in stacks.items()}
    bits = dict(zip(stacks, code_bits([codes.numpy() for codes in stacks.values()]), strict=True))
    rows = list(zip(layers["bank"], layers["matrix"], strict=True))
    zeros = [int((stacks[bank][matrix] == 0).sum()) for bank, matrix in rows]
    return layers.assign(
        zeros=zeros, bits_per_code=[float(bits[bank][matrix]) for bank, matrix in rows]
    )
