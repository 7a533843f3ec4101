"""A worked example of a quantizer: round to nearest, int4, with a scale for each group of columns.

Put this file beside your config and name its class there:

    gptq:
      quantizer: {"group_int4:GroupInt4": {group_columns: 64}}

The artifact is then written, read back, held against the budget and evaluated with int4 matrices,
and late quantization-aware training rounds to int4 as well.
"""

from collections.abc import Mapping

import pandas as pd
from pydantic import Field
from torch import Tensor

from fairway import settings
from fairway.quantization.integers import QuantizedTensor, fake_quantize, round_to_nearest
from fairway.quantization.quantizers.base import Hessians, Quantizer, layer_table

BITS = 4


class GroupInt4(Quantizer):
    """Codes from −7 to 7; the largest weight of a group gets the largest code."""

    class Settings(settings.Settings):
        group_columns: int = Field(32, ge=1)
        """Neighboring columns of a row that share a scale; 16 / group_columns more bits a code."""

    title = "round to nearest, int4 in groups"

    def quantize(
        self, matrices: Mapping[str, Tensor], hessians: Hessians | None
    ) -> tuple[dict[str, QuantizedTensor], pd.DataFrame]:
        quantized = {
            name: round_to_nearest(weights, BITS, self.settings.group_columns)
            for name, weights in matrices.items()
        }
        return quantized, layer_table(matrices, quantized)

    def fake(self, name: str, weight: Tensor) -> Tensor:
        return fake_quantize(weight, BITS, self.settings.group_columns)
