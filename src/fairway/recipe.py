"""Recipes: YAML read, merged, validated, expanded into variants, and cut into what a stage may see.

A config says `run`, `recipe`, `seeds` and `variants`. The recipe, `config/<recipe>.yaml` or a YAML
file of the user's, holds the sections over the library's defaults; sections in the config go over
the recipe's. A variant changes any section; `sweep` makes variants of every combination of values.
"""

import copy
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import Field, ValidationInfo, field_validator

from fairway.errors import UserError
from fairway.plugins import did_you_mean, load, search_beside, source_file
from fairway.settings import Choice, Settings, list_defaults, merge, validated
from fairway.stages import SHARED, STAGES, Stage, chain, stages_per

SECTIONS = {
    "data": "fairway.data.settings:DataSettings",
    "model": "fairway.model.spec:ModelSettings",
    "train": "fairway.training.trainer:TrainSettings",
    "ema": "fairway.training.selection:EMASettings",
    "ttt": "fairway.training.ttt:TTTSettings",
    "gptq": "fairway.quantization.settings:QuantizationSettings",
    "evaluation": "fairway.evaluation.settings:EvaluationSettings",
    "audit": "fairway.audit.runner:AuditSettings",
    "budgets": "fairway.stages:Budgets",
    "report": "fairway.report.settings:ReportSettings",
    "runtime": "fairway.model.settings:RuntimeSettings",
}
"""The class of each section, by name because the classes lie in packages above this module."""

VARIED = tuple(name for name in SECTIONS if name != "report")
"""A variant may change these: one report shows all variants."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
RECIPE_FOLDER = Path("config")
DEFAULT_VARIANTS: dict[str, dict] = {"causal": {}}


class RunSettings(Settings):
    """What a config says beside the sections."""

    run: str | None = Field(None, pattern=NAME)
    """Folder under `results`; null: the recipe's name."""
    recipe: str | None = None
    """`config/<recipe>.yaml`, or the path of a YAML file; null: the library's defaults."""
    results: str = Field("results", min_length=1)
    """Folder of all products."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(min_length=1)
    """Each is a training run of its own."""
    variants: str | tuple[str, ...] | dict[str, Any] = "all"
    """`all` of the recipe's, a list of some, or a mapping: its entries add or replace a variant of
    that name, null drops it."""
    sweep: dict[str, tuple[Any, ...]] = Field({})
    """`section.key: [values]`: every variant once for each combination of values."""

    @field_validator("run", "recipe", "results", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, float):  # 1.50 would be 1.5
            raise UserError(f"{info.field_name}: found the number {value}, expected text: quote it")
        return value

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise UserError(f"seeds: found {list(seeds)}, expected each once")
        return seeds


@dataclass(frozen=True)
class Variant:
    """One variant of a run. parts: names and changes, of the variant itself and of each sweep's."""

    name: str
    parts: tuple[tuple[str, Mapping[str, Any]], ...]
    sections: Mapping[str, Settings]


