"""Plain values: how they are held to bounds, and shown; yaml_text.py reads them from YAML.

Plain are text, finite numbers, true, false, null, dates, and lists and mappings of these whose keys
are text. A stranger's file may be anything: none is read without end, and every fault is one line.
"""

import datetime
import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fairway.errors import UserError

MAXIMUM_VALUES = 100_000
"""With aliases counted wherever they stand: ten lines of them can stand for a billion values."""
MAXIMUM_LEVELS = 20
MAXIMUM_CHARACTERS = 4000
"""Of a text; a path may have so many."""
MAXIMUM_SHOWN = 100
"""Characters of a value or a path in a message."""


class _Shortened(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = MAXIMUM_SHOWN
        self.maxlevel = 3

    def repr_int(self, number: int, level: int) -> str:
        """Python refuses to write integers of more than 4,300 digits."""
        bits = number.bit_length()
        return repr(number) if bits <= 128 else f"an integer of {bits} bits"


_SHORTENED = _Shortened()


def shown(value: Any) -> str:
    """A value as messages show it: one short line, however large it is."""
    return _cut(_SHORTENED.repr(value))


def word(key: Any) -> str:
    """A key as messages show it: as it is where it looks like one, else quoted."""
    is_plain = isinstance(key, str | int) and re.fullmatch(r"[\w.:-]{1,60}", str(key)[:61])
    return str(key) if is_plain else shown(key)


def dotted(path: Iterable[Any]) -> str:
    """`train.ema_decays.0`, for the keys and positions that lead to a value."""
    return _cut(".".join(map(word, path))) or "config"


def _cut(text: str) -> str:
    return text if len(text) <= MAXIMUM_SHOWN else f"{text[: MAXIMUM_SHOWN - 3]}..."


def check_plain(values: Any, where: str = "") -> None:
    """Raise UserError, with the path, where values are not plain or too many.

    where: what holds them, such as a file.
    """
    for count, (path, value) in enumerate(_walk(values)):
        if count >= MAXIMUM_VALUES:
            path = path[:1]
            fault = f"more than {MAXIMUM_VALUES:,} values, aliases counted where they stand"
        elif len(path) > MAXIMUM_LEVELS:
            fault = f"more than {MAXIMUM_LEVELS} levels of nesting"
        else:
            fault = _fault(value)
        if fault:
            place = [dotted(path)] if path or not where else []
            raise UserError(": ".join([where] * bool(where) + place + [f"found {fault}"]))


def _walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    yield path, value
    entries = value.items() if isinstance(value, Mapping) else ()
    for key, one in enumerate(value) if isinstance(value, list | tuple) else entries:
        yield from _walk(one, (*path, key))


def _fault(value: Any) -> str | None:
    if isinstance(value, Mapping):
        odd = [key for key in value if not isinstance(key, str)]
        return f"the key {shown(odd[0])}, expected text: quote it" if odd else None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, expected a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"{shown(value)}, expected at most 64 bits"
    if isinstance(value, str) and len(value) > MAXIMUM_CHARACTERS:
        return f"text of {len(value):,} characters, expected at most {MAXIMUM_CHARACTERS:,}"
    if isinstance(value, str | int | float | list | tuple | datetime.date | None):
        return None
    return f"{shown(value)}, expected text, a number, true, false, null, a list or a mapping"
