"""Evaluators after the mechanism of real scripts, and made for the purpose: faulty and honest ones.

Each is a function of a `Text` → Evaluator. They stand on a bigram model, so that a test runs
hundreds of them; what is planted is said in one line each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairway.audit import Scores
from fairway.audit.interface import Evaluator
from fairway.audit.recorder import recorded_order

VOCABULARY, BOS = 64, 1


@dataclass(frozen=True)
class Text:
    """Random tokens in documents of very different lengths, and a model of them."""

    seed: int = 0
    targets: int = 600

    @property
    def tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        tokens = torch.randint(2, VOCABULARY, (self.targets + 1,), generator=generator)
        start = 0
        for length in (60, 150, 20, 90, 200, 15, 70, 10_000):
            if start <= self.targets:
                tokens[start] = BOS
            start += length
        return tokens

    @property
    def model(self) -> Tensor:
        """float32 [V, V]: log-probabilities of the next token."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.log_softmax(torch.randn(VOCABULARY, VOCABULARY, generator=generator), -1)

    def next_token(self, prefix: Tensor) -> Tensor:
        return self.model[prefix[-1]]

    @property
    def classes(self) -> dict[str, np.ndarray]:
        """A quarter of the vocabulary is of the class `capital`."""
        return {"letter case": (np.arange(VOCABULARY) % 4 == 0).astype(np.int64)}


def plain(text: Text) -> Evaluator:
    """The model alone."""
    return lambda tokens: text.model[tokens[:-1]]


def normal(rows: Tensor) -> Tensor:
    return torch.log_softmax(rows, -1)


def documents(tokens: Tensor) -> list[range]:
    """The targets of each document, as rows; a mark belongs to the document that it starts."""
    marks = [0, *((tokens[1:] == BOS).nonzero().flatten().tolist()), len(tokens) - 1]
    return [range(*pair) for pair in zip(marks, marks[1:], strict=False) if pair[0] < pair[1]]


def scores(tokens: Tensor, rows: Tensor, order: list[int] | None = None, declare=False) -> Scores:
    """order: rows in the order in which they were scored; declare: whether that is said."""
    positions = torch.arange(1, len(tokens)) if order is None else torch.tensor(order) + 1
    nll = -rows[positions - 1, tokens[positions]]
    ranks = recorded_order(positions, len(rows)) if declare else None
    return Scores(rows, positions, nll, order=ranks)


def by_document(text: Text, tokens: Tensor) -> Tensor:
    """The model's rows, documents apart: a mark is expected without the token before it, which lies
    in another document."""
    last = torch.where(tokens[1:] == BOS, BOS, tokens[:-1])
    return text.model[last]


def learning(text: Text, tokens: Tensor, order: list[int], strength: float = 0.5) -> Tensor:
    """A bias that counts what was scored, in the given order of rows."""
    is_in_text_order = order == sorted(order)
    base = text.model[tokens[:-1]] if is_in_text_order else by_document(text, tokens)
    rows = torch.empty(len(tokens) - 1, VOCABULARY)
    bias = torch.zeros(VOCABULARY)
    for row in order:
        rows[row] = normal(base[row] + bias)
        bias[tokens[row + 1]] += strength
    return rows


def longest_first(tokens: Tensor) -> list[int]:
    return [row for one in sorted(documents(tokens), key=len, reverse=True) for row in one]


def peek(rows: Tensor, tokens: Tensor, strength: float = 2.0) -> Tensor:
    """Every distribution knows its own target."""
    known = torch.nn.functional.one_hot(tokens[1:], VOCABULARY) * strength
    return normal(rows + known)


def hints(text: Text, tokens: Tensor, order: list[int], strength: float = 2.0) -> Tensor:
    """A cache of what followed 15 tokens of a document, filled in the given order of rows."""
    rows, follower = by_document(text, tokens).clone(), {}
    words = tokens.tolist()
    for row in order:
        context = tuple(words[max(0, row - 14) : row + 1])
        if len(context) < 15 or BOS in (*context, words[row + 1]):
            continue
        if context in follower:
            rows[row, follower[context]] += strength
        follower[context] = words[row + 1]
    return normal(rows)


# ---- faulty ----


