"""The SentencePiece tokenizer: trained with the challenge's settings or near them, or given."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from fairway.data.case import MARKERS, SPACE, fold, unfold
from fairway.data.settings import SMALLEST_TRAINED
from fairway.data.shards import MAX_VOCAB_SIZE
from fairway.errors import UserError
from fairway.files import require_file
from fairway.phases import phase

# The ids that the challenge's models reserve.
PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3

MARKER_IDS = [4, 5, 6, 7]
"""Of `data.case: markers`: user-defined symbols follow the reserved ids."""
CASE_OPS = "\ue001"
"""The first user-defined symbol of CaseOps tokenizers, parameter-golf PR #1729."""

MAX_MODEL_BYTES = 1 << 28
"""A model of 65,536 pieces has about 2 MB."""

# More documents than this are sampled: SentencePiece holds those it trains on in memory.
MAX_TRAINING_DOCUMENTS = 5_000_000

TRAINER = {
    "model_type": "bpe",
    "character_coverage": 0.999,
    "byte_fallback": True,
    "split_digits": True,
    # In text without a space none would be learned, and a space would be the three bytes of ▁.
    "required_chars": SPACE,
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
    "minloglevel": 2,
}
MARK_CASE = {"user_defined_symbols": list(MARKERS)}
"""As symbols markers are in no piece with letters, so a word has one set of pieces."""
KEEP_CHARACTERS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MAX_THREADS = 1024
"""SentencePiece trains on no more."""
ONE_THREAD = b"\x12\x03\x80\x01\x01"
"""`trainer_spec {num_threads: 1}` as a protocol buffer: behind a model it overrides that field."""


class CaseTokenizer(sentencepiece.SentencePieceProcessor):
    """A tokenizer whose pieces are of text with case markers; texts go in and come out as usual.

    `load_tokenizer` returns one where the model has the markers.
    """

    def encode(self, input: str | list[str], *args: Any, **options: Any) -> Any:
        """As of SentencePiece: the tokens of a text, or of each of a list."""
        folded = fold(input) if isinstance(input, str) else list(map(fold, input))
        return super().encode(folded, *args, **options)

    def decode(self, input: list, *args: Any, **options: Any) -> Any:
        """As of SentencePiece: the text of tokens, or of each of a list of lists."""
        decoded = super().decode(input, *args, **options)
        return unfold(decoded) if isinstance(decoded, str) else list(map(unfold, decoded))

    Encode, Decode = encode, decode  # which its other names, such as EncodeAsIds, call


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    seed: int,
    *,
    case: str = "keep",
    normalization: str = "nfkc",
    threads: int = 1,
) -> bytes:
    """Train a BPE of `vocab_size` pieces; the contents of its .model file.

    The same documents and seed give the same bytes, whatever `threads` is. `seed` draws the
    documents to train on where there are more than MAX_TRAINING_DOCUMENTS. case, normalization: as
    in section `data`.
    Raises UserError where the text has too few words or too many characters for so many pieces.
    """
    failures: list[BaseException] = []
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    options = dict(TRAINER)
    if case == "markers":
        options |= MARK_CASE
        documents = map(fold, documents)
    if normalization == "none":
        options |= KEEP_CHARACTERS
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_text(documents, failures),
            model_writer=model,
            vocab_size=vocab_size,
            num_threads=min(threads, MAX_THREADS),
            **options,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise UserError(_why_untrained(str(error), vocab_size)) from error
    # The model file records the number of threads, on which nothing else in it depends.
    contents = model.getvalue() + ONE_THREAD
    trained = sentencepiece.SentencePieceProcessor(model_proto=contents)
    learned = trained.vocab_size()
    if learned != vocab_size:
        lower = f" or lower data.vocab_size to {learned}" if learned >= SMALLEST_TRAINED else ""
        raise UserError(
            f"the training text yields only {learned} pieces, expected data.vocab_size "
            f"{vocab_size}: bring more text{lower}"
        )
    return trained.serialized_model_proto()


def _why_untrained(reason: str, vocab_size: int) -> str:
    """What SentencePiece's error means to the user, and what to change."""
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason)
    if needed:
        pieces = int(needed[1])
        change = (
            f"raise data.vocab_size to at least {pieces}"
            if pieces <= MAX_VOCAB_SIZE
            else f"a shard holds at most {MAX_VOCAB_SIZE}, so name a data.tokenizer of your own"
        )
        return (
            f"the training text has so many different characters that they, single bytes and "
            f"reserved ids take {pieces} pieces, expected at most data.vocab_size {vocab_size}: "
            f"{change}"
        )
    if "sentences_.empty()" in reason or "all_chars_count" in reason:
        return "the training documents hold no text to train a tokenizer on: bring other documents"
    return (
        f"no tokenizer of data.vocab_size {vocab_size} could be trained "
        f"({' '.join(reason.split())}): change it, or name a data.tokenizer"
    )


def _training_text(documents: Iterable[str], failures: list[BaseException]) -> Iterator[str]:
    """The documents without NUL; keeps the errors they raise, which SentencePiece makes text."""
    try:
        for text in documents:
            yield text.replace("\0", " ")
    except BaseException as error:
        failures.append(error)
        raise


@phase("read")
def load_tokenizer(
    path: str | Path, vocab_size: int | None = None
) -> sentencepiece.SentencePieceProcessor:
    """Read a .model file, a CaseTokenizer's if it has case markers.

    Raises UserError where it is missing, is none, has another size, lacks BOS or the space, or is
    of CaseOps, whose shards' bytes are not known from their tokens.

    vocab_size: what the configuration says (data.vocab_size); None accepts any.
    """
    path = require_file(path, "SentencePiece (data.tokenizer) or the tokenize stage")
    if not 0 < path.stat().st_size <= MAX_MODEL_BYTES:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, expected a SentencePiece model: name a "
            ".model file in data.tokenizer"
        )
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        found = tokenizer.vocab_size()
        tokenizer.id_to_piece(list(range(found)))
    except (RuntimeError, UnicodeDecodeError) as error:  # the latter of a piece, or of a message
        raise UserError(
            f"{path} is not a SentencePiece model: name a .model file in data.tokenizer"
        ) from error
    if found > MAX_VOCAB_SIZE:
        raise UserError(
            f"{path} has {found} tokens, expected at most {MAX_VOCAB_SIZE}, as many as a shard can "
            "tell apart: name another data.tokenizer"
        )
    if vocab_size not in (None, found):
        raise UserError(
            f"{path} has {found} tokens, expected data.vocab_size {vocab_size}: set "
            f"data.vocab_size to {found} or name another data.tokenizer"
        )
    if tokenizer.bos_id() < 0:
        raise UserError(
            f"{path} has no BOS token, which must precede each document: name another "
            "data.tokenizer"
        )
    if SPACE in tokenizer.decode(tokenizer.encode("a b")):
        raise UserError(
            f"{path} has no piece for the space and makes the three bytes of {SPACE} of it, so "
            "bits per byte would be too low: name a data.tokenizer that was trained on text with "
            "spaces, or null to train one"
        )
    if tokenizer.piece_to_id(CASE_OPS) == MARKER_IDS[0]:
        raise UserError(
            f"{path} is a CaseOps tokenizer, whose markers would be counted as bytes: tokenize the "
            "documents with data.case markers"
        )
    if [tokenizer.piece_to_id(marker) for marker in MARKERS] == MARKER_IDS:
        return CaseTokenizer(model_proto=tokenizer.serialized_model_proto())
    return tokenizer
