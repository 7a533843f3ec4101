"""Classes of a vocabulary's tokens, by properties that an evaluator may gate on."""

import numpy as np
from sentencepiece import SentencePieceProcessor

from fairway.data.case import SPACE
from fairway.data.token_bytes import byte_counts


def token_classes(tokenizer: SentencePieceProcessor) -> dict[str, np.ndarray]:
    """For each property, the class of each of V tokens: integers [V].

    leading space: whether the piece begins a word. byte length: of the token, a space not counted.
    letter case: of the first letter: none, lower, upper.
    """
    counts = byte_counts(tokenizer)
    pieces = [tokenizer.id_to_piece(token) for token in range(tokenizer.vocab_size())]
    cases = [
        0 if length == 0 else _case(piece)
        for piece, length in zip(pieces, counts.base, strict=True)
    ]
    return {
        "leading space": counts.leading_space.astype(np.int64),
        "byte length": counts.base.astype(np.int64),
        "letter case": np.array(cases),
    }


def _case(piece: str) -> int:
    first = next((letter for letter in piece.replace(SPACE, "") if letter.isalpha()), None)
    if first is None:
        return 0
    return 2 if first.isupper() else 1
