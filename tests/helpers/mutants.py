"""A toy model with the real window geometry, honest evaluators over it, and planted faults.

Every evaluator here is small enough to read at once. The honest ones adapt in the ways that the
real ones do: a delta for each window fitted by lanes, ranks that share the lanes, test-time
training after scoring, counts of past tokens. Each mutant differs from an honest one by one fault.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fairway.audit.flip_plan import Geometry
from fairway.audit.interface import Evaluator, Scores

FIT_STEPS = 4


def context_start(geometry: Geometry, target: int) -> int:
    """First token that the window which scores `target` reads."""
    beyond = max(0, target - geometry.window_tokens)
    return -(-beyond // geometry.stride_tokens) * geometry.stride_tokens


@cache
def weights(seed: int, vocab_size: int) -> Tensor:
    """Random float32 [3, V, V]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, vocab_size, vocab_size, generator=generator)


@dataclass(frozen=True)
class Toy:
    """A causal model with random weights, and how a text is evaluated with it."""

    seed: int = 0
    vocab_size: int = 24
    bos_id: int = 1
    window_tokens: int = 32
    stride_tokens: int = 8
    lanes: int = 3
    batch_windows: int = 4
    focal_tokens: int = 16
    l2: float = 2.0
    same_document: bool = False
    strength: float = 1.0
    """Scales what the evaluators without a delta do beyond the model, honest or not."""

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.window_tokens, self.stride_tokens, self.lanes, self.batch_windows)

    def logits(self, inputs: Tensor, first_position: int = 0) -> Tensor:
        """int64 [rows, T] → float32 [rows, T − first_position, V], from the last token and the mean
        of all so far."""
        bigram, embedding, output = weights(self.seed, self.vocab_size)
        counts = torch.arange(1, inputs.shape[1] + 1)[None, :, None]
        logits = 0.5 * (bigram[inputs] + (embedding[inputs].cumsum(1) / counts) @ output)
        return logits[:, first_position:]

    def next_token(self, prefix: Tensor) -> Tensor:
        start = context_start(self.geometry, len(prefix))
        return torch.log_softmax(self.logits(prefix[None, start:])[0, -1], -1)

    def stream(self, num_targets: int) -> Tensor:
        """Random tokens with a document start about every 20."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        tokens = torch.randint(2, self.vocab_size, (num_targets + 1,), generator=generator)
        starts = torch.rand(num_targets + 1, generator=generator) < 0.05
        tokens[starts] = self.bos_id
        tokens[0] = self.bos_id
        return tokens


@dataclass(frozen=True)
class Windows:
    """inputs, targets: int64 [windows, T]; first: each one's first scored target; logits."""

    starts: list[int]
    first: list[int]
    inputs: Tensor
    targets: Tensor
    logits: Tensor


def cut(toy: Toy, tokens: Tensor) -> Windows:
    """All windows of a text; the last is moved back to end where the text ends."""
    num_targets = len(tokens) - 1
    length = min(toy.window_tokens, num_targets)
    slices = toy.geometry.slices(num_targets)
    starts = [stop - length for _, stop in slices]
    inputs = torch.stack([tokens[start : start + length] for start in starts])
    targets = torch.stack([tokens[start + 1 : start + length + 1] for start in starts])
    return Windows(starts, [first for first, _ in slices], inputs, targets, toy.logits(inputs))


def fit_mask(toy: Toy, tokens: Tensor, windows: Windows, *, shift: int = 0) -> Tensor:
    """bool [windows, T]: the targets that each delta may be fitted on. shift: targets too many."""
    mask = torch.zeros(windows.targets.shape, dtype=torch.bool)
    for row, (start, first) in enumerate(zip(windows.starts, windows.first, strict=True)):
        lowest = max(start + 1, first - toy.focal_tokens)
        if toy.same_document:
            marks = (tokens[:first] == toy.bos_id).nonzero().flatten()
            lowest = max(lowest, int(marks[-1]) + 1) if len(marks) else lowest
        mask[row, lowest - start - 1 : max(first + shift - start - 1, 0)] = True
    return mask


