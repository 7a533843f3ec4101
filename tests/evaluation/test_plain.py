"""The plain score of a split: every target once, however many processes share it."""

import math

import numpy as np
import pytest

from fairway.data.dataset import load_dataset, read_split
from fairway.distributed import World
from fairway.evaluation import plain
from fairway.evaluation.plain import evaluate_split
from fairway.model.gpt import GPT
from fairway.model.losses import losses_by_pass, target_losses
from fairway.model.spec import GPTConfig


@pytest.fixture(scope="module")
def model(tiny_dataset) -> GPT:
    dataset = load_dataset(tiny_dataset)
    return GPT(
        GPTConfig(
            layers=2, width=16, heads=2, kv_heads=1, mlp_width=32, rotary_dimensions=4,
            bigram_buckets=32, bigram_width=8, value_layers=(1,), value_width=8,
            vocab_size=dataset.vocab_size, sequence_tokens=16, bos_id=dataset.bos_id,
        ),
        seed=3,
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 3, 50])
def test_ranks_share_the_passes(model, ranks):
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 200)
    parts = [
        list(losses_by_pass(model, tokens, batch_tokens=32, rank=rank, world_size=ranks))
        for rank in range(ranks)
    ]
    whole = np.concatenate(list(losses_by_pass(model, tokens, batch_tokens=32)))
    together = np.concatenate([losses for own in parts for losses in own])
    assert np.array_equal(np.sort(together), np.sort(whole)) and len(whole) == 199


def test_the_score_is_the_same_for_any_number_of_processes(model, tiny_dataset, monkeypatch):
    dataset = load_dataset(tiny_dataset)
    monkeypatch.setattr(
        plain, "losses_by_pass", lambda *given, **options: losses_by_pass(*given, 64, **options)
    )
    alone = evaluate_split(model, dataset, "val")
    gathered = []
    monkeypatch.setattr(plain, "gather_objects", lambda world, own: gathered.append(own) or [own])
    for rank in range(3):
        evaluate_split(model, dataset, "val", World(rank, 3, model.token_embedding.device))
    assert math.fsum(nats for own in gathered for nats in own) == alone.nats
    losses = target_losses(model, read_split(dataset, "val"))
    assert alone.tokens == len(losses)
    assert alone.nats == pytest.approx(float(losses.sum()), rel=1e-6)
