"""Fill the size limit: the finest steps with which the artifact still fits."""

from collections.abc import Callable

import pandas as pd
import torch

from fairway.errors import UserError
from fairway.model.spec import GPTConfig
from fairway.quantization.artifact import Stored, encode_artifact, stream_table

SLACK_FRACTION = 0.003
"""The search stops this close under the limit: each try quantizes and compresses the model."""
MAXIMUM_TRIES = 12
SMALL_BYTES = 1 << 20
"""Of a smaller artifact every codec is tried each time; of a larger one only once."""
LARGEST_MOVE_OCTAVES = 3.0

Filled = tuple[dict[str, Stored], pd.DataFrame]
Point = tuple[float, int]
"""Octaves and the artifact's bytes."""


def fill_limit(
    config: GPTConfig, stored_at: Callable[[float], Filled], limit_bytes: int
) -> tuple[bytes, dict[str, Stored], pd.DataFrame, float]:
    """The artifact that fills `limit_bytes`; what `stored_at` gives for its factor; the factor.

    A factor f, log₂ f octaves, saves so many bits a code, nearly: the first move is computed so,
    later ones by interpolation. A quantizer makes steps no finer than its codes have range for, so
    the artifact of a small model may stay under the limit.
    Raises UserError where the limit is too small even for codes that are all zero.
    """
    octaves, codecs, filled = 0.0, None, None
    too_large: Point | None = None
    fitting: Point | None = None
    for _ in range(MAXIMUM_TRIES):
        tensors, table = stored_at(2.0**octaves)
        data = encode_artifact(config, tensors, codecs)
        if len(data) > SMALL_BYTES:
            codecs = {stream: codec for stream, (codec, _) in stream_table(data).items()}
        codes = [tensors[name].codes for name in table["bank"].unique()]
        if len(data) > limit_bytes:
            too_large = (octaves, len(data))
            if not any(map(torch.any, codes)):
                break
        else:
            has_grown = fitting is None or len(data) > fitting[1]
            fitting, filled = (octaves, len(data)), (data, tensors, table, 2.0**octaves)
            if len(data) > limit_bytes * (1 - SLACK_FRACTION) or not has_grown:
                break
        count = sum(map(torch.numel, codes))
        octaves = _next(octaves, len(data), too_large, fitting, limit_bytes, count)
    if filled is None:
        raise UserError(
            f"the artifact needs {len(data)} bytes even with steps {2.0**octaves:.3g} times as "
            f"wide, but {limit_bytes} are left of budgets.artifact_bytes beside the code: "
            "make the model smaller or raise the budget"
        )
    return filled


def _next(
    octaves: float,
    size: int,
    too_large: Point | None,
    fitting: Point | None,
    limit: int,
    codes: int,
) -> float:
    """The octaves to try, aimed at the middle of the slack."""
    target = limit * (1 - SLACK_FRACTION / 2)
    if too_large and fitting:
        (fine, larger), (wide, smaller) = too_large, fitting
        return fine + (wide - fine) * (larger - target) / max(1, larger - smaller)
    move = 8 * (size - target) / codes
    return octaves + max(-LARGEST_MOVE_OCTAVES, min(LARGEST_MOVE_OCTAVES, move))