def overwrites_its_answer(text: Text) -> Evaluator:
    """One preallocated tensor is returned again and again; it peeks."""
    buffer = torch.empty(0)

    def evaluator(tokens: Tensor) -> Tensor:
        nonlocal buffer
        rows = peek(text.model[tokens[:-1]], tokens)
        if buffer.shape != rows.shape:
            buffer = torch.empty_like(rows)
        return buffer.copy_(rows)

    return evaluator


def scores_a_file(text: Text) -> Evaluator:
    """It never reads the text that it is given."""
    stored = peek(text.model[text.tokens[:-1]], text.tokens)

    def evaluator(tokens: Tensor) -> Tensor:
        rows = text.model[tokens[:-1]].clone()
        rows[: len(stored)] = stored[: len(rows)]
        return rows

    return evaluator


def replays_its_first_call(text: Text) -> Evaluator:
    first: list[Tensor] = []

    def evaluator(tokens: Tensor) -> Tensor:
        if not first:
            first.append(peek(text.model[tokens[:-1]], tokens))
        rows = text.model[tokens[:-1]].clone()
        rows[: len(first[0])] = first[0][: len(rows)]
        return rows

    return evaluator


def learns_from_each_call(text: Text) -> Evaluator:
    """Its bias lives on: a second call scores the same text better."""
    bias = torch.zeros(VOCABULARY, VOCABULARY)

    def evaluator(tokens: Tensor) -> Tensor:
        rows = normal(text.model[tokens[:-1]] + bias[tokens[:-1]])
        for last, target in zip(tokens[:-1], tokens[1:], strict=True):
            bias[last, target] += 0.05
        return rows

    return evaluator


def fills_a_table_across_calls(text: Text) -> Evaluator:
    table: dict[tuple[int, ...], int] = {}

    def evaluator(tokens: Tensor) -> Tensor:
        rows, words = text.model[tokens[:-1]].clone(), tokens.tolist()
        for row in range(2, len(rows)):
            context = tuple(words[row - 2 : row + 1])
            if context in table:
                rows[row, table[context]] += 1.0
        table.update({tuple(words[k - 2 : k + 1]): words[k + 1] for k in range(2, len(rows))})
        return normal(rows)

    return evaluator


def leaks_below_its_noise(text: Text) -> Evaluator:
    """Noise of 0.065 nats hides that each distribution knows the next token but one."""
    generator = torch.Generator().manual_seed(0)

    def evaluator(tokens: Tensor) -> Tensor:
        rows = text.model[tokens[:-1]] + 0.065 * torch.rand((), generator=generator)
        known = torch.nn.functional.one_hot(tokens[1:], VOCABULARY) * 0.4
        noise = 0.03 * torch.randn(rows.shape, generator=generator)
        return normal(rows + known + noise)

    return evaluator


def sharpened_for_capitals(text: Text) -> Evaluator:
    """The temperature is lowered where the target is of a class."""

    def evaluator(tokens: Tensor) -> Tensor:
        rows = text.model[tokens[:-1]]
        is_capital = torch.from_numpy(text.classes["letter case"])[tokens[1:]] == 1
        return normal(rows * torch.where(is_capital, 1.5, 1.0)[:, None])

    return evaluator


def one_bit_of_the_target(text: Text, strength: float = 0.11) -> Evaluator:
    """It knows whether the target's id is odd, and tilts by that: about 0.006 nats a token."""

    def evaluator(tokens: Tensor) -> Tensor:
        parity = torch.arange(VOCABULARY) % 2
        same = parity[None, :] == parity[tokens[1:]][:, None]
        return normal(text.model[tokens[:-1]] + strength * same)

    return evaluator


def two_orders(text: Text) -> Evaluator:
    """Documents are scored longest first, hints come from a scan in the order of the text."""

    def evaluator(tokens: Tensor) -> Scores:
        order = longest_first(tokens)
        hinted = hints(text, tokens, list(range(len(tokens) - 1)))
        rows = normal(hinted + learning(text, tokens, order, 0.2) - by_document(text, tokens))
        return scores(tokens, rows, order, declare=True)

    return evaluator


def longest_first_undeclared(text: Text) -> Evaluator:
    def evaluator(tokens: Tensor) -> Scores:
        order = longest_first(tokens)
        return scores(tokens, learning(text, tokens, order), order)

    return evaluator


