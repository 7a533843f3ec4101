"""Settings classes: values as they were meant, faults in one line, choices of classes by name."""

import datetime
import importlib
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from fairway import plugins
from fairway.errors import UserError
from fairway.evaluation.settings import EvaluationSettings
from fairway.settings import Choice, Settings, is_named_list, merge_named, validated


class Inner(Settings):
    width: int = Field(2, ge=1)
    """Of something."""


class Outer(Settings):
    number: float = Field(1.0, gt=0, lt=8)
    """A number."""
    switch: Literal["auto", "on", "off"] = "auto"
    """A switch."""
    is_set: bool = False
    """A flag."""
    name: str = Field("x", min_length=2)
    """A name."""
    limit: Annotated[float, Field(ge=0)] | None = 1.0
    """A limit, or none."""
    entries: tuple[Annotated[int, Field(ge=0)], ...] = Field((1,), min_length=1, max_length=2)
    """Numbers."""
    switches: tuple[Literal["on", "off"], ...] = ()
    """Switches."""
    anything: tuple[Any, ...] = ()
    """Anything."""
    inner: Inner = Inner()
    """Settings inside."""

    @model_validator(mode="after")
    def _check(self) -> "Outer":
        if self.number == 7:
            raise UserError(f"outer.number {self.number} is unlucky")
        return self


def made(**values) -> Outer:
    """With a name: the default one breaks its own rule."""
    return validated(Outer, {"name": "xy", **values}, "outer")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"switch": True}, {"switch": "on"}),
        ({"switch": False}, {"switch": "off"}),
        ({"switch": "on"}, {"switch": "on"}),
        ({"switches": [True, "off", False]}, {"switches": ("on", "off", "off")}),
        ({"is_set": True}, {"is_set": True}),
        ({"name": datetime.date(2026, 11, 24)}, {"name": "2026-11-24"}),
        ({"name": 8317}, {"name": "8317"}),
        ({"name": "010"}, {"name": "010"}),
        ({"entries": ["010"]}, {"entries": (10,)}),
        ({"name": True}, {"name": "true"}),
        ({"name": "null"}, {"name": "null"}),
        ({"limit": "null"}, {"limit": None}),
        ({"limit": "~"}, {"limit": None}),
        ({"limit": "1e-3"}, {"limit": 0.001}),
        ({"number": "1e-3"}, {"number": 0.001}),
        ({"number": 3}, {"number": 3.0}),
        ({"anything": [True, None, "null", 1.5]}, {"anything": (True, None, "null", 1.5)}),
    ],
    ids=str,
)
def test_values_are_read_as_they_were_meant(values, expected):
    found = made(**values)
    assert {name: getattr(found, name) for name in expected} == expected
    assert all(type(getattr(found, name)) is type(expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"entries": [2.0]}, "outer.entries.0: found 2.0, expected a whole number"),
        ({"entries": ["2.0"]}, "outer.entries.0: found '2.0', expected a whole number"),
        (
            {"entries": [2**63]},
            "outer.entries.0: found 9223372036854775808, expected a whole number",
        ),
        ({"name": 1.50}, "outer.name: found the number 1.5, expected text: quote it"),
        ({"inner": {"width": 2.0}}, "outer.inner.width: found 2.0, expected a whole number"),
        ({"nummer": 1}, "outer: unknown key nummer; did you mean number?; allowed: number, switch"),
        ({"number": True}, "outer.number: found 'true', expected a number"),
        ({"entries": [1, True]}, "outer.entries.1: found 'true', expected a whole number"),
        ({"number": 8}, "outer.number: found 8, expected less than 8"),
        ({"number": 0}, "outer.number: found 0, expected more than 0"),
        ({"number": float("inf")}, "outer.number: found inf, expected a finite number"),
        ({"number": 7}, "outer.number 7.0 is unlucky"),
        ({"is_set": "perhaps"}, "outer.is_set: found 'perhaps', expected true or false"),
        ({"name": "a"}, "outer.name: found 'a', expected text of at least 2 characters"),
        ({"entries": []}, "outer.entries: found [], expected a list of at least 1"),
        ({"entries": [1, 2, 3]}, "outer.entries: found [1, 2, 3], expected a list of at most 2"),
        ({"entries": [-1]}, "outer.entries.0: found -1, expected at least 0"),
        ({"limit": "soon"}, "outer.limit: found 'soon', expected a number"),
        ({"limit": -1}, "outer.limit: found -1, expected at least 0"),
        ({"inner": 3}, "outer.inner: found 3, expected a mapping of keys"),
        ({"inner": {"width": 0}}, "outer.inner.width: found 0, expected at least 1"),
        ({"inner": {"height": 0}}, "outer.inner: unknown key height; allowed: width"),
        ({"switch": 1}, "outer.switch: found 1, expected one of auto, on, off"),
    ],
    ids=str,
)
def test_faults_are_told_in_one_line(values, message):
    with pytest.raises(UserError) as error:
        made(**values)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_keys_that_are_no_text_are_named():
    with pytest.raises(UserError, match="outer: unknown key 3; allowed: number, switch"):
        validated(Outer, {"name": "xy", 3: 1}, "outer")


