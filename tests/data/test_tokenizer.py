"""Training and reading tokenizers."""

import random
from hashlib import sha256
from itertools import islice

import pytest

from fairway.data.case import MARKERS
from fairway.data.tokenizer import CaseTokenizer, load_tokenizer, train_tokenizer
from fairway.errors import UserError
from fairway.recipe import complete
from tiny import given_model

EMBEDDED_SHA256 = "9024231789d4499fb5e97789f394f4353caa8adf1bfc7af6f9fd559bef763709"

TEXTS = [
    f"the {word} of {number} words, {word[::-1]}\n"
    for number, word in enumerate(
        ["letter", "sound", "number", "colour", "house", "river", "winter"] * 30
    )
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXTS, 320, seed=0))
    return path


@pytest.mark.parametrize("threads", [1, 2, 4, 2000])
def test_the_same_text_gives_the_same_file_on_any_number_of_threads(model, threads):
    assert train_tokenizer(iter(TEXTS), 320, seed=0, threads=threads) == model.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_embedded_corpus_has_the_tokenizer_it_always_had(threads):
    data = complete({"recipe": "quickstart", "seeds": [1]}).sections("causal")["data"]
    training = islice(data.corpus().documents(), 12, None)  # as the quickstart was at first
    model = train_tokenizer(training, data.vocab_size, data.seed, threads=threads)
    assert sha256(model).hexdigest() == EMBEDDED_SHA256


def test_the_challenges_settings(model):
    tokenizer = load_tokenizer(model, 320)
    reserved = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert reserved == (0, 1, 2, 3)
    pieces = tokenizer.encode("the 2042 ﬁne 漢", out_type=str)
    assert pieces[0] == "the"  # no dummy prefix
    assert {"2", "0", "4"} <= set(pieces)  # digits are split
    assert "<0xE6>" in pieces  # byte fallback
    assert tokenizer.decode(tokenizer.encode("ﬁne")) == "fine"  # nmt_nfkc


def test_long_documents_are_learned_from():
    train_tokenizer(["".join(TEXTS)], 320, seed=0)


def words_of(alphabet: str, words: int = 4000) -> list[str]:
    """Documents of made-up words in a script."""
    generator = random.Random(alphabet)
    made = ["".join(generator.choices(alphabet, k=generator.randint(2, 6))) for _ in range(words)]
    return [" ".join(made[first : first + 40]) for first in range(0, words, 40)]


LATIN = "".join(map(chr, [*range(97, 123), *range(0xE0, 0x132)]))
GREEK_AND_CYRILLIC = "".join(map(chr, [*range(0x3B1, 0x3CA), *range(0x410, 0x482)]))
ARABIC = "".join(map(chr, [*range(0x621, 0x63B), *range(0x641, 0x64B), *range(0x679, 0x6D3)]))
CHINESE = "".join(map(chr, range(0x4E00, 0x5600)))


@pytest.mark.parametrize("alphabet", [LATIN, GREEK_AND_CYRILLIC, ARABIC, CHINESE])
def test_an_alphabet_larger_than_the_vocabulary_says_how_large_that_must_be(alphabet):
    texts = words_of(alphabet)
    with pytest.raises(UserError, match=r"raise data\.vocab_size to at least \d+$") as caught:
        train_tokenizer(texts, 300, seed=0)
    needed = int(str(caught.value).split()[-1])
    assert needed > 260 + 0.9 * len(alphabet)
    train_tokenizer(texts, needed, seed=0)
    with pytest.raises(UserError, match=f"to at least {needed}$"):
        train_tokenizer(texts, needed - 1, seed=0)


def test_more_characters_than_a_shard_has_ids_for():
    texts = ["".join(map(chr, range(first, first + 200))) for first in range(0x20000, 0x32000, 200)]
    with pytest.raises(UserError, match=r"a shard holds at most 65536, so name a data\.tokenizer"):
        train_tokenizer(texts, 1024, seed=0)


def test_too_little_text_says_what_it_suffices_for():
    with pytest.raises(
        UserError, match=r"only \d+ pieces, expected data.vocab_size 5000"
    ) as caught:
        train_tokenizer(TEXTS, 5000, seed=0)
    assert "bring more text or lower data.vocab_size to" in str(caught.value)
    train_tokenizer(TEXTS, int(str(caught.value).split()[-1]), seed=0)
    with pytest.raises(UserError, match=r"only 262 pieces, .*: bring more text$"):
        train_tokenizer(["a"] * 5, 320, seed=0)


