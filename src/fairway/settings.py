"""Settings classes: each section's keys, defaults and ranges, beside the code that they configure.

A section of the config is a subclass of `Settings`, from Python as from a file:

    SlotSettings(l2=3.0)

A string under a field is its description; from the classes come the JSON schema and the reference
page of the config. Faults are told in one line: the key's path, what was found, what is allowed.
"""

import datetime
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_serializer,
    model_validator,
)

from fairway.errors import UserError
from fairway.plain import dotted, shown, word
from fairway.plugins import did_you_mean, load

NULL = (None, "null")
"""Null in a file, and as a command line has it."""


class Fault(ValueError):
    """A fault of a section or a choice, told without its path, which `explain` puts before it.

    path: from the section or the choice on.
    """

    def __init__(self, message: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.path = path


class _Within(ValueError):
    """Faults of the settings inside a choice."""

    def __init__(self, name: str, error: ValidationError) -> None:
        super().__init__(name)
        self.name, self.error = name, error


def _as_path(text: str) -> str:
    """A path as Snakemake wants it: without `./`, `//` and a slash at the end."""
    if not text.isprintable() or text != text.strip() or re.search(r"^[~-]|[{}*?]", text):
        raise Fault(
            f"found {shown(text)}, expected a path without line breaks, without any of {{ }} * ?, "
            "without ~ or - at its start and without blanks at its ends"
        )
    path = PurePath(re.sub("//+", "/", text))
    if max(len(part.encode()) for part in (*path.parts, "")) > 255:
        raise Fault(f"found {shown(text)}, expected names of at most 255 bytes in a path")
    return str(path)


NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$"
NAMES = f"text matching {NAME} that does not end in 20 repetitions"
"""What messages say of names of folders. Files beside them have longer names."""


def is_name(text: str) -> bool:
    """Whether a folder may have this name; Snakemake takes repetitions for a rule without end."""
    return bool(re.fullmatch(NAME, text)) and not re.search(r"(.+)\1{19}$", text)


def _as_name(text: str) -> str:
    if not is_name(text):
        raise Fault(f"found {shown(text)}, expected {NAMES}")
    return text


Name = Annotated[str, Field(pattern=NAME), AfterValidator(_as_name)]
"""The name of a folder."""
PathText = Annotated[str, Field(min_length=1), AfterValidator(_as_path)]
"""The path of a file or folder, which need not be there."""


class Settings(BaseModel):
    """Base of every section. Immutable; unknown keys are faults; numbers are finite."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, values: Any) -> Any:
        """Undo what YAML or a command line made of a value, and refuse unknown keys by name."""
        if not isinstance(values, Mapping):
            return values
        if unknown := told_unknown(values, cls.model_fields):
            raise Fault(unknown)
        return {
            key: _meant(value, cls.model_fields[key].annotation, (key,))
            for key, value in values.items()
        }

    def changed(self, **changes: Any) -> Self:
        """A validated copy with other values."""
        return type(self).model_validate({**dict(self), **changes})

    def as_read(self) -> dict[str, Any]:
        """Plain values of the keys that are read under these settings: what a stage depends on."""
        return self.model_dump(mode="json")

    def check_with(self, sections: Mapping[str, "Settings"]) -> None:
        """Raise UserError where this section does not fit the others of a config."""


class Choice(BaseModel):
    """A class by name with its own settings, as a config names it.

    `lora`, `{lora: {rank: 16}}` or `{"my_cache:Cache": {weight: 0.1}}`. The class has a nested or
    inherited `Settings`. Subclasses say in which `package` plain names are looked up.
    """

    model_config = ConfigDict(frozen=True)
    package: ClassVar[str]

    name: str
    settings: SerializeAsAny[Settings]

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {value: {}}
        if not isinstance(value, Mapping) or len(value) != 1:
            raise Fault(f"found {shown(value)}, expected a name or {{name: {{its settings}}}}")
        ((name, settings),) = value.items()
        if not isinstance(name, str):
            raise Fault(f"found the name {shown(name)}, expected text")
        if isinstance(settings, Settings):
            return {"name": name, "settings": settings}
        try:
            kind = load(name, cls.package)
        except UserError as error:
            raise Fault(str(error)) from None
        if not _has_settings(kind):
            raise Fault(f"{name!r} is no class with a nested `Settings(fairway.settings.Settings)`")
        settings = {} if settings in NULL else settings
        try:
            return {"name": name, "settings": kind.Settings.model_validate(settings)}
        except ValidationError as error:
            raise _Within(name, error) from None

    @model_serializer
    def _as_named(self) -> dict[str, Any]:
        return {self.name: self.settings.model_dump(mode="json")}

    @property
    def type(self) -> Any:
        """The class itself."""
        return load(self.name, self.package)

    @property
    def label(self) -> str:
        """A short name for columns and figures: `my_cache:Cache` becomes `cache`."""
        return self.name.rpartition(":")[2].lower()


SettingsType = TypeVar("SettingsType", bound=Settings)


def validated(kind: type[SettingsType], values: Any, where: str = "") -> SettingsType:
    """`kind` made of plain values; UserError in one line. where: the path of `values`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, (where,) if where else ())) from None


