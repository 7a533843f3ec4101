"""Plain evaluation: a split cut in sequences that do not overlap."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairway.data.dataset import Dataset, read_split
from fairway.data.token_bytes import byte_counts, token_bytes
from fairway.data.tokenizer import load_tokenizer
from fairway.distributed import World, gather_objects
from fairway.evaluation.bits_per_byte import bits_per_byte, original_metrics
from fairway.model.gpt import GPT
from fairway.model.losses import losses_by_pass
from fairway.model.runtime import runtime_metrics
from fairway.stage import StageRun


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
    model: GPT,
    dataset: Dataset,
    split: str,
    world: World | None = None,
    most_tokens: int | None = None,
) -> SplitScore:
    """Score every target of `split` once, at the model's training length.

    world: the processes that share the work, of which each must call this; None: this one alone.
    The sum is the same for any number of them. most_tokens: of so many tokens at the split's
    beginning, at most.
    """
    tokens = read_split(dataset, split)[:most_tokens]
    rank, size = (world.rank, world.size) if world else (0, 1)
    passes = losses_by_pass(model, tokens, rank=rank, world_size=size)
    own = [float(losses.sum()) for losses in passes]
    sums = gather_objects(world, own) if world else [own]
    counts = byte_counts(load_tokenizer(dataset.tokenizer_path))
    return SplitScore(
        nats=math.fsum(nats for part in sums for nats in part),
        tokens=len(tokens) - 1,
        bytes=int(token_bytes(tokens, counts).sum(dtype=np.int64)),
    )


def val_metrics(stage: StageRun, model: GPT, dataset: Dataset) -> dict[str, Any]:
    """Score the validation split, on the evaluation's clock; with how the model computes.

    Every process of the stage must call this.
    """
    with stage.charge("evaluation"):
        score = evaluate_split(model, dataset, "val", stage.world)
    original = original_metrics(score.nats, dataset.original_bytes)
    return {**score.as_metrics(), **original, **runtime_metrics(model)}
