"""The tied head with soft-capped cross-entropy, which never writes its logits."""

import torch
import triton
import triton.language as tl

from fairway.model.fused.folding import scale_rows

ONE_WARPS_ENTRIES, ENTRIES_PER_WARP = 1024, 512
"""Of a row of scores. A warp that is alone needs no other one's sums; it keeps 32 in each lane."""

SCORES_AT_ONCE = 2**29
"""Of as many rows as hold these, 1 GiB in bfloat16, scores exist at the same time."""


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the tied head's soft-capped logits; see `cross_entropy` for the cap.

    hidden [M, C], embedding float32 [V, C], targets int64, M in all. Scores exist for some rows at
    a time, as their own gradient; so where it trains, the forward pass computes all gradients.
    """

    @staticmethod
    def forward(ctx, hidden, embedding, targets, cap, trains):
        head, targets = embedding.to(hidden.dtype), targets.flatten()
        hidden_gradient, embedding_gradient = torch.empty_like(hidden), torch.zeros_like(embedding)
        found, rows = [], max(1, SCORES_AT_ONCE // len(head))
        parts = (part.split(rows) for part in (hidden, targets, hidden_gradient))
        for some, their_targets, gradient in zip(*parts, strict=True):
            scores = some @ head.T
            found.append(cross_entropy(scores, their_targets, cap))
            if trains:
                torch.mm(scores, head, out=gradient)
                embedding_gradient += scores.T @ some
        losses, cap_gradients = zip(*found, strict=True)
        if trains:
            is_learned = isinstance(cap, torch.Tensor)
            cap_gradient = torch.cat(cap_gradients).sum(0) if is_learned else None
            ctx.save_for_backward(hidden_gradient, embedding_gradient, cap_gradient)
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx, gradient):
        hidden, embedding, cap = ctx.saved_tensors
        factor = gradient / len(hidden)
        cap = None if cap is None else cap * factor
        # A product with the scalar would round it to bfloat16 first, and take four times as long.
        factors = factor.expand(1, len(hidden)).contiguous()
        (hidden,) = scale_rows(hidden.unsqueeze(0), factors, hidden.dtype)
        return hidden, embedding * factor, None, cap, None


def cross_entropy(
    scores: torch.Tensor, targets: torch.Tensor, cap: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses float32 [M] of cap·tanh(scores / cap), and the gradients of two caps, [M, 2].

    scores [M, V] become their own gradient: that of the sum of the losses, as the caps' is, so that
    a mean is a factor for the caller. cap: a number, which has no gradient, or float32 [2], that of
    positive scores and that of the others.
    """
    losses = torch.empty(len(scores), dtype=torch.float32, device=scores.device)
    has_two = isinstance(cap, torch.Tensor)
    gradients = losses.new_empty(len(scores), 2) if has_two else None
    wide = triton.next_power_of_2(scores.shape[1])
    warps = 1 if wide <= ONE_WARPS_ENTRIES else min(32, wide // ENTRIES_PER_WARP)
    _cross_entropy[(len(scores),)](
        scores, targets, losses, gradients if has_two else losses, scores.shape[1], cap, has_two,
        wide, num_warps=warps,
    )  # fmt: skip
    return losses, gradients


@triton.jit
def _cross_entropy(
    scores_at, targets_at, losses_at, cap_gradients_at, V, cap,
    TWO_CAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    entries = tl.arange(0, WIDE)
    inside, target = entries < V, tl.load(targets_at + row)
    at = scores_at + row * V + entries
    scores = tl.load(at, inside, other=0.0).to(tl.float32)
    own = tl.load(scores_at + row * V + target).to(tl.float32)
    highest, below = cap, cap
    if TWO_CAPS:
        highest, below = tl.load(cap), tl.load(cap + 1)
    bent = _tanh(scores, highest, below)
    # Capped logits are at most the cap, so that no maximum need be taken off first.
    powers = tl.exp(_cap_of(bent, highest, below) * bent - highest)
    total = tl.sum(tl.where(inside, powers, 0.0), 0)
    own = _tanh(own, highest, below) * _cap_of(own, highest, below)
    tl.store(losses_at + row, tl.log(total) + highest - own)
    gradient = powers / total - tl.where(entries == target, 1.0, 0.0)
    slope = 1 - bent * bent
    if TWO_CAPS:
        # Read again, from the cache: kept, they would take the registers of other rows.
        scores = tl.load(at, inside, other=0.0).to(tl.float32)
        inverse = _cap_of(bent, 1 / highest, 1 / below)
        of_cap = gradient * (bent - inverse * scores * slope)
        of_above = tl.sum(tl.where(bent > 0, of_cap, 0.0), 0)
        tl.store(cap_gradients_at + 2 * row, of_above)
        tl.store(cap_gradients_at + 2 * row + 1, tl.sum(of_cap, 0) - of_above)
    tl.store(at, gradient * slope, inside)


@triton.jit
def _cap_of(x, above, below):
    return tl.where(x > 0, above, below)


@triton.jit
def _tanh(x, above, below):
    """tanh(x / cap), exact enough in float32 and safe at both ends."""
    return 1 - 2 / (tl.exp(_cap_of(x, 2 / above, 2 / below) * x) + 1)
