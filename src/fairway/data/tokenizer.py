"""The SentencePiece tokenizer: trained with the challenge's settings, or given."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from fairway.errors import UserError
from fairway.files import atomic_path, require_file

# The ids that the challenge's models reserve.
PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3

# More documents than this are sampled: SentencePiece holds those it trains on in memory.
MAX_TRAINING_DOCUMENTS = 5_000_000

TRAINER = {
    "model_type": "bpe",
    "character_coverage": 0.999,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": False,
    "pad_id": PAD,
    "bos_id": BOS,
    "eos_id": EOS,
    "unk_id": UNKNOWN,
    "hard_vocab_limit": False,
    "input_sentence_size": MAX_TRAINING_DOCUMENTS,
    "shuffle_input_sentence": True,
    # Its default passes over every document of more than 4,192 bytes, most of a corpus's text.
    "max_sentence_length": 1 << 30,
    # The model file records the number of threads: one number, one file, on any machine.
    "num_threads": 1,
    "minloglevel": 2,
}


def train_tokenizer(documents: Iterable[str], vocab_size: int, path: Path, seed: int) -> None:
    """Train a BPE of `vocab_size` pieces and write it to `path`, atomically.

    The same documents and seed give the same bytes. `seed` draws the documents to train on where
    there are more than MAX_TRAINING_DOCUMENTS.
    Raises UserError where there is too little text for so many pieces.
    """
    failures: list[BaseException] = []
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_text(documents, failures),
            model_writer=model,
            vocab_size=vocab_size,
            **TRAINER,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise UserError(
            f"no tokenizer could be trained ({' '.join(str(error).split())}): expected text for "
            f"data.vocab_size {vocab_size}; bring more text or lower it"
        ) from error
    learned = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if learned != vocab_size:
        raise UserError(
            f"the training text yields only {learned} pieces, expected data.vocab_size "
            f"{vocab_size}: bring more text or lower it"
        )
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.getvalue())


def _training_text(documents: Iterable[str], failures: list[BaseException]) -> Iterator[str]:
    """The documents without NUL; keeps the errors they raise, which SentencePiece makes text."""
    try:
        for text in documents:
            yield text.replace("\0", " ")
    except BaseException as error:
        failures.append(error)
        raise


def load_tokenizer(
    path: str | Path, vocab_size: int | None = None
) -> sentencepiece.SentencePieceProcessor:
    """Read a .model file; UserError where it is missing, is none, or has another size.

    vocab_size: what the configuration says (data.vocab_size); None accepts any.
    """
    path = require_file(path, "SentencePiece (data.tokenizer) or the tokenize stage")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise UserError(
            f"{path} is not a SentencePiece model: name a .model file in data.tokenizer"
        ) from error
    if tokenizer.vocab_size() == 0:
        raise UserError(f"{path} is empty, expected a SentencePiece model: check data.tokenizer")
    if vocab_size is not None and tokenizer.vocab_size() != vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size()} tokens, expected data.vocab_size {vocab_size}: "
            "change data.vocab_size or name another data.tokenizer"
        )
    if tokenizer.bos_id() < 0:
        raise UserError(
            f"{path} has no BOS token, which must precede each document: name another "
            "data.tokenizer"
        )
    return tokenizer
