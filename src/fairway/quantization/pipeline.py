"""From a model to what its artifact stores: calibration, quantization, rounding of the rest."""

import pandas as pd

from fairway.data.dataset import Dataset
from fairway.model.gpt import GPT
from fairway.quantization.artifact import Stored, quantizable, storable
from fairway.quantization.calibration import calibration_tokens, collect_hessians
from fairway.quantization.quantizers.base import Quantizer
from fairway.quantization.settings import QuantizationSettings


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
