"""Configs made from the settings' own types: valid, at the limits, and malformed in every way.

Each goes in as users can hand it over: from Python, as YAML, as `--config`, as `--settings`. It has
to become a Config that says what was written, or one UserError of one line that begins with the
key's path.
"""

import datetime
import json
import math
import re
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from random import Random
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
import yaml

from fairway.errors import UserError
from fairway.plain import shown, word
from fairway.plugins import built_in_names, load
from fairway.recipe import (
    SECTIONS,
    VARIED,
    Config,
    RunSettings,
    canonical,
    complete,
    cut,
    load_config,
    section_class,
    sections_of,
    typed_values,
)
from fairway.settings import NULL, Choice, Settings, merge
from fairway.stage import stage_settings
from fairway.stages import STAGES
from tiny import TINY_CONFIG

BASELINE = {"name": "published", "losses": [1.0]}
BASE = merge(TINY_CONFIG, {"data": {"paths": ["text.jsonl"]}, "report": {"baseline": BASELINE}})
LONGEST_MESSAGE = 800
LONGEST_SECONDS = 10


# --- places: every key of every section --------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a value stands: its path in a config, and the annotation of its field."""

    path: tuple[Any, ...]
    annotation: Any


def places() -> list[Place]:
    found = [Place((name,), section_class(name)) for name in SECTIONS]
    found += [place for name in SECTIONS for place in fields(section_class(name), (name,))]
    found += [Place(("variants", "own", *one.path), one.annotation) for one in found]
    return [*found, *fields(RunSettings, ()), Place(("variants", "own"), dict), Place((), dict)]


def fields(kind: type[Settings], path: tuple[Any, ...]) -> Iterator[Place]:
    for name, field in kind.model_fields.items():
        annotation = field.annotation
        for one in field.metadata:
            annotation = Annotated[annotation, one]
        yield Place((*path, name), annotation)
        for part in parts_of(annotation):
            if isinstance(part, type) and issubclass(part, Settings):
                yield from fields(part, (*path, name))
            elif isinstance(part, type) and issubclass(part, Choice):
                for choice in built_in_names(part.package):
                    yield Place((*path, name, choice), dict)
                    yield from fields(load(choice, part.package).Settings, (*path, name, choice))


def parts_of(annotation: Any) -> Iterator[Any]:
    """An annotation and all that it is made of."""
    yield annotation
    if get_origin(annotation) is not Literal:
        for one in get_args(annotation):
            yield from parts_of(one)


# --- values ------------------------------------------------------------------------------------


