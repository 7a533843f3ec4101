"""Bits per byte: a loss that does not depend on how the text was cut into tokens."""

import math

from fairway.errors import UserError


def bits_per_byte(total_nats: float, total_bytes: int) -> float:
    """Σ nats / (ln 2 · Σ bytes), over the same targets; sum both in float64 or in integers.

    Raises UserError for zero bytes: no text was scored, so there is no figure.
    """
    if total_bytes <= 0:
        raise UserError(
            f"the scored tokens stand for {total_bytes} bytes of text, expected more than 0: "
            "check that the validation shards hold text and that the tokenizer is theirs"
        )
    return total_nats / (math.log(2.0) * total_bytes)


def original_metrics(
    total_nats: float, original_bytes: int | None
) -> dict[str, float | int | None]:
    """val_bpb_original and original_bytes: of the text as it was before normalization.

    original_bytes: None where that text is not known, as of finished shards; so are both then.
    """
    known = original_bytes is not None
    return {
        "val_bpb_original": bits_per_byte(total_nats, original_bytes) if known else None,
        "original_bytes": original_bytes,
    }
