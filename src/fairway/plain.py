"""Plain values: how YAML, `--config` and `--settings` are read, held to bounds, and shown.

Plain are text, finite numbers, true, false, null, dates, and lists and mappings of these whose keys
are text. A stranger's file may be anything: none is read without end, and every fault is one line.
"""

import datetime
import math
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fairway.errors import UserError

MAXIMUM_BYTES = 1 << 18
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


class _Strict(yaml.reader.Reader):
    """Each key stands once in its mapping, and nothing has a tag such as !!python/object."""

    def fetch_tag(self) -> None:
        raise yaml.scanner.ScannerError(None, None, "found a tag", self.get_mark())

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        known = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key
            if name in known:
                problem = f"found the key {shown(key.value)} twice"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            known.add(name)
        return node


class _TextLoader(_Strict, yaml.BaseLoader):
    """Every scalar is text."""


class _Loader(_Strict, yaml.SafeLoader):
    """Reads 2023_11, 010, +5 and 2026-11-24 as text, where YAML 1.1 has 202311, 8, 5 and a date."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"(?:0|-?[1-9][0-9]{0,17})$", list("-0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
    ("merge", r"<<$", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


_YAML_ERRORS = (yaml.YAMLError, ValueError, OverflowError, RecursionError)
"""PyYAML lets through what Python raises about characters and numbers that there are not."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping; UserError where it is missing, no YAML, no mapping, or not plain."""
    try:
        text = _read_text(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{_path_shown(path)} could not be read: {reason}") from error
    try:
        loaded = yaml.load(text, _Loader)
    except _YAML_ERRORS as error:
        raise UserError(f"{path} is not YAML: {_told(error)}") from error
    if not isinstance(loaded, dict):
        found = "nothing" if loaded is None else type(loaded).__name__
        raise UserError(f"{path} holds {found}, expected a mapping of keys")
    check_plain(loaded, str(path))
    return loaded


def typed_value(text: str) -> Any:
    """What a command line says: plain values, in which every scalar is the text that was typed."""
    text = text.strip("'\"")
    try:
        value = yaml.load(text, _TextLoader)
    except _YAML_ERRORS:
        return text
    return text if isinstance(value, str) else value  # YAML makes a blank of a line break


def _read_text(path: str | Path) -> str:
    """The text of a regular file: a pipe or a device might never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"it is {'a folder' if os.path.isdir(path) else 'no file'}")
    with open(path, "rb") as file:
        content = file.read(MAXIMUM_BYTES + 1)
    if len(content) > MAXIMUM_BYTES:
        raise OSError(f"it has more than {MAXIMUM_BYTES:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OSError(f"byte {error.start + 1} is not UTF-8: save it as UTF-8") from error


def _path_shown(path: str | Path) -> str:
    return str(path) if str(path).isprintable() else shown(str(path))


def _told(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        words = ", ".join(filter(None, (error.context, error.problem)))
        return f"{words}, line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).replace(' in "<unicode string>"', "").split())