@dataclass(frozen=True)
class Config:
    """A whole config, validated; every variant has its own view of the sections."""

    run: str
    results: str
    seeds: tuple[int, ...]
    variants: Mapping[str, Variant]
    base: Mapping[str, Any]
    """The sections before any variant's changes, as plain values."""

    def sections(self, variant: str) -> Mapping[str, Settings]:
        """The sections as `variant` sees them; UserError where there is no such variant."""
        if variant not in self.variants:
            raise UserError(
                f"no variant {variant!r}: the config has {', '.join(self.variants)}"
                f"{did_you_mean(variant, self.variants)}"
            )
        return self.variants[variant].sections

    def stage_settings(self, stage: str, variant: str | None = None) -> dict[str, Any]:
        """What `stage` may read, as plain values; variant None: the first."""
        return cut(self.sections(variant or next(iter(self.variants))), STAGES[stage])

    @cached_property
    def folders(self) -> dict[str, dict[str, str]]:
        """Variant → stage → the folder under `seed-<s>` that holds the stage's products for it.

        Stages whose settings, and those of all that they build on, agree are run once. What a
        variant leaves as the recipe has it lies in `shared`; the rest under the names of those of
        its parts that reach the stage, or of the first variant with the same settings.
        """
        owners: dict[tuple[str, str], str] = {}
        found: dict[str, dict[str, str]] = {}
        for variant in self.variants.values():
            found[variant.name] = {}
            named = self._by_folder_name(variant)
            for stage in stages_per("variant"):
                settings = self._chain_settings(variant.sections, stage.name)
                if (stage.name, settings) not in owners:
                    owners[stage.name, settings] = next(
                        name
                        for name, sections in named
                        if self._chain_settings(sections, stage.name) == settings
                    )
                found[variant.name][stage.name] = owners[stage.name, settings]
        self._check_folders(owners)
        return found

    def dataset(self, variant: str) -> str:
        """The name of the variant's dataset, its folder under `<results>/data`."""
        return self.sections(variant)["data"].name

    def _by_folder_name(self, variant: Variant) -> list[tuple[str, Mapping[str, Settings]]]:
        """The sections with some of a variant's parts, fewest first, by those parts' names."""
        named = []
        for count in range(len(variant.parts) + 1):
            for kept in itertools.combinations(variant.parts, count):
                try:
                    sections = sections_of(_changed(self.base, [part for _, part in kept]))
                except UserError:  # these parts need the others
                    continue
                named.append(("-".join(name for name, _ in kept) or SHARED, sections))
        return named

    @staticmethod
    def _chain_settings(sections: Mapping[str, Settings], stage: str) -> str:
        """All that decides the stage's products, as canonical JSON."""
        return canonical({one.name: cut(sections, one) for one in chain(stage)})

    @staticmethod
    def _check_folders(owners: Mapping[tuple[str, str], str]) -> None:
        taken: set[tuple[str, str]] = set()
        for (stage, _), folder in owners.items():
            if (stage, folder) in taken:
                raise UserError(f"two variants would share {folder}/{stage}: rename one of them")
            taken.add((stage, folder))


def canonical(value: Any) -> str:
    """JSON that does not depend on the order of keys."""
    return json.dumps(value, sort_keys=True)


def cut(sections: Mapping[str, Settings], stage: Stage) -> dict[str, Any]:
    """The sections, or single keys of them, that `stage` may read, as plain values."""
    settings: dict[str, Any] = {}
    for name in stage.sections:
        section, _, key = name.partition(".")
        values = sections[section].as_read()
        settings[section] = {key: values[key]} if key else values
    return settings


def sections_of(settings: Mapping[str, Any]) -> dict[str, Settings]:
    """A stage's plain settings as objects; keys that it may not read have their defaults."""
    return {name: validated(section_class(name), settings[name], name) for name in settings}


def section_class(name: str) -> type[Settings]:
    """The settings class of a section."""
    return load(SECTIONS[name], "fairway")


def plugin_files(stage: str, settings: Mapping[str, Any]) -> list[Path]:
    """The source files of the classes that a stage's plain settings name and that it runs."""
    choices = [one for section in sections_of(settings).values() for one in _choices(section)]
    unused = STAGES[stage].names_only
    run = [one for one in choices if ":" in one.name or one.package not in unused]
    return sorted({source_file(one.name, one.package) for one in run})


def load_config(paths: Iterable[str | Path]) -> Config:
    """Read YAML files, merge each over the ones before it, and complete them.

    Modules beside the files are found as plugins. Raises UserError naming the file, or the key's
    path with what it allows.
    """
    paths = [Path(path) for path in paths]
    search_beside(path.resolve().parent for path in paths)
    return complete(read_files(paths))


def read_files(paths: Iterable[str | Path]) -> dict[str, Any]:
    """YAML files as plain values, each merged over the ones before it."""
    values: dict[str, Any] = {}
    for path in paths:
        values = merge(values, read_yaml(path))
    return values


