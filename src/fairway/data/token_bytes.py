"""How many bytes of text each token stands for.

A token's bytes: 1 for a byte token; 0 for control, unknown and unused ids; else the UTF-8 length of
its piece, where SentencePiece's ▁ is a space of one byte, and a leading ▁ counts only after a token
that is text: decoding drops a space at the start of a document, unless the tokenizer keeps it.

Of text with case markers this gives the bytes of the original at each token's place: a marker is a
token of its own and stands for none, and every other character for as many as it has, whether a
marker makes it a capital or not (`data/case.py`).
"""

from dataclasses import dataclass

import numpy as np
from sentencepiece import SentencePieceProcessor

from fairway.data.case import MARKERS, SPACE
from fairway.data.tokenizer import CaseTokenizer


@dataclass(frozen=True)
class ByteCounts:
    """Byte lengths of a vocabulary of V tokens.

    base: int16 [V], bytes without the leading space.
    leading_space: bool [V], whether the piece begins with a space.
    boundary: bool [V], control, unknown and unused ids, after which a leading space is no text;
        none where the tokenizer keeps a document's leading space.
    """

    base: np.ndarray
    leading_space: np.ndarray
    boundary: np.ndarray


def byte_counts(tokenizer: SentencePieceProcessor) -> ByteCounts:
    """The byte lengths of each of the tokenizer's tokens."""
    size = tokenizer.vocab_size()
    without_bytes = MARKERS if isinstance(tokenizer, CaseTokenizer) else ()
    base = np.zeros(size, np.int16)
    leading_space = np.zeros(size, np.bool_)
    boundary = np.zeros(size, np.bool_)
    for token in range(size):
        if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
            boundary[token] = True
        elif tokenizer.is_byte(token):
            base[token] = 1
        else:
            piece = tokenizer.id_to_piece(token)
            leading_space[token] = piece.startswith(SPACE)
            if piece not in without_bytes:
                base[token] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode())
    spaced = int(leading_space.argmax())
    if leading_space[spaced] and tokenizer.decode([spaced]).startswith(" "):
        boundary[:] = False
    return ByteCounts(base, leading_space, boundary)


def token_bytes(tokens: np.ndarray, counts: ByteCounts) -> np.ndarray:
    """Bytes of tokens[1:], each given its predecessor.

    tokens: integer [n + 1]. Returns int16 [n].
    """
    previous, current = tokens[:-1], tokens[1:]
    space = counts.leading_space[current] & ~counts.boundary[previous]
    return counts.base[current] + space
