"""What follows from the code: schema and reference pages are up to date, and say all."""

import json
import runpy
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from fairway.metrics import METRICS, Metrics
from fairway.plugins import built_in_names, load
from fairway.recipe import SECTIONS, RunSettings, section_class
from fairway.settings import Choice, Settings, merge
from tiny import ROOT, TINY_CONFIG

GENERATE = ROOT / "docs/generate.py"
SCHEMA = ROOT / "workflow/schemas/config.schema.json"
FILES = runpy.run_path(str(GENERATE))["generated_files"]()
SHIPPED = [ROOT / "config.yaml", *sorted((ROOT / "config").glob("*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_generated_files_are_up_to_date(path):
    assert path.read_text(encoding="utf-8") == FILES[path], "run `python docs/generate.py`"


# The schema, for editors


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    loaded = json.loads(SCHEMA.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(loaded)
    return Draft202012Validator(loaded)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_schema_accepts_what_is_shipped(schema, path):
    schema.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"variants": "all"},
        {"variants": ["causal"]},
        {"variants": {"causal": None, "own": {"train": {"max_steps": 3}}}},
        {"sweep": {"ttt.epochs": [1, 2]}},
        {"evaluation": {"adapters": {"slot": {"l2": 3}, "lora": None}}},
        {"evaluation": {"adapters": ["lora", {"my_cache:Cache": {"weight": 1}}, {"slot": None}]}},
        {"gptq": {"quantizer": {"mine:Quantizer": {}}}},
        {"data": {"source": "mine:Corpus"}},
        {"report": {"baseline": {"name": "PR 1", "losses": [1.9]}}},
    ],
    ids=str,
)
def test_the_schema_accepts_every_form_of_a_config(schema, changes):
    schema.validate(merge(TINY_CONFIG, changes))


@pytest.mark.parametrize(
    "values",
    [
        {"trian": {}},
        {"train": {"max_stps": 1}},
        {"train": {"max_steps": 0}},
        {"train": {"max_steps": "many"}},
        {"ema": {"kind": "average"}},
        {"seeds": [-1]},
        {"evaluation": {"adapters": ["lroa"]}},
        {"evaluation": {"adapters": [{"slot": {"l3": 1}}]}},
        {"evaluation": {"adapters": [{"slot": {}, "lora": {}}]}},
        {"variants": {"own": {"report": {}}}},
        {"variants": {"own": {"ttt": {"epochs": 0}}}},
        {"report": {"baseline": {"name": "PR 1"}}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_validation_refuses(schema, values):
    assert not schema.is_valid(values)


def test_the_schema_has_every_section():
    properties = json.loads(SCHEMA.read_text(encoding="utf-8"))["properties"]
    assert set(properties) == {*RunSettings.model_fields, *SECTIONS}


# Descriptions


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def documented() -> list[type[BaseModel]]:
    """Every class of settings and metrics of the library; classes of choices are loaded first."""
    for name in SECTIONS:
        section_class(name)
    for choice in subclasses(Choice) - {Choice}:
        if choice.package.startswith("fairway."):
            for name in built_in_names(choice.package):
                load(name, choice.package)
    found = subclasses(Settings) | subclasses(Metrics)
    own = [kind for kind in found if kind.__module__.startswith("fairway.")]
    return sorted(own, key=lambda kind: kind.__qualname__)


@pytest.mark.parametrize("kind", documented(), ids=lambda kind: kind.__qualname__)
def test_every_key_says_what_it_is(kind):
    said = {name: field.description or "" for name, field in kind.model_fields.items()}
    unclear = [name for name, text in said.items() if not text.endswith((".", ")"))]
    assert not unclear, f"{kind.__module__}.{kind.__qualname__}"


def test_every_choice_says_its_name_for_people():
    for choice in subclasses(Choice) - {Choice}:
        if choice.package.startswith("fairway."):
            for name in built_in_names(choice.package):
                assert load(name, choice.package).title


def test_the_pages_name_every_key():
    pages = {path.name: path.read_text(encoding="utf-8") for path in map(Path, FILES)}
    for kind in map(section_class, SECTIONS):
        for name in kind.model_fields:
            assert f"| `{name}` |" in pages["config.md"]
    for kind in METRICS.values():
        for name in kind.model_fields:
            assert f"| `{name}` |" in pages["metrics.md"]
