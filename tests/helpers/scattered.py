"""Small models with structure to them: every parameter random, none at its neutral start."""

import torch

from fairway.model.gpt import GPT
from fairway.model.spec import GPTConfig

SMALL = GPTConfig(
    vocab_size=48,
    sequence_tokens=24,
    layers=3,
    width=32,
    heads=4,
    kv_heads=2,
    mlp_width=48,
    rotary_dimensions=4,
    rope_trained_tokens=16,
    bigram_buckets=64,
    bigram_width=8,
    value_width=8,
    value_layers=(1, 2),
    query_gain=2.0,
)


def scattered_model(config: GPTConfig = SMALL, deviation: float = 0.15) -> GPT:
    """A model whose initial parameters have Gaussian numbers added; the same in each call."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * deviation)
    return model