def test_a_text_without_spaces_still_gives_a_tokenizer_that_knows_them(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(
        train_tokenizer(["字母数字颜色房子河流冬天", "abcdefgh" * 3] * 40, 300, seed=0)
    )
    tokenizer = load_tokenizer(path, 300)
    text = "one space, 字母 and  two"
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("  ", " ")
    assert "▁" in tokenizer.encode("a b", out_type=str)


def test_a_given_tokenizer_without_a_space_is_refused(tmp_path):
    model = given_model(tmp_path, ["字母数字颜色房子河流冬天"] * 40, add_dummy_prefix=False)
    with pytest.raises(UserError, match="has no piece for the space and makes the three bytes of"):
        load_tokenizer(model)


@pytest.mark.parametrize("text", ["", "   ", "\0", "\u200b", "\n\t"])
def test_documents_without_text(text):
    with pytest.raises(UserError, match="training documents hold no text"):
        train_tokenizer([text] * 3, 320, seed=0)


def test_errors_of_the_documents_come_through():
    def documents():
        yield TEXTS[0]
        raise UserError("text.jsonl:2 is not JSON")

    with pytest.raises(UserError, match=r"^text\.jsonl:2 is not JSON$"):
        train_tokenizer(documents(), 320, seed=0)


def test_a_tokenizer_of_another_size_is_refused(model):
    with pytest.raises(UserError, match=r"has 320 tokens, .* 1024: set data\.vocab_size to 320 or"):
        load_tokenizer(model, 1024)


def test_a_tokenizer_with_more_tokens_than_a_shard_has_ids_for_is_refused(tmp_path):
    pieces = [f"piece{number}" for number in range(66_000)]
    path = given_model(tmp_path, TEXTS, vocab_size=66_400, user_defined_symbols=pieces)
    with pytest.raises(UserError, match="tokens, expected at most 65536, as many as a shard can"):
        load_tokenizer(path, 65_536)


def not_utf8(contents: bytes) -> bytes:
    """A piece of the model, which is text, begins with a byte that no character begins with."""
    return contents.replace("▁".encode(), b"\xbf\x96\x81", 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda contents: b"",
        lambda contents: b"no model at all",
        lambda contents: contents[: len(contents) // 2],
        lambda contents: contents + b"\0",
        lambda contents: contents[:50] + b"\xff" + contents[51:],
        not_utf8,
    ],
)
def test_a_file_that_is_no_model_is_refused(model, tmp_path, damage):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damage(model.read_bytes()))
    with pytest.raises(UserError, match=r"SentencePiece model: name a \.model file") as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_too_large_for_a_model_is_not_read(tmp_path):
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(UserError, match="has 3221225472 bytes, expected a SentencePiece model"):
        load_tokenizer(path)


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_a_model_without_bos_is_refused(tmp_path):
    with pytest.raises(UserError, match="no BOS"):
        load_tokenizer(given_model(tmp_path, TEXTS, bos_id=-1))


def test_a_model_with_case_markers_is_used_with_them(tmp_path):
    path = tmp_path / "tokenizer.model"
    texts = [*TEXTS, *map(str.title, TEXTS), *map(str.upper, TEXTS)]
    path.write_bytes(train_tokenizer(texts, 320, seed=0, case="markers", normalization="none"))
    tokenizer = load_tokenizer(path, 320)
    lower = tokenizer.encode("a letter", out_type=str)
    capital, all_capitals, *_ = MARKERS
    assert tokenizer.encode("a Letter", out_type=str) == [lower[0], capital, *lower[1:]]
    assert tokenizer.encode("a LETTER", out_type=str) == [lower[0], all_capitals, *lower[1:]]
    pieces = [tokenizer.id_to_piece(token) for token in range(320)]
    assert [piece for piece in pieces if set(piece) & set(MARKERS)] == list(MARKERS)
    text = "  The ﬁne\tMcRiver\r\n▁\0 "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.DecodeIds(tokenizer.EncodeAsIds(text)) == text
    assert tokenizer.decode(tokenizer.encode([text, "A"])) == [text, "A"]


def test_other_models_are_used_without_case_markers(model):
    assert not isinstance(load_tokenizer(model), CaseTokenizer)


def test_a_tokenizer_of_case_ops_is_refused(tmp_path):
    reserved = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    symbols = ["\ue001", "\ue002", "\ue003", "\ue004"]
    path = given_model(tmp_path, TEXTS, user_defined_symbols=symbols, **reserved)
    with pytest.raises(UserError, match="is a CaseOps tokenizer, whose markers"):
        load_tokenizer(path)