def typed_values(arguments: Iterable[str]) -> dict[str, Any]:
    """`key=value` arguments as plain values, in which every scalar is the text that was typed."""
    values: dict[str, Any] = {}
    for key, _, text in (argument.partition("=") for argument in arguments):
        text = text.strip("'\"")
        try:
            value = yaml.load(text, yaml.BaseLoader)
        except yaml.YAMLError:
            value = text
        values = merge(values, {key: value})
    return values


class _Loader(yaml.SafeLoader):
    """Reads 2023_11, 010 and 2026-11-24 as text, where YAML 1.1 has 202311, 8 and a date."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
    ("merge", r"<<$", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping; UserError where it is missing, no YAML, or no mapping."""
    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} could not be read: {reason}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds {type(loaded).__name__}, expected a mapping of keys")
    return loaded


def complete(values: Mapping[str, Any], home: Path | None = None) -> Config:
    """Lay `values` over their recipe, expand the variants, and validate all.

    home: where `config/<recipe>.yaml` lies; the working directory, then the checkout by default.
    """
    known = [*RunSettings.model_fields, *SECTIONS]
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise UserError(
            f"config: unknown key {', '.join(unknown)}{did_you_mean(unknown[0], known)}; "
            f"allowed: {', '.join(known)}"
        )
    own = {key: value for key, value in values.items() if key in RunSettings.model_fields}
    settings = validated(RunSettings, own)
    recipe = read_recipe(settings.recipe, home)
    offered = recipe.pop("variants", DEFAULT_VARIANTS)
    overlay = {key: value for key, value in values.items() if key in SECTIONS}
    defaults = {name: list_defaults(section_class(name)) for name in SECTIONS}
    base = merge(merge(defaults, recipe), overlay)
    variants = {}
    for name, parts in _expanded(_chosen(settings.variants, offered), settings.sweep).items():
        try:
            changed = _changed(base, [changes for _, changes in parts])
            variants[name] = Variant(name, parts, _validated_sections(changed))
        except UserError as error:
            prefix = f"variants.{name}: " if any(changes for _, changes in parts) else ""
            raise UserError(f"{prefix}{error}") from None
    _check_datasets(variants)
    name = settings.run or (Path(settings.recipe).stem if settings.recipe else "run")
    if not re.fullmatch(NAME, name):
        raise UserError(f"run: the recipe's name {name!r} is no name of a folder: set run")
    return Config(name, settings.results, settings.seeds, variants, base)


def read_recipe(name: str | None, home: Path | None = None) -> dict[str, Any]:
    """A recipe's sections and its `variants`; UserError where there is none of that name."""
    if name is None:
        return {}
    path = _recipe_path(name, home)
    recipe = read_yaml(path)
    said = recipe.pop("recipe", path.stem)
    if said != path.stem:
        raise UserError(f"{path} says recipe {said!r}, expected its own name, {path.stem!r}")
    if not isinstance(recipe.get("variants", {}), Mapping):
        raise UserError(
            f"{path}: variants: found {recipe['variants']!r}, expected a mapping of names"
        )
    foreign = sorted(set(map(str, recipe)) - {"variants", *SECTIONS})
    if foreign:
        allowed = ["recipe", "variants", *SECTIONS]
        raise UserError(
            f"{path}: unknown key {', '.join(foreign)}{did_you_mean(foreign[0], allowed)}; "
            f"a recipe has {', '.join(allowed)}"
        )
    return recipe


def _recipe_path(name: str, home: Path | None) -> Path:
    checkout = Path(__file__).resolve().parents[2]
    folders = [folder / RECIPE_FOLDER for folder in (Path(), *([home] if home else []), checkout)]
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise UserError(
        f"recipe: found {name!r}, expected one of {', '.join(names)}, or the path of a YAML file"
        f"{did_you_mean(name, names)}"
    )


