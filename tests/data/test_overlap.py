"""Validation documents that occur in the training text are counted, whatever the source."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.data import overlap
from fairway.data.build import make_dataset
from fairway.data.dataset import Span
from fairway.data.overlap import EXAMPLES, NEAR_SHARE, NGRAM_TOKENS, find_overlap
from fairway.data.settings import DataSettings
from fairway.data.shards import write_shard
from tiny import write_jsonl

BOS = 1
"""As in every dataset here."""

WORDS = [f"{first}{rest}" for first in "bdfgklmnprst" for rest in ("alo", "eri", "otu", "inas")]
VAL_DOCS = 50


def texts(count: int, words: int = 60, seed: int = 0) -> list[str]:
    """Random documents, no two alike for longer than a few words."""
    generator = np.random.default_rng([seed, count, words])
    return [" ".join(generator.choice(WORDS, words)) for _ in range(count)]


VALIDATION, TRAINING = texts(VAL_DOCS), texts(300, seed=1)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Make a dataset of these documents; the content of its manifest."""

    def made(validation: list[str], training: list[str], finished: bool = False, **changes) -> dict:
        folder = tmp_path_factory.mktemp("made")
        text = write_jsonl(folder / "text.jsonl", [*validation, *training])
        sizes = {"vocab_size": 320, "selection_tokens": 512, "adaptation_tokens": 512}
        counts = {"val_docs": len(validation), "shard_tokens": 4096}
        given = {"source": "jsonl", "paths": [str(text)], **counts}
        make_dataset(DataSettings(name="a", **{**sizes, **given, **changes}), folder / "a", 2)
        if finished:
            (folder / "challenge").mkdir()
            for path in (folder / "a").glob("*.bin"):
                shutil.copy(path, folder / "challenge" / f"fineweb_{path.name}")
            place = {"folder": str(folder / "challenge")}
            place["tokenizer"] = str(folder / "a/tokenizer.model")
            shards = DataSettings(name="b", source="shards", **sizes, **place)
            make_dataset(shards, folder / "b", 2)
        return json.loads((folder / ("b" if finished else "a") / "manifest.json").read_text())

    return made


@pytest.mark.parametrize("finished", [False, True], ids=["documents", "shards"])
def test_documents_of_validation_in_the_training_text_are_counted(make, finished, capsys):
    """40 of 50 of them, anywhere in the training text: among what is kept for TTT, too."""
    training = [*VALIDATION[:20], *TRAINING, *VALIDATION[30:]]
    manifest = make(VALIDATION, training, finished)
    found = manifest["overlap"]
    assert (found["documents"], found["exact"], found["near"]) == (50, 40, 0)
    assert found["examples"] == list(range(20))
    said = "40 of the 50 validation documents occur in the training text, 40 exactly and 0 nearly."
    assert said in manifest["warnings"] and said in capsys.readouterr().err


@pytest.mark.parametrize("finished", [False, True], ids=["documents", "shards"])
def test_honest_splits_have_next_to_no_overlap(make, finished):
    found = make(VALIDATION, TRAINING, finished)["overlap"]
    assert found["exact"] == found["near"] == 0 and found["examples"] == []
    assert found["ngrams_found"] < 0.01 * found["ngrams"]


def normal(text: str) -> str:
    return " ".join(text.split())


def changed_words(text: str, every: int) -> str:
    return " ".join("other" if i % every == 2 else word for i, word in enumerate(text.split()))


