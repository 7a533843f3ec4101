"""The byte accounting: tokens stand for exactly the bytes they decode to."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from fairway.data.build import encode_documents
from fairway.data.token_bytes import byte_counts, token_bytes
from fairway.data.tokenizer import BOS, TRAINER, CaseTokenizer, train_tokenizer
from fairway.errors import UserError
from fairway.evaluation.bits_per_byte import bits_per_byte

TRAINING_TEXT = [
    f"the {word} of {number} words, and a café's naïve menu — 12 × 34 = {number}"
    for number, word in enumerate(["letter", "sound", "number", "color", "house"] * 40)
]


def train(**overrides) -> SentencePieceProcessor:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT),
        model_writer=model,
        vocab_size=320,
        **{**TRAINER, **overrides},
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


TOKENIZER = train()
COUNTS = byte_counts(TOKENIZER)
OTHER_TOKENIZERS = {
    "dummy prefix": train(add_dummy_prefix=True),
    "spaces inside pieces": train(split_by_whitespace=False),
    "no normalization": train(normalization_rule_name="identity", remove_extra_whitespaces=False),
    **{
        f"case markers, {rule}": CaseTokenizer(
            model_proto=train_tokenizer(
                [*TRAINING_TEXT, *map(str.title, TRAINING_TEXT)],
                330,
                0,
                case="markers",
                normalization=rule,
            )
        )
        for rule in ("nfkc", "none")
    },
}
LOSSLESS = OTHER_TOKENIZERS["case markers, none"]

# Words that the tokenizer has pieces for, and characters that fall back to bytes.
fragments = st.one_of(
    st.sampled_from(["the", " ", "  ", " letter", "12", "007", "\n", "\t", "é", "▁", "\0", "�"]),
    st.sampled_from(["😀", "👩‍👩‍👧", "漢字", "ﬁ", "①", "e\u0301", "\u200b", "\u00a0", " ⁇ "]),
    st.sampled_from(["The", " LETTER", "McSound", "iHouse", "\ue011", "\ue014", "\ue015", "İſK"]),
    st.text(max_size=8),
)
documents = st.lists(st.lists(fragments, max_size=12).map("".join), min_size=1, max_size=6)


def count(tokenizer: SentencePieceProcessor, texts: list[str]) -> tuple[int, int]:
    """(bytes the tokens count, bytes of the decoded text), by the two independent ways."""
    tokens, decoded = encode_documents(tokenizer, texts, threads=1)
    counted = int(token_bytes(tokens, byte_counts(tokenizer)).sum())
    return counted, sum(len(text.encode()) for text in decoded)


@settings(deadline=None, max_examples=100)
@given(documents)
def test_bytes_of_tokens_are_bytes_of_decoded_text(texts):
    counted, decoded = count(TOKENIZER, texts)
    assert counted == decoded


@pytest.mark.parametrize(
    "texts",
    [
        ["  leading spaces", " and again"],
        ["emoji 😀 and 漢字", "👩‍👩‍👧"],
        ["digits 1234567890 007"],
        ["", "", "after two empty documents"],
        ["the end", "the start"],
    ],
)
def test_plain_examples_count_their_own_length(texts):
    counted, decoded = count(TOKENIZER, texts)
    assert counted == decoded == sum(len(text.lstrip().encode()) for text in texts)


@settings(deadline=None, max_examples=50)
@given(texts=documents)
@pytest.mark.parametrize("kind", OTHER_TOKENIZERS)
def test_other_tokenizers_count_as_well(kind, texts):
    counted, decoded = count(OTHER_TOKENIZERS[kind], texts)
    assert counted == decoded


@settings(deadline=None, max_examples=75)
@given(documents)
def test_with_case_markers_and_no_normalization_the_original_is_kept_and_counted(texts):
    _, decoded = encode_documents(LOSSLESS, texts, threads=1)
    assert decoded == texts
    counted, _ = count(LOSSLESS, texts)
    assert counted == sum(len(text.encode()) for text in texts)


@settings(deadline=None, max_examples=100)
@given(st.lists(fragments, max_size=12).map("".join))
def test_with_case_markers_each_token_has_the_bytes_that_it_adds_to_the_original(text):
    text = text.replace("\ufffd", "")  # which also stands for a part of a character's bytes
    ids = LOSSLESS.encode(text)
    total = np.cumsum(token_bytes(np.array([BOS, *ids]), byte_counts(LOSSLESS)))
    whole = 0
    for place in range(len(ids)):
        added = LOSSLESS.decode(ids[: place + 1])
        if "\ufffd" not in added:
            assert text.startswith(added)
            assert total[place] == len(added.encode())
            whole += 1
    assert whole > 0 or not text


def test_each_kind_of_token():
    word = TOKENIZER.encode("the menu", out_type=str)[1]
    assert word.startswith("▁") and len(word) > 1
    length = len(word) - 1
    unknown, control = TOKENIZER.unk_id(), TOKENIZER.eos_id()
    word, byte = TOKENIZER.piece_to_id(word), TOKENIZER.piece_to_id("<0xF0>")
    tokens = np.array([BOS, word, word, BOS, byte, word, unknown, word, control], np.uint16)
    expected = [length, length + 1, 0, 1, length + 1, 0, length, 0]
    np.testing.assert_array_equal(token_bytes(tokens, COUNTS), expected)
    assert token_bytes(tokens, COUNTS).dtype == np.int16
    assert len(token_bytes(tokens[:1], COUNTS)) == 0


def test_a_uniform_guess_over_bytes_is_eight_bits():
    assert bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8.0, rel=1e-15)


def test_zero_bytes_is_an_error_and_not_infinity():
    with pytest.raises(UserError, match="0 bytes"):
        bits_per_byte(1.0, 0)