def _chosen(
    wanted: str | tuple[str, ...] | Mapping[str, Any], offered: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """The variants that run, by name with their changes, before any sweep."""
    if wanted == "all":
        wanted = tuple(offered)
    if isinstance(wanted, str):
        wanted = (wanted,)
    if isinstance(wanted, Mapping):
        named = {**offered, **wanted}
        chosen = {name: one for name, one in named.items() if one not in (None, "null")}
    else:
        missing = [name for name in wanted if name not in offered]
        if missing:
            raise UserError(
                f"variants: found {missing[0]!r}, expected one of the recipe's, "
                f"{', '.join(offered)}{did_you_mean(missing[0], offered)}"
            )
        chosen = {name: offered[name] for name in wanted}
    if not chosen:
        raise UserError("variants: none is left, expected at least one")
    for name, changes in chosen.items():
        _check_variant(name, changes)
    return chosen


def _check_variant(name: str, changes: Any) -> None:
    if not re.fullmatch(NAME, name) or name == SHARED:
        raise UserError(
            f"variants: found the name {name!r}, expected text matching {NAME}, and not {SHARED!r}"
        )
    if not isinstance(changes, Mapping):
        raise UserError(f"variants.{name}: found {changes!r}, expected a mapping of sections")
    unknown = [section for section in changes if section not in VARIED]
    if unknown:
        raise UserError(
            f"variants.{name}: unknown key {unknown[0]}{did_you_mean(str(unknown[0]), VARIED)}; "
            f"allowed: {', '.join(VARIED)}"
        )


def _expanded(
    chosen: Mapping[str, Mapping[str, Any]], sweep: Mapping[str, Sequence[Any]]
) -> dict[str, tuple[tuple[str, Mapping[str, Any]], ...]]:
    """Every variant with every combination of the sweep's values, as the parts of its name."""
    axes = []
    for path, values in sweep.items():
        section, *keys = path.split(".")
        if section not in VARIED:
            raise UserError(
                f"sweep: found {path}, expected one of the sections {', '.join(VARIED)}"
                f"{did_you_mean(section, VARIED)}"
            )
        if not keys or not values:
            raise UserError(f"sweep: found {path}: {list(values)}, expected section.key: [values]")
        axes.append([(_part_name(keys[-1], value), _nested(path, value)) for value in values])
    expanded = {}
    for name, changes in chosen.items():
        for combination in itertools.product(*axes):
            full = "-".join((name, *(part for part, _ in combination)))
            if full in expanded:
                raise UserError(f"sweep: two variants would be named {full}: give other values")
            expanded[full] = ((name, changes), *combination)
    return expanded


def _part_name(key: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^A-Za-z0-9_.]+", "_", f"{key}_{text}").strip("_")


def _nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _changed(base: Mapping[str, Any], changes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    changed = copy.deepcopy(dict(base))
    for one in changes:
        changed = merge(changed, one)
    return changed


def _validated_sections(values: Mapping[str, Any]) -> dict[str, Settings]:
    sections = sections_of(values)
    for section in sections.values():
        section.check_with(sections)
    return sections


def _check_datasets(variants: Mapping[str, Variant]) -> None:
    """Datasets are shared by name, so one name must not stand for two of them."""
    known: dict[str, Settings] = {}
    for variant in variants.values():
        data = variant.sections["data"]
        if known.setdefault(data.name, data) != data:
            raise UserError(
                f"variants.{variant.name} changes `data` but not data.name {data.name!r}: give its "
                "dataset a name of its own"
            )


def _choices(value: Any) -> list[Choice]:
    """Every choice of a class in a section."""
    if isinstance(value, Choice):
        return [value, *_choices(value.settings)]
    if isinstance(value, Settings):
        return [
            choice for name in type(value).model_fields for choice in _choices(getattr(value, name))
        ]
    if isinstance(value, tuple | list):
        return [choice for one in value for choice in _choices(one)]
    return []
