"""From a model to its artifact: calibration, quantization, rounding of the rest, the size limit."""

from pathlib import Path
from typing import Any

import pandas as pd

from fairway.data.dataset import Dataset
from fairway.model.gpt import GPT
from fairway.quantization.artifact import (
    Stored,
    quantizable,
    storable,
    stream_table,
    write_artifact,
)
from fairway.quantization.calibration import calibration_tokens, collect_hessians
from fairway.quantization.pruning import count_zeros, fit_to_limit
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

    That is the quantizer's table, one row a matrix, with a column `zeros`, and the metrics that the
    gptq stage reports. Nothing is written where a UserError is raised: by the quantizer, by
    `storable`, or because the limit is out of reach.
    """
    quantizer = quantizer_of(settings)
    tensors, layers = quantize_model(model, quantizer, settings, dataset, seed)
    tensors, zeroed = fit_to_limit(model.config, tensors, limit_bytes, quantizer)
    size = write_artifact(path, model.config, tensors)
    streams = stream_table(Path(path).read_bytes())
    errors = ("error", "error_round_to_nearest")
    return count_zeros(layers, tensors), {
        "quantizer": settings.quantizer.name,
        "calibration": settings.calibration if quantizer.needs_hessians else None,
        "artifact_bytes": size,
        "streams": {name: length for name, (_, length) in streams.items()},
        "codecs": {name: codec for name, (codec, _) in streams.items()},
        "zeros": zeroed,
        **{f"mean_{name}": float(layers[name].mean()) for name in errors if name in layers},
    }


def quantize_model(
    model: GPT, quantizer: Quantizer, settings: QuantizationSettings, dataset: Dataset, seed: int
) -> tuple[dict[str, Stored], pd.DataFrame]:
    """The stored tensors of all the model's parameters, and the quantizer's table of matrices.

    Where the quantizer needs Hessians they are taken on calibration text, which `settings` says how
    to make and which depends on `seed`. Raises UserError as the quantizer and `storable` do.
    """
    hessians = None
    if quantizer.needs_hessians:
        tokens = calibration_tokens(model, dataset, settings, seed)
        hessians = collect_hessians(model, tokens, settings.batch_sequences)
    quantized, layers = quantizer.quantize(quantizable(model), hessians)
    return storable(model, quantized), layers
