"""Settings classes: each section's keys, defaults and ranges, beside the code that they configure.

A section of the config is a subclass of `Settings`, from Python as from a file:

    SlotSettings(l2=3.0)

A string under a field is its description; from the classes come the JSON schema and the reference
page of the config. Faults are told in one line: the key's path, what was found, what is allowed.
"""

import datetime
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializeAsAny,
    ValidationError,
    model_serializer,
    model_validator,
)

from fairway.errors import UserError
from fairway.plugins import did_you_mean, label, load


class Fault(ValueError):
    """A fault of a section or a choice, told without its path, which `explain` puts before it."""


class _Within(ValueError):
    """Faults of the settings inside a choice."""

    def __init__(self, name: str, error: ValidationError) -> None:
        super().__init__(name)
        self.name, self.error = name, error


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
        unknown = sorted(str(key) for key in values if key not in cls.model_fields)
        if unknown:
            known = list(cls.model_fields)
            raise Fault(
                f"unknown key {', '.join(unknown)}{did_you_mean(unknown[0], known)}; "
                f"allowed: {', '.join(known) or 'none'}"
            )
        return {
            key: _meant(value, cls.model_fields[key].annotation) for key, value in values.items()
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
            raise Fault(f"found {value!r}, expected a name or {{name: {{its settings}}}}")
        ((name, settings),) = value.items()
        if not isinstance(name, str):
            raise Fault(f"found the name {name!r}, expected text")
        if isinstance(settings, Settings):
            return {"name": name, "settings": settings}
        try:
            kind = load(name, cls.package)
        except UserError as error:
            raise Fault(str(error)) from None
        if not _has_settings(kind):
            raise Fault(f"{name!r} is no class with a nested `Settings(fairway.settings.Settings)`")
        try:
            return {"name": name, "settings": kind.Settings.model_validate(settings or {})}
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
        """Its name in columns and figures."""
        return label(self.name)


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
    place = [*path, *first["loc"]]
    if isinstance(cause, _Within):
        before = place[:-1] if place and isinstance(place[-1], int) else place
        return explain(cause.error, (*before, cause.name))
    if isinstance(cause, Fault):
        return f"{_dotted(place)}: {cause}"
    if first["type"] == "missing":
        return f"{_dotted(place[:-1])}: missing key {place[-1]}"
    # The members of a union each have a fault of their own, one level further down.
    same = [first, *(one for one in others if one["input"] is first["input"])]
    if len(same) > 1:
        depth = min(len(one["loc"]) for one in same)
        place = [*path, *first["loc"][: depth - 1]]
    allowed = " or ".join(dict.fromkeys(map(_allowed, same)))
    return f"{_dotted(place)}: found {first['input']!r}, expected {allowed}"


def _dotted(place: Iterable[str | int]) -> str:
    return ".".join(map(str, place)) or "config"


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


def _meant(value: Any, annotation: Any) -> Any:
    """A field's value as it was written, where YAML 1.1 or `--config` gave it another type."""
    members = _members(annotation)
    if isinstance(value, list | tuple):
        entries = _entries(annotation)
        return [_meant(one, entries[0]) for one in value] if entries else value
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, bool) and bool not in members and Any not in members:
        # YAML reads on and off as booleans; as numbers they would be 1 and 0 without a word.
        is_switch = "on" in members and "off" in members
        return ("off", "on")[value] if is_switch else str(value).lower()
    if value in ("null", "~") and type(None) in members:
        return None
    return value


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
        named[name] = settings or {}
    for name, changes in overlay.items():
        if changes in (None, "null"):
            named.pop(name, None)
        elif isinstance(changes, Mapping):
            named[name] = merge(named.get(name, {}), changes)
        else:
            named[name] = changes
    return [{name: settings} for name, settings in named.items()]
