"""Plain evaluation: the stream cut in sequences that do not overlap."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fairway.data.dataset import Dataset, read_split
from fairway.data.tokenizer import load_tokenizer
from fairway.evaluation.bits_per_byte import bits_per_byte, byte_counts, token_bytes
from fairway.model.gpt import GPT


@dataclass(frozen=True)
class Score:
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


def evaluate_split(model: GPT, dataset: Dataset, split: str, batch_tokens: int = 65536) -> Score:
    """Score every target of `split` once, at the model's training length."""
    tokens = read_split(dataset, split)
    losses = target_losses(model, tokens, batch_tokens)
    counts = byte_counts(load_tokenizer(dataset.tokenizer_path))
    return Score(
        nats=float(losses.sum()),
        tokens=len(losses),
        bytes=int(token_bytes(tokens, counts).sum(dtype=np.int64)),
    )


@torch.no_grad()
def target_losses(model: GPT, tokens: np.ndarray, batch_tokens: int = 65536) -> np.ndarray:
    """Nats of tokens[1:], float64 [n], from an integer array [n+1].

    Sequences of the model's training length follow each other without overlap; what remains at
    the end is one shorter sequence.
    """
    length = model.config.sequence_tokens
    stream = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
    targets = len(stream) - 1
    rows = max(1, batch_tokens // length)
    losses = []
    for start in range(0, targets, rows * length):
        stop = min(start + rows * length, targets)
        whole = start + (stop - start) // length * length
        for first, last, width in ((start, whole, length), (whole, stop, stop - whole)):
            if last > first:
                inputs = stream[first:last].view(-1, width)
                wanted = stream[first + 1 : last + 1].view(-1, width)
                losses.append(_losses(model, inputs, wanted))
    return np.concatenate(losses)


def _losses(model: GPT, inputs: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    device = model.token_embedding.device
    logits = model(inputs.to(device)).flatten(0, 1)
    losses = F.cross_entropy(logits, targets.to(device).flatten(), reduction="none")
    return losses.double().cpu().numpy()