def list_defaults(kind: type[Settings]) -> dict[str, list[Any]]:
    """The default entries of a section's lists of named classes; `merge` lays changes over them."""
    return {
        name: list(field.default)
        for name, field in kind.model_fields.items()
        if any(_is_choice(one) for one in _entries(field.annotation))
    }


def explain(error: ValidationError, path: Sequence[str | int] = ()) -> str:
    """The first fault in one line: the key's path, what was found, and what is allowed."""
    first, *others = error.errors(include_url=False)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # tells its keys itself
        return str(cause)
    place = [*path, *first["loc"], *getattr(cause, "path", ())]
    if isinstance(cause, _Within):
        before = place[:-1] if place and isinstance(place[-1], int) else place
        return explain(cause.error, (*before, cause.name))
    if isinstance(cause, Fault):
        return f"{dotted(place)}: {cause}"
    if first["type"] == "missing":
        return f"{dotted(place[:-1])}: missing key {place[-1]}"
    # The members of a union each have a fault of their own, one level further down.
    same = [first, *(one for one in others if one["input"] is first["input"])]
    if len(same) > 1:
        depth = min(len(one["loc"]) for one in same)
        place = [*path, *first["loc"][: depth - 1]]
    allowed = " or ".join(dict.fromkeys(map(_allowed, same)))
    return f"{dotted(place)}: found {shown(first['input'])}, expected {allowed}"


def told_unknown(keys: Iterable[Any], known: Iterable[str]) -> str | None:
    """`unknown key x; did you mean y?; allowed: …` where any key is not among the known ones."""
    known = list(known)
    unknown = sorted((key for key in keys if key not in known), key=str)
    if not unknown:
        return None
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    return (
        f"unknown key {', '.join(map(word, unknown[:3]))}{more}"
        f"{did_you_mean(str(unknown[0]), known)}; allowed: {', '.join(known) or 'none'}"
    )


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping of keys",
    "model": "a mapping of keys",
    "mapping": "a mapping of keys",
    "finite": "a finite number",
}
_LIMITS = {
    "greater_than_equal": ("ge", "at least {}"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "at most {}"),
    "less_than": ("lt", "less than {}"),
    "too_short": ("min_length", "a list of at least {}"),
    "too_long": ("max_length", "a list of at most {}"),
    "string_too_short": ("min_length", "text of at least {} characters"),
    "string_pattern_mismatch": ("pattern", "text matching {}"),
}


def _allowed(fault: Mapping[str, Any]) -> str:
    kind, context = fault["type"], fault.get("ctx", {})
    if kind in _LIMITS:
        key, words = _LIMITS[kind]
        limit = context[key]
        return words.format(f"{limit:g}" if isinstance(limit, float) else limit)
    if kind == "literal_error":
        return f"one of {context['expected'].replace(chr(39), '').replace(' or ', ', ')}"
    if kind == "none_required":
        return "null"
    return _KINDS.get(kind.split("_")[0], fault["msg"])