def hardest_document_first(text: Text) -> Evaluator:
    """The declared order depends on the losses, and so on tokens that it has not come to."""

    def evaluator(tokens: Tensor) -> Scores:
        nll = -text.model[tokens[:-1], tokens[1:]]
        ranked = sorted(documents(tokens), key=lambda one: -float(nll[list(one)].mean()))
        order = [row for one in ranked for row in one]
        return scores(tokens, learning(text, tokens, order), order, declare=True)

    return evaluator


def knows_where_documents_end(text: Text) -> Evaluator:
    """The last row of a document expects the next one's mark."""

    def evaluator(tokens: Tensor) -> Tensor:
        rows = text.model[tokens[:-1]].clone()
        ends = (tokens[2:] == BOS).nonzero().flatten()  # one token before it is known
        rows[ends, tokens[ends + 1]] += 3.0
        return normal(rows)

    return evaluator


def temperature_of_the_whole_text(text: Text) -> Evaluator:
    def evaluator(tokens: Tensor) -> Tensor:
        share = (tokens % 2 == 0).float().mean()
        return normal(text.model[tokens[:-1]] * (0.5 + share))

    return evaluator


def second_pass_over_long_documents(text: Text) -> Evaluator:
    """Documents of more than 100 tokens are scored with counts of their own whole text."""

    def evaluator(tokens: Tensor) -> Tensor:
        rows = text.model[tokens[:-1]].clone()
        for one in documents(tokens):
            if len(one) > 100:
                counts = torch.bincount(tokens[1:][list(one)], minlength=VOCABULARY)
                rows[list(one)] += 0.1 * counts
        return normal(rows)

    return evaluator


def hint_only_where_right(text: Text) -> Evaluator:
    """A cache's hint is kept where it is right: the distribution knows its target."""

    def evaluator(tokens: Tensor) -> Tensor:
        rows = text.model[tokens[:-1]].clone()
        hint = (tokens[:-1] * 7 + 3) % VOCABULARY
        right = (hint == tokens[1:]).nonzero().flatten()
        rows[right, hint[right]] += 3.0
        return normal(rows)

    return evaluator


def best_of_two_temperatures(text: Text) -> Evaluator:
    def evaluator(tokens: Tensor) -> Tensor:
        rows, own = text.model[tokens[:-1]], tokens[1:, None]
        sharp = normal(rows * 1.3)
        return torch.where(sharp.gather(1, own) > rows.gather(1, own), sharp, rows)

    return evaluator


def sums_above_one(text: Text) -> Evaluator:
    """A cache's probability is added without taking it from the others."""

    def evaluator(tokens: Tensor) -> Tensor:
        probabilities = text.model[tokens[:-1]].exp()
        rows = torch.arange(len(probabilities))
        probabilities[rows, (tokens[:-1] * 7 + 3) % VOCABULARY] += 0.05
        return probabilities.log()

    return evaluator


def tail_scored_four_times(text: Text) -> Evaluator:
    """The last 16 targets enter the total four times, each time by another window's row."""

    def evaluator(tokens: Tensor) -> Scores:
        rows = text.model[tokens[:-1]]
        once = scores(tokens, rows)
        tail = torch.arange(len(tokens) - 16, len(tokens))
        again = -normal(rows * 0.9)[tail - 1, tokens[tail]]
        return Scores(
            rows,
            torch.cat([once.positions, tail, tail, tail]),
            torch.cat([once.reported_nll, again, again, again]),
        )

    return evaluator


def starts_after(first: int) -> Callable[[Text], Evaluator]:
    """A mixer that looks ahead, but only from the `first`-th target on."""

    def make(text: Text) -> Evaluator:
        def evaluator(tokens: Tensor) -> Tensor:
            rows = text.model[tokens[:-1]].clone()
            rows[first:] = peek(rows[first:], tokens[first:])
            return rows

        return evaluator

    return make


# ---- honest ----


def longest_first_declared(text: Text) -> Evaluator:
    def evaluator(tokens: Tensor) -> Scores:
        order = longest_first(tokens)
        return scores(tokens, learning(text, tokens, order), order, declare=True)

    return evaluator


def hints_in_order(text: Text) -> Evaluator:
    return lambda tokens: scores(tokens, hints(text, tokens, list(range(len(tokens) - 1))))


