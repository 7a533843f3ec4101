"""What a quantizer is: it makes small integer codes of the model's matrices.

To write one, subclass `Quantizer` in a module of your own and name it in the config:

    gptq:
      quantizer: {"group_int4:GroupInt4": {group_columns: 64}}

The gptq stage then stores what `quantize` returns: the artifact's file describes every tensor
itself, so it needs no new format. Late quantization-aware training applies `fake`. A complete
example of 40 lines is docs/examples/group_int4.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import pandas as pd
from torch import Tensor

from fairway import settings
from fairway.quantization.integers import QuantizedTensor

Hessians = Mapping[tuple[str, int], Tensor]
"""(name, index) of a matrix → mean of x·xᵀ over calibration inputs x, float64 [C, C]."""

Sensitivities = Mapping[tuple[str, int], Tensor]
"""(name, index) of a matrix → mean square of the loss's gradient in each output, float64 [R]."""

Quantized = tuple[dict[str, QuantizedTensor], pd.DataFrame]
"""Codes and scales of every parameter, and a table with one row a matrix."""


class Quantizer(ABC):
    """Base of every quantizer.

    Shapes: N matrices of one shape lie in one parameter; R rows (outputs), C columns (inputs).
    """

    class Settings(settings.Settings):
        """The quantizer's own keys: fields with defaults; none here.

        `check_with` may hold them against other sections, such as the model's sizes, before any
        stage runs.
        """

    title: ClassVar[str]
    """A few words for people, such as "int4 in groups"."""
    needs_hessians: ClassVar[bool] = False
    """Whether `quantize` reads Hessians. Without need no calibration text is made."""
    needs_sensitivities: bool = False
    """Whether `prepared` reads sensitivities."""
    takes_embedding: bool = False
    """Whether it is given the token embedding too, as a parameter of one matrix [1, V, C]."""
    fills_budget: bool = False
    """Whether the stage looks for the factor on every step with which the artifact fills its limit;
    otherwise it zeroes codes where the artifact is too large."""

    def __init__(self, settings: settings.Settings) -> None:
        """settings: an instance of the class's own `Settings`."""
        self.settings = settings

    @abstractmethod
    def quantize(self, matrices: Mapping[str, Tensor], hessians: Hessians | None) -> Quantized:
        """Codes and scales of every parameter, and a table with one row a matrix.

        matrices: name → float32 [N, R, C], on any device. hessians: of every matrix, or None where
        `needs_hessians` is false. The table has at least the columns of `layer_table`; more are
        kept. Raise UserError where the weights cannot be quantized; the same input must give the
        same codes.
        """

    def prepared(
        self,
        matrices: Mapping[str, Tensor],
        hessians: Hessians | None,
        sensitivities: Sensitivities | None,
    ) -> Callable[[float], Quantized]:
        """A function from a factor on every step to codes and table; only a quantizer that
        `fills_budget` is given another factor than 1, and only one that needs them sensitivities.
        """
        return lambda factor: self.quantize(matrices, hessians)

    @abstractmethod
    def fake(self, name: str, weight: Tensor) -> Tensor:
        """`weight` [..., R, C] of the parameter `name` with the values that it would be stored
        with, for late quantization-aware training; `straight_through` gives it a gradient.

        It runs in each training step, compiled and inside CUDA graphs: no `.item()`, no shapes that
        depend on values, no Hessians.
        """

    def remedy(self, excess_bits: float) -> str | None:
        """What to change in the settings to save `excess_bits` bits a code, for the error about an
        artifact that is too large; None where nothing does."""
        return None


def layer_table(
    matrices: Mapping[str, Tensor], quantized: Mapping[str, QuantizedTensor]
) -> pd.DataFrame:
    """One row a matrix: `bank` (the parameter), `matrix` (its index in it), and `error`, the sum of
    squared changes of its weights, float64."""
    tables = []
    for name, weights in matrices.items():
        change = weights.detach().double() - quantized[name].dequantize().double()
        errors = change.square().sum((1, 2)).tolist()
        table = {"bank": name, "matrix": range(len(weights)), "error": errors}
        tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)