def fit_deltas(
    toy: Toy,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    start: Tensor,
    *,
    shared_step: bool = False,
    shared_history: bool = False,
) -> Tensor:
    """Fit a delta [rows, V] to each row by gradient steps of Barzilai-Borwein length with a line
    search. The faults: one step length, or one history, for all rows."""
    counted = mask.float()[..., None]
    counts = torch.zeros_like(start).scatter_add_(1, targets, mask.float())

    def loss_of(delta: Tensor, normalizer: Tensor) -> Tensor:
        fit = (normalizer * mask).sum(1) - (counts * delta).sum(1)
        return fit + toy.l2 / 2 * (delta * delta).sum(1)

    def loss(delta: Tensor) -> Tensor:
        return loss_of(delta, torch.logsumexp(logits + delta[:, None], -1))

    def loss_and_gradient(delta: Tensor) -> tuple[Tensor, Tensor]:
        shifted = logits + delta[:, None]
        normalizer = torch.logsumexp(shifted, -1)
        expected = (torch.exp(shifted - normalizer[..., None]) * counted).sum(1)
        return loss_of(delta, normalizer), expected - counts + toy.l2 * delta

    delta, (height, slope) = start, loss_and_gradient(start)
    length = 1.0 / (mask.sum(1, keepdim=True) + toy.l2)
    for _ in range(FIT_STEPS):
        trial = -length * slope
        descent = (slope * trial).sum(1)
        rise = loss(delta + trial) - height - descent
        if shared_step:
            descent, rise = descent.sum().expand_as(descent), rise.sum().expand_as(rise)
        # The minimum of the parabola through both losses and the first slope.
        fraction = torch.where(rise > 0, -descent / (2 * rise).clamp(min=1e-12), 1.0)
        step = fraction.clamp(0.1, 1.0)[:, None] * trial
        height, new_slope = loss_and_gradient(delta + step)
        squares = (step * step).sum(1, keepdim=True)
        curvature = (step * (new_slope - slope)).sum(1, keepdim=True)
        if shared_history:
            squares, curvature = (
                squares.sum(0).expand_as(squares),
                curvature.sum(0).expand_as(squares),
            )
        length = torch.where(curvature > 0, squares / curvature.clamp(min=1e-12), 0.0)
        delta, slope = delta + step, new_slope
    return delta


