"""What tests of evaluators share: their settings, a model to adapt, and flips to feel leaks by."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairway.audit.interface import Scores
from fairway.evaluation.adapters.lora import LoraSettings
from fairway.evaluation.adapters.ngram import NgramSettings
from fairway.evaluation.adapters.slot import SlotSettings
from fairway.evaluation.evaluator import EvaluatorSettings
from fairway.evaluation.stream import EvaluationSettings
from fairway.model.gpt import GPT, GPTConfig

SMALL = EvaluatorSettings(
    evaluation=EvaluationSettings(
        adapters=("slot",),
        window_tokens=32,
        stride_tokens=6,
        lanes=5,
        forward_windows=2,
    ),
    slot=SlotSettings(
        scope="window",
        batch_windows=4,
        focal_tokens="all",
        l2=3.0,
        clamp=5.0,
        iterations=25,
        history=10,
        same_document=True,
        context_logits="current",
    ),
    lora=LoraSettings(
        rank=2,
        projections=("query", "value"),
        scales=False,
        learning_rate=0.05,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        gradient_clip=1.0,
        steps=1,
        chunk_tokens=6,
        context_tokens=24,
    ),
    ngram=NgramSettings(
        caches=(
            {
                "reach": "stream",
                "orders": (2, 4),
                "recent_occurrences": 3,
                "bias": -2.0,
                "order_weight": 0.5,
                "count_weight": 0.5,
                "variety_weight": 2.0,
            },
            {
                "reach": "document",
                "orders": (1, 2, 3, 5),
                "recent_occurrences": 4,
                "bias": -1.0,
                "order_weight": 0.3,
                "count_weight": 1.0,
                "variety_weight": 1.5,
            },
        )
    ),
)


def changed(settings: EvaluatorSettings, **changes: Any) -> EvaluatorSettings:
    """`settings` with keys changed; each belongs to one section only."""
    sections = {}
    for section in fields(settings):
        before = getattr(settings, section.name)
        own = {key.name for key in fields(before)} & set(changes)
        sections[section.name] = replace(before, **{key: changes.pop(key) for key in own})
    assert not changes, f"no section has {', '.join(changes)}"
    return EvaluatorSettings(**sections)


def focal_places(settings: EvaluatorSettings) -> int:
    """The window's last positions that a delta may be fitted to."""
    focal = settings.slot.focal_tokens
    return settings.evaluation.window_tokens if focal == "all" else int(focal)


def random_model(vocab_size: int = 24, seed: int = 0) -> GPT:
    """Random weights everywhere: at the true start whole layers are zero."""
    config = GPTConfig(
        vocab_size=vocab_size, sequence_tokens=32, layers=3, width=16, heads=4, kv_heads=2,
        mlp_width=32, rotary_dimensions=4, rope_base=10000.0, rope_trained_tokens=16,
        bigram_buckets=16, bigram_width=4, value_width=4, value_layers=(1,), logit_softcap=30.0,
        query_gain=5.0,
    )  # fmt: skip
    model = GPT(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def reaches_of_flips(
    evaluate: Callable[[Tensor], Scores], tokens: Tensor, flips: int, bos_id: int, vocab_size: int
) -> list[int]:
    """For each target up to a flipped token whose distribution changes with it: how far before.

    Flips over the stream: another token, a BOS where there was none, a BOS taken away.
    """
    unflipped = evaluate(tokens).log_probs
    positions = np.linspace(1, len(tokens) - 1, flips).astype(int).tolist()
    positions += torch.nonzero(tokens == bos_id).squeeze(1)[1:3].tolist()
    reaches = []
    for index, position in enumerate(positions):
        flipped = tokens.clone()
        flipped[position] = bos_id if index % 3 == 0 else (tokens[position] + 7) % vocab_size
        differs = (evaluate(flipped).log_probs != unflipped).any(1)
        changed = torch.nonzero(differs).squeeze(1) + 1
        assert position == len(tokens) - 1 or len(changed) or flipped[position] == tokens[position]
        reaches += (position - changed[changed <= position]).tolist()
    return reaches
