"""A worked example for `fairway audit`: one evaluator that leaks, and its honest twin.

Both score a text with the same small bigram model and improve it with a bias, one number for each
token of the vocabulary, fitted to recent text. The honest one fits the bias for a slice on the text
before that slice. The leaking one shares a bias between the slices of a block, so that each slice
is scored with a bias that was fitted on it: the fault of batch-shared SLOT in twenty lines.

    python docs/examples/leaking_evaluator.py example.bin          # writes a text to audit
    fairway audit --evaluator docs.examples.leaking_evaluator:leaking \\
        --next-token docs.examples.leaking_evaluator:next_token \\
        --base docs.examples.leaking_evaluator:base --tokens example.bin \\
        --vocab-size 64 --window-tokens 32 --stride-tokens 32 --batch-windows 8
    (then the same with :honest)
"""

import sys

import torch
from torch import Tensor

from fairway.audit.interface import Scores

VOCAB_SIZE = 64
BOS_ID = 1
SLICE_TOKENS = 32
BLOCK_SLICES = 8
PRIOR_TOKENS = 8.0

_MODEL = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))


def base(tokens: Tensor) -> Tensor:
    """tokens int64 [n + 1] → log-probabilities float32 [n, V] of the plain model."""
    return torch.log_softmax(_MODEL[tokens[:-1]], dim=-1)


def next_token(prefix: Tensor) -> Tensor:
    """prefix int64 [k] → log-probabilities float32 [V] of the next token, by the plain model."""
    return torch.log_softmax(_MODEL[prefix[-1]], dim=-1)


def honest(tokens: Tensor) -> Scores:
    """Each slice with a bias fitted on the block of slices before it."""
    return _score(tokens, leaks=False)


def leaking(tokens: Tensor) -> Scores:
    """Each slice with the bias that its own block was fitted with."""
    return _score(tokens, leaks=True)


def _score(tokens: Tensor, *, leaks: bool) -> Scores:
    log_probs, targets = base(tokens), tokens[1:]
    rows = []
    for start in range(0, len(targets), SLICE_TOKENS):
        stop = min(start + SLICE_TOKENS, len(targets))
        first = start // SLICE_TOKENS // BLOCK_SLICES * BLOCK_SLICES * SLICE_TOKENS
        last = first + BLOCK_SLICES * SLICE_TOKENS
        fitted = slice(first, last) if leaks else slice(max(0, start - last + first), start)
        bias = _fit(log_probs[fitted], targets[fitted])
        rows.append(torch.log_softmax(log_probs[start:stop] + bias, dim=-1))
    scored_with = torch.cat(rows)
    # Every target is scored once, in order, and reported as -log p of its own distribution.
    positions = torch.arange(1, len(tokens))
    return Scores(scored_with, positions, -scored_with[positions - 1, targets])


def _fit(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Log ratio of seen to expected counts, each with a prior: float32 [V]."""
    seen = torch.bincount(targets, minlength=VOCAB_SIZE).float()
    return torch.log((seen + PRIOR_TOKENS) / (log_probs.exp().sum(dim=0) + PRIOR_TOKENS))


def example_text(num_tokens: int) -> Tensor:
    """A text drawn from the model itself, with a document start about every hundred tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.full((num_tokens,), BOS_ID)
    for index in range(1, num_tokens):
        if torch.rand((), generator=generator) > 0.01:
            probabilities = next_token(tokens[:index]).exp()
            tokens[index] = torch.multinomial(probabilities, 1, generator=generator)
    return tokens


if __name__ == "__main__":
    from fairway.data.shards import write_shard

    write_shard(sys.argv[1], example_text(1025).numpy())
