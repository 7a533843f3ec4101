"""SLOT as its description reads: plain loops, float64, PyTorch's own L-BFGS, one lane at a time."""

import torch
from torch.nn.functional import cross_entropy

from evaluators import adapter_settings, focal_tokens


def reference_scores(model, tokens, settings, bos_id, first_window=0, last_window=None):
    """{position: (log-probabilities before, after)} of one lane's windows, each float64 [V]."""
    slot, focal = adapter_settings(settings, "slot"), focal_tokens(settings)
    tokens = tokens.tolist()
    scores, delta, seen_logits = {}, None, {}
    windows = reference_windows(len(tokens) - 1, settings.window_tokens, settings.stride_tokens)
    for start, length, scored in windows[first_window:last_window]:
        logits = model(torch.tensor([tokens[start : start + length]]))[0].double()
        targets = range(start + 1, start + length + 1)
        current = {target: logits[target - start - 1] for target in targets}
        slice_targets, past = targets[-scored:], targets[:-scored]
        if not seen_logits:
            seen_logits = dict(current)
        document = bos_count(tokens, slice_targets[0] - 1, bos_id)
        context = [
            target
            for target in past
            if target > targets[-1] - focal
            and (not slot.same_document or bos_count(tokens, target - 1, bos_id) == document)
        ]
        source = current if slot.context_logits == "current" else seen_logits
        if delta is None:
            delta = torch.zeros_like(logits[0])
        delta = fit(context, source, tokens, delta, slot)
        for target in slice_targets:
            seen_logits[target] = current[target]
            applies = not slot.same_document or bos_count(tokens, target - 1, bos_id) == document
            after = current[target] + delta if applies else current[target]
            scores[target] = (current[target].log_softmax(0), after.log_softmax(0))
    return scores


def reference_windows(num_targets, window_tokens, stride_tokens):
    """(start, length, scored targets) of each window."""
    if num_targets <= window_tokens:
        return [(0, num_targets, num_targets)]
    windows, end = [(0, window_tokens, window_tokens)], window_tokens
    while end < num_targets:
        scored = min(stride_tokens, num_targets - end)
        end += scored
        windows.append((end - window_tokens, window_tokens, scored))
    return windows


def bos_count(tokens, last, bos_id) -> int:
    """Documents begun in tokens[0 … last]."""
    return tokens[: last + 1].count(bos_id)


def fit(context, logits, tokens, initial, slot):
    """Minimize (sum of cross-entropies + l2 / 2 |delta|^2) / targets from `initial`, then clamp."""
    if not context:
        return torch.zeros_like(initial)
    stacked = torch.stack([logits[target] for target in context])
    wanted = torch.tensor([tokens[target] for target in context])
    delta = initial.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [delta],
        max_iter=slot.iterations,
        max_eval=10 * slot.iterations,
        history_size=slot.history,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        total = cross_entropy(stacked + delta, wanted, reduction="sum")
        loss = (total + slot.l2 / 2 * delta.square().sum()) / len(context)
        loss.backward()
        return loss

    optimizer.step(closure)
    return delta.detach().clamp(-slot.clamp, slot.clamp)
