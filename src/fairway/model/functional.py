"""The model's functions without parameters, shared by its two formulations.

Shapes: B sequences, T positions, H query heads, K key/value heads, D head width.
"""

import torch
import torch.nn.functional as F

from fairway.model.spec import GPTConfig

NORM_EPSILON = torch.finfo(torch.float32).eps
"""RMS norms add it to the mean square."""

VALUE_NORM_EPSILON = 1e-12
"""Exclusive self-attention divides by a value's norm, but by no less than this."""


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x²) + ε) over the last dimension, with no learned scale."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPSILON)


def positions_from(x: torch.Tensor, first_position: int) -> torch.Tensor:
    """x [B, T, …] from `first_position` on; x itself where that is all of it."""
    return x[:, first_position:] if first_position else x


def document_numbers(config: GPTConfig, tokens: torch.Tensor) -> torch.Tensor | None:
    """The number of BOS up to each of `tokens` [B, T], int64, where documents are masked."""
    return (tokens == config.bos_id).cumsum(1) if config.document_masks else None


def bigram_bucket(tokens: torch.Tensor, previous: torch.Tensor, buckets: int) -> torch.Tensor:
    """(36313·x_t xor 27191·x_{t−1}) mod (buckets−1); the last bucket where `previous` is −1."""
    hashed = torch.bitwise_xor(36313 * tokens, 27191 * previous) % (buckets - 1)
    return torch.where(previous < 0, buckets - 1, hashed)


def rotary_base(config: GPTConfig) -> float:
    """The rotary base, rescaled for sequences beyond rope_trained_tokens ("NTK-aware" scaling)."""
    stretch = max(1.0, config.sequence_tokens / config.rope_trained_tokens)
    dimensions = config.rotary_dimensions
    # With two dimensions there is one frequency, 1, whatever the base.
    exponent = dimensions / (dimensions - 2) if dimensions > 2 else 0.0
    return config.rope_base * stretch**exponent


def rotary_angles(config: GPTConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [T, rotary_dimensions/2], of int64 `positions` [T]."""
    dimensions = config.rotary_dimensions
    exponents = torch.arange(0, dimensions, 2, device=positions.device) / dimensions
    angles = torch.outer(positions.float(), rotary_base(config) ** -exponents)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of the first dimensions of each head; x [B, T, heads, D].

    Su et al., RoFormer (2021); the rotated pairs are (i, i + half).
    """
    cos, sin = (part[:, None, :] for part in rotation)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


def exclude_self(output: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Exclusive self-attention: subtract each head's projection on its own position's value.

    output [B, T, H, D], values [B, T, K, D] → [B, T, H, D].
    """
    B, T, H, D = output.shape
    own = F.normalize(values, dim=-1, eps=VALUE_NORM_EPSILON).unsqueeze(3)
    grouped = output.view(B, T, values.shape[2], -1, D)
    return (grouped - (grouped * own).sum(-1, keepdim=True) * own).view(B, T, H, D)