def fitting(annotation: Any, random: Random) -> Any:
    """A value that a field of this annotation may have, often one at its limits."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return within(fitting(parts[0], random), parts[1:], random)
    if origin is Literal:
        return random.choice(parts)
    if origin is tuple:
        return [fitting(parts[0], random) for _ in range(random.randint(0, 3))]
    if origin is dict or annotation is dict:
        return {}
    if parts:  # a union
        return fitting(random.choice(parts), random)
    return {
        bool: lambda: random.random() < 0.5,
        int: lambda: random.choice([0, 1, 2, 3, 64, 2**31, 2**63 - 1]),
        float: lambda: random.choice([0.0, 1e-300, 0.5, 1.0, 3, 1e300]),
        str: lambda: random.choice(["text", "a.b-c_d", "ä ö", "8317"]),
        type(None): lambda: None,
    }.get(annotation, dict)()


def within(value: Any, limits: tuple[Any, ...], random: Random) -> Any:
    for limit in limits:
        found = [getattr(limit, name, None) for name in ("ge", "gt", "le", "lt")]
        known = [one for one in found if one is not None]
        if known and random.random() < 0.5:
            value = random.choice(known) + random.choice([0, 1, -1, 0.5, 1e-12])
        elif isinstance(limit, annotated_types.MinLen) and not value:
            value = [value] * limit.min_length
    return value


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def bomb() -> list[Any]:
    """A billion values in nine lists."""
    value: list[Any] = ["x"] * 10
    for _ in range(8):
        value = [value] * 10
    return value


def within_itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["x"] = value
    return value


NUMBERS = (
    math.nan, math.inf, -math.inf, 10**400, -(10**400), 10**5000, 2**63, 2**70, -1, 0, 1.5, 2.0,
    42.0, -0.0, 1e308, 5e-324, True, False,
)  # fmt: skip
TEXTS = (
    "", " ", "null", "~", "nan", ".nan", ".inf", "inf", "-Infinity", "1e999", "9" * 30, "9" * 5000,
    "2.0", "1e3", "1_000", " 3 ", "+3", "007", "0x10", "3", "0.5", "true", "yes", "on", "text",
    "x" * 300, "x" * 100_000, "a\nb", "a\n", "\n", "a\0b", "\ud800", "\u202e", "a/b", "..", ".",
    "/", "../x", "a//b", "./a", "results/", "/a/b/", "//a", "{x}", "{", "*", "~/x", "a b",
    "a'b\"c", "-x", "os:path", "no_such:Thing", ":", "a:", "..x:Y", "a/b:C", "a\0:B", "os:getcwd",
)  # fmt: skip
LISTS = (
    [], [[]], [None], [True], [1, 1], ["a", "a"], [math.nan], [10**400], list(range(3000)),
    nested(30), nested(900), bomb(),
)  # fmt: skip
MAPPINGS = (
    {}, {"x": 1}, {1: 2}, {None: 1}, {True: 1}, {(1, 2): 3}, {"": {}}, {"x": {1: 2}},
    {datetime.date(2026, 1, 1): 1}, {"a\nb": 1}, {"x" * 100_000: 1},
    {f"x{number}": number for number in range(2000)}, {"x": [{"y": math.nan}]},
    {"no_such:Thing": {}}, {"lora": {}, "slot": {}}, within_itself(),
)  # fmt: skip
OTHERS = (None, b"x", 1j, {1, 2}, object(), datetime.date(2026, 11, 24))
MALFORMED = (*NUMBERS, *TEXTS, *LISTS, *MAPPINGS, *OTHERS)


def value_for(place: Place, random: Random) -> Any:
    value = (
        fitting(place.annotation, random) if random.random() < 0.55 else random.choice(MALFORMED)
    )
    if random.random() < 0.15:
        value = random.choice([[value], [value, value], {"x": value}, {random.choice("ab"): value}])
    return value


# --- ways in -----------------------------------------------------------------------------------


def laid(path: tuple[Any, ...], value: Any) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value


def is_written(value: Any, left: int = 10_000, levels: int = 100) -> int:
    """What is left of so many values: 0 where JSON or a command line would be too long."""
    for one in value.values() if isinstance(value, dict) else value if type(value) is list else ():
        left = is_written(one, left - 1, levels - 1) if left > 0 and levels > 0 else 0
    return left


def from_python(changes: dict, folder: Path, random: Random) -> Config:
    return complete(merge(BASE, changes))


def from_file(changes: dict, folder: Path, random: Random) -> Config:
    """As YAML or as JSON, which is YAML too; now and then with some bytes damaged."""
    try:
        as_json = random.random() < 0.2 and is_written(changes)
        text = json.dumps(changes) if as_json else yaml.dump(changes)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError):
        return from_python(changes, folder, random)
    content = text.encode("utf-8", "surrogatepass")
    path = folder / "changes.yaml"
    path.write_bytes(damaged(content, random) if random.random() < 0.5 else content)
    return load_config([folder / "base.yaml", path])


HOSTILE = (
    b"\0", b"\xff", b"\xe9", b"\xef\xbb\xbf", b"\t", b"\n", b"\n---\n", b"[", b"]", b"{", b"}",
    b":", b": ", b"- ", b"? ", b"&a ", b"*a", b"<<: *a", b"!!python/object:os.system ", b"!x ",
    b"!!int ",
    b"%YAML 1.1\n", b'"', b"'", b"|", b">", b"#", b"@", b"`", b'"\\UFFFFFFFF"', b"yes", b"~", b"=",
    b"run: x\nrun: y\n", b"[" * 1000, b"1" * 5000, b"? [1]\n: 2\n", b"9999-99-99", b"\xe2\x80\xa8",
    b"a: &a [x,x]\nb: &b [*a,*a]\n", b"x" * 300_000,
)  # fmt: skip


BOMB = (
    b"run: [&a [x,x,x,x,x,x,x,x,x,x]"
    + b"".join(
        f",&{after} [{','.join([f'*{before}'] * 10)}]".encode()
        for before, after in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + b"]"
)
"""A billion values in 300 bytes."""


def damaged(content: bytes, random: Random) -> bytes:
    way = random.choice(["insert", "insert", "cut", "flip", "utf-16", "latin-1", "twice"])
    at = random.randint(0, max(len(content) - 1, 0))
    if way == "insert":
        return content[:at] + random.choice(HOSTILE) + content[at:]
    if way == "flip" and content:
        return content[:at] + bytes([content[at] ^ 1 << random.randint(0, 7)]) + content[at + 1 :]
    if way in ("utf-16", "latin-1"):
        return content.decode("utf-8", "replace").encode(way, "replace")
    return content[:at] if way == "cut" else content * 2


def from_command_line(changes: dict, folder: Path, random: Random) -> Config:
    def typed(value: Any) -> str:
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key}: {typed(one)}' for key, one in value.items())}}}"
        if isinstance(value, list):
            return f"[{', '.join(map(typed, value))}]"
        return "null" if value is None else str(value)

    if not is_written(changes):
        return from_python(changes, folder, random)
    try:
        arguments = [f"{key}={typed(value)}"[:100_000] for key, value in changes.items()]
    except (ValueError, RecursionError, MemoryError):
        return from_python(changes, folder, random)
    return complete(merge(BASE, typed_values(arguments)))


def from_settings(changes: dict, folder: Path, random: Random) -> dict[str, Settings]:
    """A stage's `--settings`, among whose sections is the changed one."""
    if not is_written(changes):
        return from_python(changes, folder, random)
    section = next(iter(changes), "model")
    stages = [one for one in STAGES.values() if section in one.sections] or [STAGES["audit"]]
    stage = random.choice(stages)
    try:
        text = json.dumps(merge(complete(BASE).stage_settings(stage.name), changes))
    except (TypeError, ValueError, RecursionError):
        return from_python(changes, folder, random)
    if random.random() < 0.2:
        text = damaged(text.encode(), random).decode("utf-8", "replace")
    return sections_of(stage_settings(stage, Namespace(settings=text, config=None)))


