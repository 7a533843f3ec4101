"""The n-gram cache: the mixture that it says it is, out of nothing but the document so far."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators import (
    BOS,
    SMALL,
    VOCABULARY,
    adapter_settings,
    audited,
    changed,
    collect,
    random_model,
    reaches_of_flips,
    score_columns,
    toy_text,
)
from fairway.errors import UserError

ALONE = changed(SMALL, adapters=("ngram",))
CACHES = adapter_settings(ALONE, "ngram").caches
OF_DOCUMENTS = changed(ALONE, caches=CACHES[1:])
ALL = changed(SMALL, adapters=("lora", "slot", "ngram"), iterations=3)


@pytest.fixture(scope="module")
def model():
    return random_model(VOCABULARY)


def mixture(p: np.ndarray, past: list[int], ngram) -> np.ndarray:
    """What a cache makes of p float64 [V], with `past` the tokens that it may know."""
    for order in ngram.orders:
        context = past[len(past) - order :]
        ends = [end for end in range(order, len(past)) if past[end - order : end] == context]
        ends = ends[-ngram.recent_occurrences :]
        if len(context) < order or not ends:
            continue
        number, counts = len(ends), Counter()
        for end in ends:
            counts[past[end]] += (len(past) - end) ** -ngram.distance_power
        odds = (
            ngram.bias + ngram.order_weight * order + ngram.count_weight * math.log(number)
            - ngram.variety_weight * math.log(len(counts))
        )  # fmt: skip
        weight = 1 / (1 + math.exp(-odds))
        p = (1 - weight) * p
        for token, count in counts.items():
            p[token] += weight * count / counts.total()
    return p


@given(st.integers(0, 10**6), st.integers(2, 6), st.sampled_from([10, 40, 400]))
@settings(max_examples=25, deadline=None)
def test_the_scores_are_those_of_the_mixture(seed, words, document_tokens):
    generator = torch.Generator().manual_seed(seed)
    tokens = toy_text(150, seed, document_tokens=document_tokens)
    tokens = torch.where(
        tokens == BOS, BOS, torch.randint(1, 1 + words, (150,), generator=generator)
    )
    columns = collect(tokens, ALONE, random_model(VOCABULARY))
    before = columns["logits_before"].double().softmax(1).numpy()
    after = columns["logits_after"].double().exp().numpy()
    text, begin = tokens.tolist(), 0
    for position, token in enumerate(text[:-1]):
        begin = position if token == BOS else begin
        expected = before[position].copy()
        for cache in CACHES:
            first = begin if cache.reach == "document" else 0
            expected = mixture(expected, text[first : position + 1], cache)
        np.testing.assert_allclose(after[position], expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(after.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("settings_", [ALONE, ALL], ids=["alone", "after lora and slot"])
def test_no_distribution_depends_on_its_target_or_on_what_follows(model, settings_):
    evaluate = audited(model, settings_)
    tokens = toy_text(150, document_tokens=25)
    assert not reaches_of_flips(evaluate, tokens, 6, BOS, VOCABULARY)


def test_lanes_and_ranks_do_not_matter(model):
    tokens = toy_text(200)
    alone = collect(tokens, ALONE, model)
    parts = [collect(tokens, ALONE, model, rank=rank, world_size=2) for rank in range(2)]
    for name, column in alone.items():
        merged = torch.cat([part[name] for part in parts])
        assert torch.equal(merged[torch.cat([p["positions"] for p in parts]).argsort()], column)
    one = collect(tokens, changed(ALONE, lanes=1, forward_windows=1), model)
    torch.testing.assert_close(one["logits_after"], alone["logits_after"], rtol=0, atol=1e-4)


def test_what_repeats_in_a_document_is_expected_and_in_another_is_not(model):
    phrase = torch.arange(BOS + 1, BOS + 21)
    bos = torch.tensor([BOS])
    repeated, apart = torch.cat((bos, phrase, phrase)), torch.cat((bos, phrase, bos, phrase))
    gain = {}
    for name, tokens, settings_ in (
        ("repeated", repeated, OF_DOCUMENTS),
        ("apart", apart, OF_DOCUMENTS),
        ("apart, all searched", apart, ALONE),
    ):
        gain[name] = score_columns(model, tokens, settings_)["gain_ngram"]
    assert gain["repeated"][25:].min() > 0.5
    assert np.abs(gain["apart"]).max() < 1e-5
    assert gain["apart, all searched"][25:].min() > 0.2


def test_a_text_may_be_shorter_than_the_contexts(model):
    tokens, settings_ = toy_text(11), changed(ALONE, caches=[{}])
    columns = collect(tokens, settings_, model)
    assert torch.equal(columns["positions"].sort().values, torch.arange(1, 11))
    assert columns["logits_after"].isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        {"reach": "lane"}, {"orders": ()}, {"orders": (2, 2)}, {"orders": (0,)},
        {"recent_occurrences": 0},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(change):
    key = next(iter(change))
    with pytest.raises(UserError, match=rf"evaluation\.adapters\.ngram\.caches.*{key}"):
        changed(ALONE, caches=[{**dict(CACHES[0]), **change}])