def lane_steps(num_windows: int, lanes: int) -> list[list[int]]:
    """Which windows run together: the k-th window of every lane that has one."""
    lanes = min(lanes, num_windows)
    edges = [num_windows * lane // lanes for lane in range(lanes + 1)]
    longest = max(stop - start for start, stop in zip(edges, edges[1:], strict=False))
    return [
        [edges[lane] + k for lane in range(lanes) if edges[lane] + k < edges[lane + 1]]
        for k in range(longest)
    ]


def lane_of(window: int, num_windows: int, lanes: int) -> int:
    lanes = min(lanes, num_windows)
    return max(lane for lane in range(lanes) if num_windows * lane // lanes <= window)


def deltas_by_lane(toy: Toy, windows: Windows, mask: Tensor, **faults: bool) -> Tensor:
    """[windows, V]: each lane warm-starts from its own last window only."""
    count = len(windows.starts)
    deltas = torch.zeros(count, toy.vocab_size)
    for rows in lane_steps(count, toy.lanes):
        before = [
            deltas[row - 1]
            if row and lane_of(row, count, toy.lanes) == lane_of(row - 1, count, toy.lanes)
            else torch.zeros(toy.vocab_size)
            for row in rows
        ]
        deltas[rows] = fit_deltas(
            toy,
            windows.logits[rows],
            windows.targets[rows],
            mask[rows],
            torch.stack(before),
            **faults,
        )
    return deltas


def scored_rows(windows: Windows, deltas: Tensor) -> Tensor:
    """float32 [n, V]: the distributions of every window's scored slice, in order."""
    log_probs = torch.log_softmax(windows.logits + deltas[:, None], -1)
    length = windows.inputs.shape[1]
    return torch.cat(
        [
            log_probs[row, first - start - 1 : length]
            for row, (start, first) in enumerate(zip(windows.starts, windows.first, strict=True))
        ]
    )


def with_scores(tokens: Tensor, log_probs: Tensor, order: Tensor | None = None) -> Scores:
    """Scores that report what they show, each target once; order: targets as they were scored."""
    positions = torch.arange(1, len(tokens)) if order is None else order
    reported = -log_probs[positions - 1, tokens[positions]]
    return Scores(log_probs, positions, reported)


# ---- honest evaluators ----


def plain(toy: Toy) -> Evaluator:
    def evaluator(tokens: Tensor) -> Tensor:
        windows = cut(toy, tokens)
        return scored_rows(windows, torch.zeros(len(windows.starts), toy.vocab_size))

    return evaluator


def slot(toy: Toy, *, shift: int = 0, **faults: bool) -> Evaluator:
    """A delta a window, fitted on its context, lanes side by side."""

    def evaluator(tokens: Tensor) -> Scores:
        windows = cut(toy, tokens)
        mask = fit_mask(toy, tokens, windows, shift=shift)
        return with_scores(
            tokens, scored_rows(windows, deltas_by_lane(toy, windows, mask, **faults))
        )

    return evaluator


def two_ranks(toy: Toy, *, averaged: bool = False) -> Evaluator:
    """Two processes fit every other window, without warm start. The fault: deltas are averaged."""

    def evaluator(tokens: Tensor) -> Scores:
        windows = cut(toy, tokens)
        mask = fit_mask(toy, tokens, windows)
        deltas = torch.zeros(len(windows.starts), toy.vocab_size)
        for rank in range(2):
            rows = list(range(rank, len(deltas), 2))
            if rows:
                zeros = torch.zeros(len(rows), toy.vocab_size)
                deltas[rows] = fit_deltas(
                    toy, windows.logits[rows], windows.targets[rows], mask[rows], zeros
                )
        if averaged:
            deltas = deltas.mean(0).expand_as(deltas)
        return with_scores(tokens, scored_rows(windows, deltas))

    return evaluator


def training_by_chunk(toy: Toy, *, update_first: bool = False) -> Evaluator:
    """A bias trained on each chunk after it was scored. The fault: before it is scored."""

    def evaluator(tokens: Tensor) -> Scores:
        windows = cut(toy, tokens)
        base = scored_rows(windows, torch.zeros(len(windows.starts), toy.vocab_size))
        bias, rows = torch.zeros(toy.vocab_size), []
        for start in range(0, len(base), toy.stride_tokens):
            chunk, targets = base[start : start + toy.stride_tokens], tokens[1:][start:]
            seen = torch.bincount(targets[: len(chunk)], minlength=toy.vocab_size)
            step = 0.1 * toy.strength * (seen - torch.softmax(chunk + bias, -1).sum(0))
            bias, scored_with = bias + step, bias + step if update_first else bias
            rows.append(torch.log_softmax(chunk + scored_with, -1))
        return with_scores(tokens, torch.cat(rows))

    return evaluator


def counting(toy: Toy, *, whole_text: bool = False) -> Evaluator:
    """The model mixed with bigram counts of the past. The fault: counts of the whole text."""

    def evaluator(tokens: Tensor) -> Scores:
        probabilities = plain(toy)(tokens).exp()
        table = torch.zeros(toy.vocab_size, toy.vocab_size)
        if whole_text:
            table.index_put_((tokens[:-1], tokens[1:]), torch.tensor(1.0), accumulate=True)
        rows = []
        for row, (last, target) in enumerate(zip(tokens[:-1], tokens[1:], strict=True)):
            counts = table[last] + 0.1
            mixed = torch.lerp(probabilities[row], counts / counts.sum(), 0.3 * toy.strength)
            rows.append(torch.log(mixed))
            if not whole_text:
                table[last, target] += 1.0
        return with_scores(tokens, torch.stack(rows))

    return evaluator


HONEST: dict[str, Callable[[Toy], Evaluator]] = {
    "plain": plain,
    "slot": slot,
    "two_ranks": two_ranks,
    "training_by_chunk": training_by_chunk,
    "counting": counting,
}


# ---- one planted fault each ----


def delta_shared_by_batch(toy: Toy) -> Evaluator:
    """PR #1350's code: one delta for a batch of consecutive, overlapping windows."""

    def evaluator(tokens: Tensor) -> Scores:
        windows = cut(toy, tokens)
        mask = fit_mask(toy, tokens, windows)
        deltas = torch.zeros(len(windows.starts), toy.vocab_size)
        warm = torch.zeros(1, toy.vocab_size)
        for start in range(0, len(deltas), toy.batch_windows):
            rows = slice(start, start + toy.batch_windows)
            warm = fit_deltas(
                toy,
                windows.logits[rows].flatten(0, 1)[None],
                windows.targets[rows].flatten()[None],
                mask[rows].flatten()[None],
                warm,
            )
            deltas[rows] = warm
        return with_scores(tokens, scored_rows(windows, deltas))

    return evaluator


def warm_start_from_later_window(toy: Toy) -> Evaluator:
    """Each window starts from the delta of the window after it."""

    def evaluator(tokens: Tensor) -> Scores:
        windows = cut(toy, tokens)
        mask = fit_mask(toy, tokens, windows)
        first_fit = deltas_by_lane(toy, windows, mask)
        later = torch.cat([first_fit[1:], first_fit[-1:]])
        deltas = fit_deltas(toy, windows.logits, windows.targets, mask, later)
        return with_scores(tokens, scored_rows(windows, deltas))

    return evaluator


def lane_starts_from_next_lane(toy: Toy) -> Evaluator:
    """Only the first window of each lane leaks: it is scored with the next lane's first delta."""

    def evaluator(tokens: Tensor) -> Scores:
        windows = cut(toy, tokens)
        deltas = deltas_by_lane(toy, windows, fit_mask(toy, tokens, windows))
        firsts = lane_steps(len(deltas), toy.lanes)[0]
        for lane_first, next_first in zip(firsts, firsts[1:], strict=False):
            deltas[lane_first] = deltas[next_first]
        return with_scores(tokens, scored_rows(windows, deltas))

    return evaluator


def fitted_on_scored_slice(toy: Toy) -> Evaluator:
    def evaluator(tokens: Tensor) -> Scores:
        windows = cut(toy, tokens)
        mask = torch.ones(windows.targets.shape, dtype=torch.bool)
        return with_scores(tokens, scored_rows(windows, deltas_by_lane(toy, windows, mask)))

    return evaluator


def trained_before_scoring(toy: Toy) -> Evaluator:
    """Test-time training of a bias for each last token on the whole text, then an evaluation."""

    def evaluator(tokens: Tensor) -> Scores:
        log_probs, last = plain(toy)(tokens), tokens[:-1]
        bias = torch.zeros(toy.vocab_size, toy.vocab_size)
        seen = torch.nn.functional.one_hot(tokens[1:], toy.vocab_size).float()
        for _ in range(6):
            excess = seen - torch.softmax(log_probs + bias[last], -1)
            bias = bias.index_add(0, last, 0.3 * toy.strength * excess)
        return with_scores(tokens, torch.log_softmax(log_probs + bias[last], -1))

    return evaluator


def normalized_over_truncated_vocabulary(toy: Toy) -> Evaluator:
    """The softmax's sum runs over the likelier half of the vocabulary only."""

    def evaluator(tokens: Tensor) -> Scores:
        log_probs = plain(toy)(tokens)
        kept = log_probs.topk(toy.vocab_size // 2, dim=-1).values
        return with_scores(tokens, log_probs - torch.logsumexp(kept, -1, keepdim=True))

    return evaluator


def narrow_vocabulary(toy: Toy) -> Evaluator:
    def evaluator(tokens: Tensor) -> Tensor:
        return torch.log_softmax(plain(toy)(tokens)[:, :-4], -1)

    return evaluator


def better_of_two_scores(toy: Toy, *, openly: bool) -> Evaluator:
    """Each target is scored plainly and adaptively, and the better score is kept."""

    def evaluator(tokens: Tensor) -> Scores:
        first, second = plain(toy)(tokens), slot(toy)(tokens).log_probs
        own = tokens[1:, None]
        better = first.gather(1, own) > second.gather(1, own)
        if not openly:
            return with_scores(tokens, torch.where(better, first, second))
        twice = torch.arange(1, len(tokens)).repeat_interleave(2)
        return with_scores(tokens, second, order=twice)

    return evaluator


def hardest_token_left_out(toy: Toy) -> Evaluator:
    def evaluator(tokens: Tensor) -> Scores:
        scores = slot(toy)(tokens)
        kept = torch.ones(len(tokens) - 1, dtype=torch.bool)
        kept[scores.reported_nll.argmax()] = False
        return Scores(scores.log_probs, scores.positions[kept], scores.reported_nll[kept])

    return evaluator


def row_left_out(toy: Toy) -> Evaluator:
    return lambda tokens: plain(toy)(tokens)[:-1]


def document_statistics_of_whole_text(toy: Toy) -> Evaluator:
    """The odds of a document start are set from how many the text holds."""

    def evaluator(tokens: Tensor) -> Scores:
        log_probs = plain(toy)(tokens).clone()
        log_probs[:, toy.bos_id] += 0.1 * toy.strength * (tokens == toy.bos_id).sum()
        return with_scores(tokens, torch.log_softmax(log_probs, -1))

    return evaluator


def documents_sorted_by_length(toy: Toy) -> Evaluator:
    """Documents are scored shortest first, with counts that are carried along."""

    def evaluator(tokens: Tensor) -> Scores:
        log_probs = plain(toy)(tokens)
        marks = [0, *(tokens[1:] == toy.bos_id).nonzero().flatten().tolist(), len(tokens) - 1]
        documents = [range(*pair) for pair in zip(marks, marks[1:], strict=False)]
        order = [row for document in sorted(documents, key=len) for row in document]
        bias = torch.zeros(toy.vocab_size)
        rows = torch.empty_like(log_probs)
        for row in order:
            rows[row] = torch.log_softmax(log_probs[row] + bias, -1)
            bias[tokens[row + 1]] += 0.1 * toy.strength
        return with_scores(tokens, rows, order=torch.tensor(order) + 1)

    return evaluator


def understated_scores(toy: Toy) -> Evaluator:
    def evaluator(tokens: Tensor) -> Scores:
        scores = slot(toy)(tokens)
        return Scores(scores.log_probs, scores.positions, 0.99 * scores.reported_nll)

    return evaluator


def sharpened_where_right(toy: Toy) -> Evaluator:
    """The temperature of a row is lowered where the model's first guess is right."""

    def evaluator(tokens: Tensor) -> Scores:
        log_probs = plain(toy)(tokens)
        right = log_probs.argmax(-1) == tokens[1:]
        factor = 1 + toy.strength * torch.where(right, 0.5, -0.1)[:, None]
        return with_scores(tokens, torch.log_softmax(log_probs * factor, -1))

    return evaluator


def not_reproducible(toy: Toy) -> Evaluator:
    def evaluator(tokens: Tensor) -> Tensor:
        return torch.log_softmax(plain(toy)(tokens) + torch.randn(1), -1).roll(
            int(torch.randint(1, 5, ())), -1
        )

    return evaluator


@dataclass(frozen=True)
class Mutant:
    """An evaluator with one fault and the checks that must fail it (others may as well)."""

    make: Callable[[Toy], Evaluator]
    caught_by: tuple[str, ...]


MUTANTS: dict[str, Mutant] = {
    "delta shared over a batch": Mutant(delta_shared_by_batch, ("flip", "self_influence", "null")),
    "line-search step length shared": Mutant(lambda toy: slot(toy, shared_step=True), ("flip",)),
    "L-BFGS history shared": Mutant(lambda toy: slot(toy, shared_history=True), ("flip",)),
    "deltas averaged over ranks": Mutant(lambda toy: two_ranks(toy, averaged=True), ("flip",)),
    "warm start from a later window": Mutant(warm_start_from_later_window, ("flip",)),
    "lane starts from the next lane": Mutant(lane_starts_from_next_lane, ("flip",)),
    "focal window off by one": Mutant(lambda toy: slot(toy, shift=1), ("self_influence",)),
    "focal window off by two": Mutant(lambda toy: slot(toy, shift=2), ("flip", "self_influence")),
    "delta fitted on the scored slice": Mutant(
        fitted_on_scored_slice, ("flip", "self_influence", "null")
    ),
    "test-time training before scoring": Mutant(
        trained_before_scoring, ("flip", "self_influence", "null")
    ),
    "chunk scored after updating on it": Mutant(
        lambda toy: training_by_chunk(toy, update_first=True), ("flip", "self_influence", "null")
    ),
    "bigram table filled from validation": Mutant(
        lambda toy: counting(toy, whole_text=True), ("flip", "self_influence", "null")
    ),
    "normalization over a truncated vocabulary": Mutant(
        normalized_over_truncated_vocabulary, ("normalization",)
    ),
    "vocabulary too narrow": Mutant(narrow_vocabulary, ("normalization",)),
    "a token scored twice, better score kept": Mutant(
        lambda toy: better_of_two_scores(toy, openly=False), ("self_influence",)
    ),
    "a token scored twice, openly": Mutant(
        lambda toy: better_of_two_scores(toy, openly=True), ("coverage",)
    ),
    "a token never scored": Mutant(hardest_token_left_out, ("coverage",)),
    "last row missing": Mutant(row_left_out, ("coverage",)),
    "document statistics over the whole text": Mutant(document_statistics_of_whole_text, ("flip",)),
    "batch order sorted by document length": Mutant(
        documents_sorted_by_length, ("flip", "coverage")
    ),
    "reported scores understated": Mutant(understated_scores, ("reported_score",)),
    "sharpened where the guess is right": Mutant(sharpened_where_right, ("self_influence",)),
    "not reproducible": Mutant(not_reproducible, ("flip",)),
}