def _meant(value: Any, annotation: Any, path: tuple[str | int, ...]) -> Any:
    """A field's value as it was written, where YAML 1.1 or `--config` gave it another type.

    path: from the section on. Raises Fault where pydantic would take what was not meant.
    """
    members = _members(annotation)
    if isinstance(value, list | tuple) and (entries := _entries(annotation)):
        return [_meant(one, entries[0], (*path, index)) for index, one in enumerate(value)]
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, bool) and bool not in members and Any not in members:
        # YAML reads on and off as booleans; as numbers they would be 1 and 0 without a word.
        is_switch = "on" in members and "off" in members
        return ("off", "on")[value] if is_switch else str(value).lower()
    if value in ("null", "~") and type(None) in members:
        return None
    if isinstance(value, float) and str in members and float not in members:
        # 1.50 would be 1.5, and the commit 1234e56 another number.
        raise Fault(f"found the number {value}, expected text: quote it", path)
    if int in members and float not in members and not _may_be_whole(value, members):
        names = [one for one in members if isinstance(one, str)]
        allowed = f"one of {', '.join(names)} or a whole number" if names else "a whole number"
        raise Fault(f"found {shown(value)}, expected {allowed}", path)
    return value


def _may_be_whole(value: Any, members: Sequence[Any]) -> bool:
    """Whether a number is written as an integer of 64 bits: not 2.0, which would name a sweep's
    variant otherwise than 2.
    """
    if isinstance(value, str):
        return value in members or re.fullmatch(r"[-+]?[0-9_]{1,18}", value) is not None
    return not isinstance(value, float) and not (isinstance(value, int) and abs(value) >= 2**63)


def _members(annotation: Any) -> list[Any]:
    """The types of a union and the values of a Literal; of another annotation, itself."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _members(parts[0])
    if origin in (Union, types.UnionType):
        return [member for part in parts for member in _members(part)]
    return list(parts) if origin is Literal else [annotation]


def _entries(annotation: Any) -> list[Any]:
    """The annotation of the entries, for each kind of list that an annotation allows."""
    lists = [one for one in _members(annotation) if get_origin(one) in (tuple, list)]
    return [get_args(one)[0] for one in lists]


def _is_choice(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Choice)


def _has_settings(kind: Any) -> bool:
    settings = getattr(kind, "Settings", None)
    return isinstance(kind, type) and isinstance(settings, type) and issubclass(settings, Settings)


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`overlay` over `base`: mappings merge key by key, anything else is replaced.

    Over a list of named entries, as `evaluation.adapters` is, a mapping changes the entries of
    those names; null takes one out, an unknown name is appended.
    """
    merged = dict(base)
    for key, value in overlay.items():
        before = merged.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            is_other_class = set(value) != set(before) and any(map(_names_class, (value, before)))
            merged[key] = value if is_other_class else merge(before, value)
        elif isinstance(value, Mapping) and is_named_list(before):
            merged[key] = merge_named(before, value)
        else:
            merged[key] = value
    return merged


def _names_class(value: Mapping[str, Any]) -> bool:
    """Whether a mapping is `{"module:Name": {settings}}`."""
    return len(value) == 1 and ":" in str(next(iter(value)))


def is_named_list(value: Any) -> bool:
    """Whether a list has entries of the form `name` or `{name: {settings}}` only."""
    return isinstance(value, list | tuple) and all(
        isinstance(one, str) or (isinstance(one, Mapping) and len(one) == 1) for one in value
    )


def merge_named(entries: Sequence[Any], overlay: Mapping[str, Any]) -> list[Any]:
    """A list of named entries with the changes of a mapping; null takes one out."""
    named = {}
    for entry in entries:
        ((name, settings),) = [(entry, {})] if isinstance(entry, str) else entry.items()
        named[name] = {} if settings in NULL else settings
    for name, changes in overlay.items():
        if changes in NULL:
            named.pop(name, None)
        elif isinstance(changes, Mapping) and isinstance(named.get(name, {}), Mapping):
            named[name] = merge(named.get(name, {}), changes)
        else:
            named[name] = changes
    return [{name: settings} for name, settings in named.items()]
