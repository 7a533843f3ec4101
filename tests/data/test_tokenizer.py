"""Training and reading tokenizers."""

import pytest
from sentencepiece import SentencePieceTrainer

from fairway.data.tokenizer import load_tokenizer, train_tokenizer
from fairway.errors import UserError

TEXTS = [
    f"the {word} of {number} words, {word[::-1]}\n"
    for number, word in enumerate(
        ["letter", "sound", "number", "colour", "house", "river", "winter"] * 30
    )
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, 320, path, seed=0)
    return path


def test_the_same_text_gives_the_same_file(model, tmp_path):
    train_tokenizer(iter(TEXTS), 320, tmp_path / "again.model", seed=0)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()


def test_the_challenges_settings(model):
    tokenizer = load_tokenizer(model, 320)
    reserved = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert reserved == (0, 1, 2, 3)
    pieces = tokenizer.encode("the 2042 ﬁne 漢", out_type=str)
    assert pieces[0] == "the"  # no dummy prefix
    assert {"2", "0", "4"} <= set(pieces)  # digits are split
    assert "<0xE6>" in pieces  # byte fallback
    assert tokenizer.decode(tokenizer.encode("ﬁne")) == "fine"  # nmt_nfkc


def test_long_documents_are_learned_from(tmp_path):
    train_tokenizer(["".join(TEXTS)], 320, tmp_path / "tokenizer.model", seed=0)


def test_too_little_text_for_the_vocabulary(tmp_path):
    with pytest.raises(UserError, match=r"only \d+ pieces, expected data.vocab_size 5000"):
        train_tokenizer(TEXTS, 5000, tmp_path / "tokenizer.model", seed=0)
    with pytest.raises(UserError, match="no tokenizer could be trained"):
        train_tokenizer(["", ""], 320, tmp_path / "tokenizer.model", seed=0)
    assert not list(tmp_path.iterdir())


def test_errors_of_the_documents_come_through(tmp_path):
    def documents():
        yield TEXTS[0]
        raise UserError("text.jsonl:2 is not JSON")

    with pytest.raises(UserError, match=r"^text\.jsonl:2 is not JSON$"):
        train_tokenizer(documents(), 320, tmp_path / "tokenizer.model", seed=0)


def test_a_tokenizer_of_another_size_is_refused(model):
    with pytest.raises(UserError, match=r"has 320 tokens, expected data\.vocab_size 1024"):
        load_tokenizer(model, 1024)


@pytest.mark.parametrize("contents", [b"", b"no model at all"])
def test_a_file_that_is_no_model_is_refused(tmp_path, contents):
    (tmp_path / "tokenizer.model").write_bytes(contents)
    with pytest.raises(UserError, match="SentencePiece model"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_a_model_without_bos_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            vocab_size=320,
            bos_id=-1,
            byte_fallback=True,
            model_type="bpe",
            minloglevel=2,
        )
    with pytest.raises(UserError, match="no BOS"):
        load_tokenizer(path)
