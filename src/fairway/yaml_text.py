"""How YAML files and `--config` are read, as plain values.

A stranger's file may be anything: none is read without end, and every fault is one line.
"""

import os
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fairway.errors import UserError
from fairway.plain import check_plain, shown

MAXIMUM_BYTES = 1 << 18


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
        name, reason = str(path), getattr(error, "strerror", None) or error
        name = name if name.isprintable() else shown(name)
        raise UserError(f"{name} could not be read: {reason}") from error
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


def _told(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        words = ", ".join(filter(None, (error.context, error.problem)))
        return f"{words}, line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).replace(' in "<unicode string>"', "").split())