@pytest.mark.parametrize(
    ("change", "occurring"),
    [
        (lambda text: f"  {text}\n\n".replace(" ", "\u00a0 "), 50),
        (lambda text: f"before it {text} and after it", 50),
        (lambda text: changed_words(text, 25), 50),
        (lambda text: text[: 2 * len(text) // 3], 50),
        (lambda text: text[: len(text) // 3], 0),
        (lambda text: changed_words(text, 3), 0),
        (lambda text: " ".join(reversed(text.split())), 0),
    ],
    ids=[
        "spaces",
        "inside another",
        "one word in 25",
        "two thirds",
        "a third",
        "one in 3",
        "order",
    ],
)
def test_near_duplicates_are_told_from_other_text(make, change, occurring):
    found = make(VALIDATION, [*TRAINING, *map(change, VALIDATION)])["overlap"]
    assert found["exact"] + found["near"] == occurring
    # In the middle of a text a first word has other tokens, since a space precedes it.
    is_whole = normal(change(VALIDATION[0])) == VALIDATION[0]
    assert (found["exact"] == VAL_DOCS) == is_whole


def test_documents_shorter_than_an_n_gram_are_compared_whole(make):
    """`Yes` is found as a document, not inside of one."""
    short = ["Yes", "No, sir", "Perhaps", "Not at all", ""]
    training = [*TRAINING, "Yes", "No, sir!", "He said perhaps Perhaps", "", "Not at all"]
    found = make([*short, *VALIDATION], training)["overlap"]
    assert (found["exact"], found["near"], found["examples"]) == (2, 0, [0, 3])


def test_the_check_may_be_left_out(make):
    assert make(VALIDATION, [*TRAINING, *VALIDATION], check_overlap=False)["overlap"] is None


def spans(folder: Path, name: str, tokens: list[int], cuts: list[int]) -> list[Span]:
    """A text in shards that end wherever `cuts` say."""
    ends = [*sorted({cut % len(tokens) for cut in cuts} - {0}), len(tokens)]
    found = []
    for start, stop in zip([0, *ends], ends, strict=False):
        path = folder / f"{name}_{start}.bin"
        write_shard(path, np.array(tokens[start:stop], np.uint16))
        found.append(Span(path, 0, stop - start))
    return found


def documents_of(tokens: list[int]) -> list[tuple[int, ...]]:
    """The documents of a text; one that begins without a BOS is its first."""
    marks = [i for i, token in enumerate(tokens) if token == BOS]
    marks = marks if tokens[0] == BOS else [-1, *marks]
    ends = [*marks[1:], len(tokens)]
    return [tuple(tokens[mark + 1 : end]) for mark, end in zip(marks, ends, strict=True)]


def ngrams_of(document: tuple[int, ...]) -> list[tuple[int, ...]]:
    if len(document) < NGRAM_TOKENS:
        return [document] if document else []
    return [document[i : i + NGRAM_TOKENS] for i in range(len(document) - NGRAM_TOKENS + 1)]


def as_defined(val: list[int], training: list[int]) -> dict:
    """What `find_overlap` should find, n-gram by n-gram."""
    known = {one for document in documents_of(training) for one in ngrams_of(document)}
    counts = [[one in known for one in ngrams_of(document)] for document in documents_of(val)]
    shares = [sum(found) / max(1, len(found)) for found in counts]
    return {
        "ngram_tokens": NGRAM_TOKENS,
        "near_share": NEAR_SHARE,
        "documents": len(shares),
        "exact": sum(share == 1 for share in shares),
        "near": sum(NEAR_SHARE <= share < 1 for share in shares),
        "examples": [i for i, share in enumerate(shares) if share >= NEAR_SHARE][:EXAMPLES],
        "ngrams": sum(map(len, counts)),
        "ngrams_found": sum(map(sum, counts)),
    }


few_tokens = st.lists(st.sampled_from([BOS, 2, 3, 4]), min_size=1, max_size=90)
quotes = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)), max_size=3)
cuts = st.lists(st.integers(0, 99), max_size=3)


@settings(deadline=None, max_examples=150)
@given(few_tokens, few_tokens, quotes, cuts, cuts, st.integers(1, 40), st.integers(1, 40))
def test_what_is_found_is_what_the_definition_says(
    tmp_path_factory, val, training, quoted, val_cuts, training_cuts, piece, block
):
    """With any text, any cut into shards, and pieces far smaller than an n-gram, too."""
    for start, length, place in quoted:
        training[place:place] = val[start : start + length]
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(overlap, "PIECE_TOKENS", piece)
        patch.setattr(overlap, "BLOCK_TOKENS", block)
        held_out = spans(folder, "val", val, val_cuts)
        found = find_overlap(held_out, spans(folder, "train", training, training_cuts), BOS, pool)
    assert found == as_defined(val, training)