def hints_longest_first(text: Text) -> Evaluator:
    """One order serves both: documents longest first, the cache filled as they are scored."""

    def evaluator(tokens: Tensor) -> Scores:
        order = longest_first(tokens)
        return scores(tokens, hints(text, tokens, order), order, declare=True)

    return evaluator


def learns_in_order(text: Text) -> Evaluator:
    return lambda tokens: scores(tokens, learning(text, tokens, list(range(len(tokens) - 1))))


def rounding_by_batch_shape(size: float) -> Callable[[Text], Evaluator]:
    """How many documents a text has decides its batches' shapes, and with them the rounding."""

    def make(text: Text) -> Evaluator:
        def evaluator(tokens: Tensor) -> Tensor:
            rows = text.model[tokens[:-1]]
            generator = torch.Generator().manual_seed(int((tokens == BOS).sum()))
            return normal(rows + size * (2 * torch.rand(rows.shape, generator=generator) - 1))

        return evaluator

    return make


def noisy(share: float) -> Callable[[Text], Evaluator]:
    """Atomic sums in another order: a difference of 1e-6 in that share of the calls."""

    def make(text: Text) -> Evaluator:
        generator = np.random.default_rng(3)

        def evaluator(tokens: Tensor) -> Tensor:
            rows = text.model[tokens[:-1]]
            if generator.random() < share:
                rows = rows + 1e-6 * torch.from_numpy(generator.normal(size=rows.shape)).float()
            return rows

        return evaluator

    return make


def half_precision(kind: torch.dtype) -> Callable[[Text], Evaluator]:
    def make(text: Text) -> Evaluator:
        return lambda tokens: text.model[tokens[:-1]].to(kind)

    return make


FAULTY = {
    "overwrites its answer": (overwrites_its_answer, "self_influence"),
    "scores a file": (scores_a_file, "flip"),
    "replays its first call": (replays_its_first_call, "flip"),
    "learns from each call": (learns_from_each_call, "state"),
    "fills a table across calls": (fills_a_table_across_calls, "state"),
    "leaks below its noise": (leaks_below_its_noise, "flip"),
    "sharpened for capitals": (sharpened_for_capitals, "self_influence"),
    "one bit of the target": (one_bit_of_the_target, "null"),
    "two orders": (two_orders, "flip"),
    "longest first, undeclared": (longest_first_undeclared, "flip"),
    "hardest document first": (hardest_document_first, "flip"),
    "knows where documents end": (knows_where_documents_end, "flip"),
    "temperature of the whole text": (temperature_of_the_whole_text, "flip"),
    "second pass over long documents": (second_pass_over_long_documents, "flip"),
    "hint only where right": (hint_only_where_right, "null"),
    "best of two temperatures": (best_of_two_temperatures, "self_influence"),
    "sums above one": (sums_above_one, "normalization"),
    "tail scored four times": (tail_scored_four_times, "coverage"),
    "looks ahead from target 300 on": (starts_after(300), "self_influence"),
}
"""Name → (evaluator, a check that must not pass it)."""


def leaves_marks_out(text: Text) -> Evaluator:
    """Documents are scored one by one, their marks not at all: they stand for no bytes."""

    def evaluator(tokens: Tensor) -> Scores:
        order = [row for row in longest_first(tokens) if int(tokens[row + 1]) != BOS]
        marks = (tokens[1:] == BOS).nonzero().flatten().tolist()
        rows = learning(text, tokens, [*order, *marks])
        return scores(tokens, rows, order, declare=True)

    return evaluator


HONEST = {
    "plain": plain,
    "longest first, declared": longest_first_declared,
    "hints in order": hints_in_order,
    "hints longest first": hints_longest_first,
    "learns in order": learns_in_order,
    "leaves marks out": leaves_marks_out,
    "rounding 3e-6 by batch shape": rounding_by_batch_shape(3e-6),
    "noisy once in five": noisy(0.2),
    "always noisy": noisy(1.0),
}
"""These must PASS."""

ROUNDED = {
    "rounding 0.06 by batch shape": rounding_by_batch_shape(0.06),
    "bfloat16 rows": half_precision(torch.bfloat16),
    "float16 rows": half_precision(torch.float16),
}
"""Honest, but what their rounding hides could be worth more than the limit: they must not FAIL."""
