"""Plain evaluation: a split cut in sequences that do not overlap."""

from dataclasses import dataclass

import numpy as np

from fairway.data.dataset import Dataset, read_split
from fairway.data.token_bytes import byte_counts, token_bytes
from fairway.data.tokenizer import load_tokenizer
from fairway.evaluation.bits_per_byte import bits_per_byte
from fairway.model.gpt import GPT
from fairway.model.losses import target_losses


@dataclass(frozen=True)
class SplitScore:
    """Sums over every target of a split."""

    nats: float
    tokens: int
    bytes: int

    def as_metrics(self) -> dict[str, float | int]:
        """val_loss (nats per token), val_bpb, tokens, bytes."""
        return {
            "val_loss": self.nats / self.tokens,
            "val_bpb": bits_per_byte(self.nats, self.bytes),
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def evaluate_split(
    model: GPT, dataset: Dataset, split: str, batch_tokens: int = 65536
) -> SplitScore:
    """Score every target of `split` once, at the model's training length."""
    tokens = read_split(dataset, split)
    losses = target_losses(model, tokens, batch_tokens)
    counts = byte_counts(load_tokenizer(dataset.tokenizer_path))
    return SplitScore(
        nats=float(losses.sum()),
        tokens=len(losses),
        bytes=int(token_bytes(tokens, counts).sum(dtype=np.int64)),
    )