WAYS = (from_python, from_file, from_command_line, from_settings)


# --- outcomes ----------------------------------------------------------------------------------

BEGINNING = re.compile(rf"(config|--settings|{'|'.join([*RunSettings.model_fields, *SECTIONS])})\b")


def tries(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """The outcome of each config and, where it may not be, what led to it."""
    random, everywhere = Random(seed), places()
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base.yaml").write_text(json.dumps(BASE))
        for number in range(count):
            chosen = random.choices(everywhere, k=random.choice([1, 1, 1, 2, 3]))
            placed = [(place, value_for(place, random)) for place in chosen]
            changes: dict = {}
            for place, value in placed:
                if place.path or isinstance(value, dict):
                    changes = merge(changes, laid(place.path, value))
            sweep = random.choice(everywhere).path
            if random.random() < 0.1 and len(sweep) > 1 and sweep[0] in VARIED:
                values = [random.choice(MALFORMED) for _ in range(random.randint(0, 2))]
                changes = {**changes, "sweep": {".".join(sweep): values}}
            way = random.choice(WAYS)
            started = time.process_time()
            outcome, told = outcome_of(way, changes, placed, folder, random)
            if time.process_time() - started > LONGEST_SECONDS:
                outcome, told = "traceback", "it took too long"
            yield outcome, f"{number} {way.__name__} {[one.path for one in chosen]}: {told}"


def outcome_of(way, changes, placed, folder: Path, random: Random) -> tuple[str, str]:
    try:
        made = way(changes, folder, random)
        sections = made
        if isinstance(made, Config):
            _ = made.folders
            sections = next(iter(made.variants.values())).sections
    except UserError as error:
        text = str(error)
        begins = BEGINNING.match(text) or text.startswith((str(folder), *map(word, changes)))
        if not begins or not text.isprintable() or len(text) > LONGEST_MESSAGE:
            return "traceback", f"a message of {len(text)} characters: {text[:700]!r}"
        return "refused", text
    except Exception as error:  # what must not be
        return "traceback", f"{type(error).__name__}: {str(error)[:300]}"
    faults = [*unsound(sections), *told_otherwise(made, sections, placed, way), *lost(sections)]
    return ("silent", "; ".join(faults)) if faults else ("accepted", "")


def unsound(sections: dict[str, Settings]) -> Iterator[str]:
    """Numbers that no settings may have."""

    def numbers(value: Any) -> Iterator[int | float]:
        if isinstance(value, dict | list | tuple):
            for one in value.values() if isinstance(value, dict) else value:
                yield from numbers(one)
        elif isinstance(value, int | float):
            yield value

    for number in numbers({name: one.model_dump() for name, one in sections.items()}):
        if not math.isfinite(number) or (isinstance(number, int) and abs(number) >= 2**63):
            yield f"{number} was accepted"


def lost(sections: dict[str, Settings]) -> Iterator[str]:
    """What a stage does not read back from its `--settings`."""
    for stage in STAGES.values():
        if {name.partition(".")[0] for name in stage.sections} <= set(sections):
            text = canonical(cut(sections, stage))
            read = stage_settings(stage, Namespace(settings=text, config=None))
            if canonical(cut(sections_of(read), stage)) != text:
                yield f"{stage.name} reads other settings back"


def told_otherwise(made, sections, placed, way) -> Iterator[str]:
    """Values of the last change of a place that do not say what was written."""
    # Damaged bytes may say something else, and of two changes one may undo the other.
    if way in (from_file, from_settings) or len(placed) != 1:
        return
    place, given = placed[0]
    if place.path == ("run",) and given in NULL:  # the recipe's name
        return
    values = vars(made) if isinstance(made, Config) else {}
    found: Any = {**values, **sections}
    for key in place.path:
        found = step(found, key)
    if found is not None and not same(given, found):
        yield f"{place.path}: {shown(given)} became {shown(found)}"


def step(found: Any, key: Any) -> Any:
    if isinstance(found, dict):
        return found.get(key)
    if isinstance(found, tuple):  # of choices
        found = next((one for one in found if getattr(one, "name", None) == key), None)
        return getattr(found, "settings", None)
    if isinstance(found, Choice):
        return found.settings if found.name == key else None
    return getattr(found, key, None)


def same(given: Any, found: Any) -> bool:
    """Whether a value is the plain sense of what was written."""
    if isinstance(found, tuple) and isinstance(given, list):
        return len(found) == len(given) and all(map(same, given, found))
    text = " ".join(str(given).split())  # as YAML reads text within a mapping
    if isinstance(found, bool):
        meant = {"true", "1", "1.0", "yes", "on"} if found else {"false", "0", "-0.0", "0.0"}
        return text.lower() in meant
    if isinstance(found, int):
        return re.fullmatch(r"[-+]?[0-9_]+", text) is not None and int(text) == found
    if isinstance(found, float):
        return not isinstance(given, bool) and float(given) == found
    if isinstance(found, str):
        as_path = str(PurePath(re.sub("//+", "/", text)))
        as_switch = {"True": "on", "False": "off"}.get(text)
        return found in (str(given), text, text.lower(), as_path, as_switch)
    return True


def run(seed: int, count: int) -> Counter:
    """How many configs were accepted or refused, and how many ended as none may: `traceback` (or a
    message that is not one line with the key's path) and `silent` (a Config that says otherwise).
    """
    return Counter(outcome for outcome, _ in tries(seed, count))