def test_defaults_are_held_to_the_rules_too():
    with pytest.raises(UserError, match="outer.name: found 'x', expected text of at least 2"):
        validated(Outer, {}, "outer")


def test_settings_are_immutable_and_changed_ones_are_validated():
    settings = made()
    with pytest.raises(ValidationError):
        settings.number = 2.0
    assert settings.changed(number=2).number == 2.0
    assert settings.number == 1.0
    with pytest.raises(ValidationError):
        settings.changed(number=9)


def test_a_section_is_usable_from_python():
    settings = EvaluationSettings(
        adapters=[
            "ngram",
        ],
        lanes=8,
    )
    assert settings.labels == ["ngram"]
    assert settings.changed(adapters=()).labels == []
    assert EvaluationSettings.model_validate(settings.as_read()) == settings


# Choices

MODULE = '''
from fairway.settings import Settings


class Cache:
    title = "My cache"

    class Settings(Settings):
        weight: float = 0.1
        """Of the cache."""


class Inherits(Cache):
    title = "Its child"


class Bare:
    pass


def function():
    pass
'''


class Adapter(Choice):
    package = "fairway.evaluation.adapters"


class Named(Settings):
    one: Adapter = Adapter.model_validate("lora")
    """One."""
    several: tuple[Adapter, ...] = ()
    """Several."""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "choices_of_tests.py").write_text(MODULE)
    (tmp_path / "raising_choice.py").write_text("x = 1\n\nraise ValueError('two\\nlines')\n")
    (tmp_path / "broken_choice.py").write_text("def broken(:\n    pass\n")
    (tmp_path / "needing_choice.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "leaving_choice.py").write_text("import sys\nprint('so long')\nsys.exit(0)\n")
    (tmp_path / "long_choice.py").write_text("raise ImportError('x\\n' * 10_000)\n")
    (tmp_path / "folder_choice").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return "choices_of_tests"


def test_a_choice_is_a_name_or_a_name_with_settings(own_module):
    for form in ("slot", {"slot": {}}, {"slot": None}):
        choice = validated(Named, {"one": form}).one
        assert (choice.name, choice.label, choice.settings.l2) == ("slot", "slot", 14.0)
    own = validated(Named, {"one": {f"{own_module}:Cache": {"weight": 3}}}).one
    assert (own.label, own.settings.weight, own.type.title) == ("cache", 3.0, "My cache")
    child = validated(Named, {"one": f"{own_module}:Inherits"}).one
    assert (child.label, child.settings.weight) == ("inherits", 0.1)


def test_a_choice_is_written_as_it_may_be_read(own_module):
    named = validated(Named, {"several": ["slot", f"{own_module}:Cache"]})
    written = named.model_dump(mode="json")
    assert written["several"][1] == {f"{own_module}:Cache": {"weight": 0.1}}
    assert validated(Named, written) == named


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("lroa", "one: found 'lroa', expected one of lora, ngram, slot, or module:Name of your "
                 "own; did you mean lora?"),
        ("", "one: found '', expected one of lora"),
        ("../lora", "one: found '../lora', expected one of lora"),
        ("base", "one: found 'base', expected one of lora"),
        ("fit.lbfgs", "one: found 'fit.lbfgs', expected one of lora"),
        ("no_such:Cache", "one: 'no_such:Cache' could not be imported: No module named 'no_such'"),
        ("no_such:Cache", "put it beside the config"),
        ("choices_of_tests:", "one: found 'choices_of_tests:', expected a name or module:Name"),
        (":Cache", "one: found ':Cache', expected a name or module:Name"),
        ("choices_of_tests:Cash", "choices_of_tests has no class Cash"),
        ("choices_of_tests:Bare", "one: 'choices_of_tests:Bare' is no class with a nested"),
        ("choices_of_tests:function", "one: 'choices_of_tests:function' is no class"),
        ("raising_choice:X", "could not be imported: ValueError: two lines ("),
        ("raising_choice:X", "raising_choice.py, line 3)"),
        ("broken_choice:X", "could not be imported: SyntaxError: "),
        ("needing_choice:X", "No module named 'a_module_that_is_not_there'"),
        ("leaving_choice:X", "'leaving_choice:X' could not be imported: SystemExit: 0 ("),
        ("long_choice:X", "'long_choice:X' could not be imported: ImportError: x x x"),
        ("folder_choice:X", "'folder_choice:X': folder_choice has no class X"),
        ("choices_of_tests:Cache\n", "one: found 'choices_of_tests:Cache\\n', expected a name or"),
        ("..choices:Cache", "one: found '..choices:Cache', expected a name or module:Name"),
        ("a/b:C", "one: found 'a/b:C', expected a name or module:Name"),
        ("a\0b:C", "one: found 'a\\x00b:C', expected a name or module:Name"),
        ("a:b:C", "one: found 'a:b:C', expected a name or module:Name"),
        ("x" * 10_000 + ":X", "one: 'xxxx"),
        (3, "one: found 3, expected a name or {name: {its settings}}"),
        ([], "one: found [], expected a name"),
        ({}, "one: found {}, expected a name"),
        ({3: {}}, "one: found the name 3, expected text"),
        ({"lora": {}, "slot": {}}, "expected a name or {name: {its settings}}"),
        ({"slot": 3}, "one.slot: found 3, expected a mapping of keys"),
        ({"slot": {"l3": 1}}, "one.slot: unknown key l3; allowed: scope"),
        ({"slot": {"l2": -1}}, "one.slot.l2: found -1, expected at least 0"),
        ({"choices_of_tests:Cache": {"weight": "x"}},
         "one.choices_of_tests:Cache.weight: found 'x', expected a number"),
    ],
    ids=str,
)  # fmt: skip
def test_a_choice_that_cannot_be_is_told_in_one_line(own_module, form, message):
    with pytest.raises(UserError) as error:
        validated(Named, {"one": form})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    with pytest.raises(UserError) as error:
        validated(Named, {"several": ["slot", form]})
    assert "\n" not in str(error.value) and str(error.value).startswith("several.")


