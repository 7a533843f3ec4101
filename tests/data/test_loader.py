"""The coprime-stride loader: coverage, resumption, and independence of the number of processes."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.data.dataset import Span
from fairway.data.loader import CoprimeLoader
from fairway.data.shards import write_shard
from fairway.errors import UserError

LENGTH = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards in which every token names its position: 997, 640 and 75 tokens."""
    folder = tmp_path_factory.mktemp("shards")
    spans, first = [], 0
    for index, tokens in enumerate((997, 640, 75)):
        path = folder / f"train_{index:06d}.bin"
        write_shard(path, np.arange(first, first + tokens, dtype=np.uint16))
        spans.append(Span(path, 0, tokens))
        first += tokens
    return spans


def draw(loader: CoprimeLoader, batches: int) -> np.ndarray:
    return np.concatenate([loader.next_batch()[0] for _ in range(batches)])


def test_rows_are_runs_of_text_and_targets_follow_inputs(shards):
    inputs, targets = CoprimeLoader(shards, LENGTH, 12, seed=0).next_batch()
    assert inputs.shape == targets.shape == (12, LENGTH)
    assert inputs.dtype == targets.dtype == np.int64
    np.testing.assert_array_equal(inputs + 1, targets)
    np.testing.assert_array_equal(np.diff(inputs), 1)


def count_blocks(loader: CoprimeLoader) -> int:
    """Blocks of the first epoch, drawn one by one."""
    drawn = -1
    while loader.state()["epoch"] == 0:
        loader.next_batch()
        drawn += 1
    return drawn


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    length=st.integers(1, 40),
    batch=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_every_block_once_before_any_repeats(tmp_path_factory, tokens, length, batch, seed):
    folder = tmp_path_factory.mktemp("shards")
    ends = np.cumsum([0, *tokens])
    spans = []
    for index, count in enumerate(tokens):
        path = folder / f"{index}.bin"
        write_shard(path, np.arange(ends[index], ends[index + 1], dtype=np.uint16))
        spans.append(Span(path, 0, count))
    if max(tokens) <= length:
        with pytest.raises(UserError, match="longer than a sequence"):
            CoprimeLoader(spans, length, batch, seed)
        return
    loader = CoprimeLoader(spans, length, batch, seed)
    blocks = count_blocks(CoprimeLoader(spans, length, 1, seed))
    fitting = [count for count in tokens if count > length]
    assert sum(max((n - length) // length, 1) for n in fitting) <= blocks
    assert blocks <= sum((n - 1) // length for n in fitting)
    first_tokens = draw(loader, -(-blocks // batch))[:blocks, 0]
    assert len(set(first_tokens.tolist())) == blocks
    assert np.diff(np.sort(first_tokens)).min(initial=length) >= length


def test_epochs_start_at_new_phases_in_a_new_order(shards):
    loader = CoprimeLoader(shards[:1], LENGTH, 1, seed=3)
    epochs: list[list[int]] = [[] for _ in range(5)]
    while not epochs[4]:
        first = int(loader.next_batch()[0][0, 0])
        epochs[loader.state()["epoch"]].append(first)
    lengths = {len(first) for first in epochs[:4]}
    assert lengths <= {(len(shards[0]) - 1) // LENGTH - 1, (len(shards[0]) - 1) // LENGTH}
    epochs = epochs[:4]
    assert len({int(first[0] % LENGTH) for first in epochs}) > 1  # phases
    assert len({int(first[1] - first[0]) for first in epochs}) > 1  # strides


def test_batches_mix_shards_in_proportion_to_what_is_left(shards):
    loader = CoprimeLoader(shards, LENGTH, 20, seed=1)
    ends = np.cumsum([len(span) for span in shards])
    shard_of = [Counter(np.searchsorted(ends, draw(loader, 1)[:, 0], "right")) for _ in range(10)]
    assert all(len(counter) >= 2 for counter in shard_of)
    total = sum(shard_of, Counter())
    assert total[0] > total[1] > total[2] > 0


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_processes_draws_the_same_global_batches(shards, world_size):
    alone = CoprimeLoader(shards, LENGTH, 16, seed=7)
    ranks = [CoprimeLoader(shards, LENGTH, 16, 7, rank, world_size) for rank in range(world_size)]
    for _ in range(30):  # more than an epoch
        inputs, targets = alone.next_batch()
        batches = [rank.next_batch() for rank in ranks]
        assert all(len(batch[0]) == 16 // world_size for batch in batches)
        np.testing.assert_array_equal(np.concatenate([batch[0] for batch in batches]), inputs)
        np.testing.assert_array_equal(np.concatenate([batch[1] for batch in batches]), targets)


@pytest.mark.parametrize("batches", [0, 1, 5, 40])
def test_a_saved_state_gives_the_same_next_batches(shards, batches):
    loader = CoprimeLoader(shards, LENGTH, 16, seed=7)
    draw(loader, batches) if batches else None
    state = json.loads(json.dumps(loader.state()))
    assert len(json.dumps(state)) < 200
    resumed = CoprimeLoader(shards, LENGTH, 16, seed=7, rank=1, world_size=2)
    resumed.load_state(state)
    for _ in range(30):
        np.testing.assert_array_equal(resumed.next_batch()[0], loader.next_batch()[0][8:])


def test_seeds_differ_and_repeat(shards):
    first, again, other = (draw(CoprimeLoader(shards, LENGTH, 8, seed), 5) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_only_the_spans_are_drawn_from(shards):
    span = Span(shards[0].path, 100, 200)
    rows = draw(CoprimeLoader([span], LENGTH, 4, seed=0), 30)
    assert rows.min() >= 100 and rows.max() < 199  # 199 is a target only


def test_a_batch_larger_than_an_epoch_repeats_blocks_evenly(shards):
    loader = CoprimeLoader(shards[2:], LENGTH, 40, seed=0)
    inputs, _ = loader.next_batch()
    assert inputs.shape == (40, LENGTH)
    assert loader.state()["epoch"] == 4


def test_short_shards_and_short_texts_have_other_remedies(shards):
    short = [Span(shards[0].path, start, start + 60) for start in (0, 60, 120)]
    with pytest.raises(UserError, match=r"has 60, all have 180\): raise data\.shard_tokens"):
        CoprimeLoader(short, 60, 4, seed=0)
    with pytest.raises(UserError, match=r"has 60, all have 60\): bring more text, or lower train"):
        CoprimeLoader(short[:1], 60, 4, seed=0)


def test_processes_must_divide_the_batch(shards):
    with pytest.raises(UserError, match="10 sequences cannot be shared by 4 processes"):
        CoprimeLoader(shards, LENGTH, 10, 0, rank=0, world_size=4)
