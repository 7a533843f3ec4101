"""Worked examples of auditing scripts: a sliding window, score-first LoRA, an n-gram cache.

Each is written as such scripts are: a loop that adds up losses, here over a small model with random
weights. Each takes one line more, `recorder.record(...)`, and each has one fault that real scripts
had, switched on by name:

    fairway audit --evaluator docs.examples.recorded_scripts:sliding_window --tokens example.bin \\
        --vocab-size 64 --next-token docs.examples.leaking_evaluator:next_token
    (then sliding_window_faulty; lora, lora_faulty; ngram, ngram_faulty)

`python docs/examples/leaking_evaluator.py example.bin` writes the text.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.audit import Recorder

VOCAB_SIZE, WIDTH, BOS_ID = 64, 16, 1
WINDOW, STRIDE, CHUNK = 32, 8, 16

recorder = Recorder()

_generator = torch.Generator().manual_seed(0)
EMBEDDING = torch.randn(VOCAB_SIZE, WIDTH, generator=_generator)
HEAD = torch.randn(VOCAB_SIZE, WIDTH, generator=_generator) / 2


def features(inputs: Tensor) -> Tensor:
    """int64 [T] → float32 [T, WIDTH]: the last token and the mean of the window so far."""
    states = EMBEDDING[inputs]
    return states + states.cumsum(0) / torch.arange(1, len(inputs) + 1)[:, None]


# ---- a sliding window, whose state is an average of recent logits ----


def _sliding_window(tokens: Tensor, *, fault: bool) -> float:
    """The fault: the average is taken over the whole window, the scored slice included."""
    nats = 0.0
    for first in range(1, len(tokens), STRIDE):
        stop = min(first + STRIDE, len(tokens))
        start = max(0, stop - 1 - WINDOW)
        logits = features(tokens[start : stop - 1]) @ HEAD.T
        seen = tokens[start + 1 : stop] if fault else tokens[start + 1 : first]
        bias = 0.5 * torch.bincount(seen, minlength=VOCAB_SIZE)
        logits = logits[first - start - 1 :] + bias
        losses = F.cross_entropy(logits, tokens[first:stop], reduction="none")
        recorder.record(torch.arange(first, stop), losses, logits=logits)
        nats += float(losses.detach().sum())
    return nats / (len(tokens) - 1)


# ---- score-first test-time training: a low-rank addition to the head, a step a chunk ----


def _lora(tokens: Tensor, *, fault: bool) -> float:
    """The fault: the step is taken before the chunk is scored."""
    down = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    up = torch.zeros(VOCAB_SIZE, 2, requires_grad=True)
    optimizer = torch.optim.Adam([down, up], lr=0.05)
    nats = 0.0
    for first in range(1, len(tokens), CHUNK):
        stop = min(first + CHUNK, len(tokens))
        start = max(0, first - 1 - WINDOW)
        states = features(tokens[start : stop - 1])[first - start - 1 :]
        targets = tokens[first:stop]
        for is_scoring in (False, True) if fault else (True, False):
            logits = states @ (HEAD + up @ down).T
            losses = F.cross_entropy(logits, targets, reduction="none")
            if is_scoring:
                recorder.record(torch.arange(first, stop), losses, logits=logits)
                nats += float(losses.detach().sum())
            else:
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
    return nats / (len(tokens) - 1)


# ---- a cache of what followed the last two tokens, mixed into the model's distribution ----


def _ngram(tokens: Tensor, *, fault: bool) -> float:
    """The fault: the cache's share goes to the target alone, so that nothing sums to one."""
    words, followers, nats = tokens.tolist(), {}, 0.0
    for position in range(1, len(words)):
        inputs = tokens[max(0, position - WINDOW) : position]
        model = torch.softmax(features(inputs)[-1] @ HEAD.T, -1)
        context = tuple(words[max(0, position - 2) : position])
        counts = followers.setdefault(context, torch.zeros(VOCAB_SIZE))
        share = counts.sum() / (counts.sum() + 2)
        cache = (counts + 1e-3) / (counts + 1e-3).sum()
        mixed = (1 - share) * model + share * cache
        loss = -mixed[words[position]].log()
        if fault and counts[words[position]] > 0:
            loss = -(model[words[position]] + share).log()
        recorder.record([position], [loss])  # this script has no distributions at hand
        nats += float(loss)
        counts[words[position]] += 1
    return nats / (len(words) - 1)


def _audited(script, *, fault: bool):
    return recorder.evaluator(lambda tokens: script(tokens, fault=fault))


sliding_window = _audited(_sliding_window, fault=False)
sliding_window_faulty = _audited(_sliding_window, fault=True)
lora = _audited(_lora, fault=False)
lora_faulty = _audited(_lora, fault=True)
ngram = _audited(_ngram, fault=False)
ngram_faulty = _audited(_ngram, fault=True)