# Named lists


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([], True),
        (["lora", {"slot": {}}], True),
        (("lora",), True),
        ([{"a": 1, "b": 2}], False),
        ([3], False),
        ("lora", False),
        (None, False),
    ],
)
def test_what_a_named_list_is(value, named):
    assert is_named_list(value) is named


def test_a_mapping_over_a_named_list():
    entries = ["lora", {"slot": {"l2": 3.0, "clamp": 2.0}}, {"ngram": None}]
    assert merge_named(entries, {}) == [{"lora": {}}, entries[1], {"ngram": {}}]
    assert merge_named(entries, {"slot": {"l2": 1.0}, "lora": None, "own": {"x": 1}}) == [
        {"slot": {"l2": 1.0, "clamp": 2.0}},
        {"ngram": {}},
        {"own": {"x": 1}},
    ]
    assert merge_named(entries, {"lora": "null", "nobody": None, "ngram": "null"}) == [entries[1]]
    assert merge_named(["lora"], {"lora": 3}) == [{"lora": 3}]  # for validation to refuse


# Plugins


def test_the_file_of_a_class_is_found_without_importing_it(own_module, tmp_path):
    package = "fairway.evaluation.adapters"
    assert plugins.source_file("raising_choice:X", package) == tmp_path / "raising_choice.py"
    assert plugins.source_file("slot", package).name == "slot.py"
    for name in ("no_such:Cache", "no.such:Cache"):
        with pytest.raises(UserError, match="no module no.such; run in the folder"):
            plugins.source_file(name, package)
    assert plugins.built_in_names(package) == ["lora", "ngram", "slot"]


@pytest.mark.parametrize(
    ("name", "hint"), [("epoch", "; did you mean epochs?"), ("zebra", ""), ("", "")]
)
def test_the_nearest_known_name_is_offered(name, hint):
    assert plugins.did_you_mean(name, ["epochs", "data"]) == hint
