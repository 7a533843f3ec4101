"""Capital letters as markers: a reversible rewriting of text before it is tokenized.

`The` and `the` then share their tokens, so a model learns of both at once. Text is cut into its
maximal runs of ASCII letters. A run of lower case stays. One whose first letter alone is a capital
becomes CAPITAL and lower case; one of two or more capitals becomes ALL_CAPITALS and lower case. In
any other, CAPITAL stands before a capital at its beginning and INNER before each later one. The
marker at the beginning of a run stands before the white space in front of it: of ` The` it makes
CAPITAL and the ` the` that occurs within sentences.

A character that would be mistaken from then on, a marker or SentencePiece's sign for a space,
becomes ESCAPE and a stand-in of as many bytes. So markers stand for no bytes, and every other
character for as many as in the text. Source of the kinds of markers: CaseOps, parameter-golf PR
#1729, whose markers follow the white space.
"""

import re
from functools import lru_cache
from string import ascii_lowercase

SPACE = "▁"
"""SentencePiece's space."""

MARKERS = CAPITAL, ALL_CAPITALS, INNER, ESCAPE = "\ue011", "\ue012", "\ue013", "\ue014"
"""For private use in Unicode, and not CaseOps' U+E001 to U+E004, which follow other rules."""

_STAND_INS = dict(zip((*MARKERS, SPACE), "\ue015\ue016\ue017\ue018\ue019", strict=True))
_LITERALS = {stand_in: literal for literal, stand_in in _STAND_INS.items()}

_LOWER_CASE = frozenset(ascii_lowercase)
_LITERAL = re.compile(f"[{''.join(_STAND_INS)}]")
_ESCAPED = re.compile(f"{ESCAPE}([{''.join(_LITERALS)}]?)")
_FROM_CAPITAL = re.compile("([A-Z][A-Za-z]*)")
_MARKED = re.compile(rf"([{CAPITAL}{ALL_CAPITALS}{INNER}])(\s*)([a-z]*)")


def fold(text: str) -> str:
    """The text with markers instead of ASCII capitals, whatever the text; `unfold` undoes it."""
    text = _LITERAL.sub(lambda found: ESCAPE + _STAND_INS[found[0]], text)
    parts = _FROM_CAPITAL.split(text)
    for index in range(1, len(parts), 2):
        before = parts[index - 1]
        mark, parts[index] = _folded(parts[index], before[-1:] in _LOWER_CASE)
        kept = before.rstrip()
        parts[index - 1] = kept + mark + before[len(kept) :]
    return "".join(parts)


def unfold(text: str) -> str:
    """The text of which `fold` made this; a marker with nothing to mark is nothing."""
    text = _MARKED.sub(lambda found: found[2] + _unfolded(found[1], found[3]), text)
    return _ESCAPED.sub(lambda found: _LITERALS.get(found[1], ""), text)


@lru_cache(1 << 16)
def _folded(letters: str, is_inside: bool) -> tuple[str, str]:
    """What a run becomes from its first capital on: a marker and what follows it.

    is_inside: whether letters of the run stand before that.
    """
    if not is_inside and len(letters) > 1 and letters.isupper():
        return ALL_CAPITALS, letters.lower()
    rest = re.sub("[A-Z]", lambda capital: INNER + capital[0], letters[1:])
    return INNER if is_inside else CAPITAL, (letters[0] + rest).lower()


@lru_cache(1 << 16)
def _unfolded(mark: str, letters: str) -> str:
    return letters.upper() if mark == ALL_CAPITALS else letters.capitalize()
