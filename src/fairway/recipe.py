"""Recipes: YAML read, merged, validated, expanded into variants, and cut into what a stage may see.

A config says `run`, `recipe`, `seeds` and `variants`. The recipe, `config/<recipe>.yaml` or a YAML
file of the user's, holds the sections over the library's defaults; sections in the config go over
the recipe's. A variant changes any section; `sweep` makes variants of every combination of values.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from fairway.errors import UserError
from fairway.plain import check_plain, shown, word
from fairway.plugins import did_you_mean, load, search_beside, source_file
from fairway.settings import (
    NAMES,
    NULL,
    Choice,
    Name,
    PathText,
    Settings,
    is_name,
    list_defaults,
    merge,
    told_unknown,
    validated,
)
from fairway.stages import SHARED, STAGES, Stage, chain, stages_per
from fairway.yaml_text import read_yaml, typed_value

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
    "export": "fairway.export:ExportSettings",
    "runtime": "fairway.model.settings:RuntimeSettings",
    "gpus": "fairway.gpus:GpuSettings",
    "cluster": "fairway.cluster:ClusterSettings",
}
"""The class of each section, by name because the classes lie in packages above this module."""

VARIED = tuple(name for name in SECTIONS if name not in ("report", "gpus", "cluster"))
"""A variant may change these: one report shows all variants, on the same machines."""

RECIPE_FOLDER = Path("config")
RESERVED = ("data", "logs")
"""Folders under `results` that belong to no run."""
SEED_LIMIT = 2**32
MAXIMUM_RUNS = 2000
"""Seeds times variants: Snakemake makes a list of all their jobs at every start."""
MAXIMUM_SWEPT = 6
"""Keys of a sweep: names of folders are found among all subsets of them."""
MOST_NAMES = 12
"""Of more variants than these a message names the first ones."""
DEFAULT_VARIANTS: dict[str, dict] = {"causal": {}}


class RunSettings(Settings):
    """What a config says beside the sections."""

    run: Name | None = None
    """Folder under `results`; null: the recipe's name."""
    recipe: PathText | None = None
    """`config/<recipe>.yaml`, or the path of a YAML file; null: the library's defaults."""
    results: PathText = "results"
    """Folder of all products."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=SEED_LIMIT)], ...] = Field(min_length=1)
    """Each is a training run of its own."""
    variants: str | tuple[str, ...] | dict[str, Any] = "all"
    """`all` of the recipe's, a list of some, or a mapping: its entries add or replace a variant of
    that name, null drops it."""
    sweep: dict[str, tuple[Any, ...]] = Field({})
    """`section.key: [values]`: every variant once for each combination of values."""

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise UserError(f"seeds: found {shown(list(seeds))}, expected each once")
        return seeds


@dataclass(frozen=True, eq=False)
class Part:
    """Changes of the sections under a name: a variant's own, or those of one value of a sweep."""

    name: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One variant of a run. parts: its own changes, then those of the sweep's values."""

    name: str
    parts: tuple[Part, ...]
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
        return self.variants[known_variant(variant, self.variants)].sections

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
        settings_of = cache(self._chain_settings)
        for variant in self.variants.values():
            found[variant.name] = {}
            for stage in stages_per("variant", on_request=True):
                one = stage.name, settings_of(variant.parts)[stage.name]
                if one not in owners:
                    owners[one] = next(
                        "-".join(part.name for part in kept) or SHARED
                        for kept in _fewest_first(variant.parts)
                        if settings_of(kept).get(stage.name) == one[1]
                    )
                found[variant.name][stage.name] = owners[one]
        self._check_folders(owners)
        return found

    def dataset(self, variant: str) -> str:
        """The name of the variant's dataset, its folder under `<results>/data`."""
        return self.sections(variant)["data"].name

    def _chain_settings(self, parts: tuple[Part, ...]) -> dict[str, str]:
        """Stage → all that decides its products with these parts of a variant, as canonical JSON.

        Empty where these parts need the others.
        """
        try:
            sections = sections_of(_changed(self.base, parts))
        except UserError:
            return {}
        read = {name: canonical(cut(sections, stage)) for name, stage in STAGES.items()}
        return {name: "\n".join(read[one.name] for one in chain(name)) for name in STAGES}

    @staticmethod
    def _check_folders(owners: Mapping[tuple[str, str], str]) -> None:
        taken: set[tuple[str, str]] = set()
        for (stage, _), folder in owners.items():
            if (stage, folder.casefold()) in taken:
                raise UserError(
                    f"variants: two variants would share {folder}/{stage}: rename one of them"
                )
            taken.add((stage, folder.casefold()))


def first_names(variants: Sequence[str]) -> str:
    """Names for a message; of many the first ones."""
    return ", ".join(variants[:MOST_NAMES]) + (" …" if len(variants) > MOST_NAMES else "")


def known_variant(name: str, variants: Iterable[str], whose: str = "") -> str:
    """The name, where there is such a variant; else a UserError. whose: the key that has it."""
    variants = list(variants)
    if name not in variants:
        raise UserError(
            f"{whose}no variant {shown(name)}: the config has {first_names(variants)}"
            f"{did_you_mean(name, variants)}"
        )
    return name


def canonical(value: Any) -> str:
    """JSON that does not depend on the order of keys."""
    return json.dumps(value, sort_keys=True)


def cut(sections: Mapping[str, Settings], stage: Stage) -> dict[str, Any]:
    """The sections, or single keys of them, that `stage` may read, as plain values."""
    settings: dict[str, Any] = {}
    for name in stage.sections:
        section, _, key = name.partition(".")
        values = sections[section].as_read()
        read = {one: value for one, value in values.items() if key in ("", one)}
        settings.setdefault(section, {}).update(read)
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
    return reduce(merge, map(read_yaml, paths), {})


def typed_values(arguments: Iterable[str]) -> dict[str, Any]:
    """`key=value` arguments as plain values, in which every scalar is the text that was typed."""
    values: dict[str, Any] = {}
    for key, _, text in (argument.partition("=") for argument in arguments):
        typed = {key: typed_value(text)}
        check_plain(typed)
        values = merge(values, typed)
    return values


def complete(values: Mapping[str, Any], home: Path | None = None) -> Config:
    """Lay `values` over their recipe, expand the variants, and validate all.

    home: where `config/<recipe>.yaml` lies; the working directory, then the checkout by default.
    """
    check_plain(values)
    if unknown := told_unknown(values, [*RunSettings.model_fields, *SECTIONS]):
        raise UserError(f"config: {unknown}")
    own = {key: value for key, value in values.items() if key in RunSettings.model_fields}
    settings = validated(RunSettings, own)
    recipe = read_recipe(settings.recipe, home)
    offered = recipe.pop("variants", DEFAULT_VARIANTS)
    overlay = {key: value for key, value in values.items() if key in SECTIONS}
    defaults = {name: list_defaults(section_class(name)) for name in SECTIONS}
    base = merge(merge(defaults, recipe), overlay)
    variants = {}
    chosen = _chosen(settings.variants, offered)
    _check_count(len(settings.seeds) * len(chosen), settings.sweep)
    for name, parts in _expanded(chosen, settings.sweep).items():
        try:
            variants[name] = Variant(name, parts, _validated_sections(_changed(base, parts)))
        except UserError as error:
            prefix = f"variants.{name}: " if any(part.changes for part in parts) else ""
            raise UserError(f"{prefix}{error}") from None
    _check_datasets(variants)
    if against := next(iter(variants.values())).sections["report"].against:
        known_variant(against, variants, "report.against: ")
    name = settings.run or (Path(settings.recipe).stem if settings.recipe else "run")
    if not is_name(name):
        raise UserError(f"run: the recipe's name {shown(name)} is no name of a folder: set run")
    if name.casefold() in RESERVED:
        raise UserError(f"run: found {name!r}, expected another name than {' and '.join(RESERVED)}")
    return Config(name, settings.results, settings.seeds, variants, base)


def read_recipe(name: str | None, home: Path | None = None) -> dict[str, Any]:
    """A recipe's sections and its `variants`; UserError where there is none of that name."""
    if name is None:
        return {}
    path = _recipe_path(name, home)
    if is_recipe_file(name):
        search_beside([path.resolve().parent])
    recipe = read_yaml(path)
    said = recipe.pop("recipe", path.stem)
    if said != path.stem:
        raise UserError(f"{path} says recipe {shown(said)}, expected its own name, {path.stem!r}")
    if not isinstance(recipe.get("variants", {}), Mapping):
        raise UserError(
            f"{path}: variants: found {shown(recipe['variants'])}, expected a mapping of names"
        )
    if unknown := told_unknown(recipe, ["recipe", "variants", *SECTIONS]):
        raise UserError(f"{path}: {unknown}")
    return recipe


def is_recipe_file(name: str | None) -> bool:
    """Whether a recipe is named by the path of a YAML file."""
    return str(name).endswith((".yaml", ".yml"))


def _recipe_path(name: str, home: Path | None) -> Path:
    checkout = Path(__file__).resolve().parents[2]
    folders = [folder / RECIPE_FOLDER for folder in (Path(), *([home] if home else []), checkout)]
    if is_recipe_file(name):
        return Path(name)
    for folder in folders:
        if os.path.isfile(folder / f"{name}.yaml"):  # a name too long for a file is none
            return folder / f"{name}.yaml"
    names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise UserError(
        f"recipe: found {shown(name)}, expected one of {', '.join(names)}, or the path of a YAML "
        f"file{did_you_mean(name, names)}"
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
        chosen = {name: one for name, one in named.items() if one not in NULL}
    else:
        missing = [name for name in wanted if name not in offered]
        if missing:
            raise UserError(
                f"variants: found {shown(missing[0])}, expected one of the recipe's, "
                f"{', '.join(offered)}{did_you_mean(missing[0], offered)}"
            )
        chosen = {name: offered[name] for name in wanted}
    if not chosen:
        raise UserError("variants: none is left, expected at least one")
    for name, changes in chosen.items():
        _check_variant(name, changes)
    return chosen


def _check_variant(name: str, changes: Any) -> None:
    if not is_name(name) or name.casefold() == SHARED:
        raise UserError(
            f"variants: found the name {shown(name)}, expected {NAMES}, and not {SHARED!r}"
        )
    if not isinstance(changes, Mapping):
        raise UserError(f"variants.{name}: found {shown(changes)}, expected a mapping of sections")
    if unknown := told_unknown(changes, VARIED):
        raise UserError(f"variants.{name}: {unknown}")


def _check_count(count: int, sweep: Mapping[str, Sequence[Any]]) -> None:
    """Before anything is made of them. count: seeds times variants, without the sweep."""
    count *= math.prod(map(len, sweep.values()))
    if count > MAXIMUM_RUNS:
        raise UserError(
            f"{'sweep' if sweep else 'seeds'}: found {count:,} combinations with seeds and "
            f"variants, expected at most {MAXIMUM_RUNS:,}"
        )
    if len(sweep) > MAXIMUM_SWEPT:
        raise UserError(f"sweep: found {len(sweep)} keys, expected at most {MAXIMUM_SWEPT}")


def _expanded(
    chosen: Mapping[str, Mapping[str, Any]], sweep: Mapping[str, Sequence[Any]]
) -> dict[str, tuple[Part, ...]]:
    """Every variant with every combination of the sweep's values, as the parts of its name."""
    axes = []
    for path, values in sweep.items():
        section, *keys = path.split(".")
        if section not in VARIED:
            raise UserError(
                f"sweep: found {word(path)}, expected one of the sections {', '.join(VARIED)}"
                f"{did_you_mean(section, VARIED)}"
            )
        if not keys or not values:
            found = f"{word(path)}: {shown(list(values))}"
            raise UserError(f"sweep: found {found}, expected section.key: [values]")
        axes.append([Part(_part_name(keys[-1], value), _nested(path, value)) for value in values])
    expanded: dict[str, tuple[Part, ...]] = {}
    taken: set[str] = set()
    for own in (Part(*one) for one in chosen.items()):
        for parts in itertools.product([own], *axes):
            full = "-".join(part.name for part in parts)
            if not is_name(full):
                raise UserError(f"sweep: found the name {shown(full)}, expected {NAMES}")
            if full.casefold() in taken:
                raise UserError(
                    f"variants: two variants would be named {full}, where case does not count: "
                    "give other names or values"
                )
            taken.add(full.casefold())
            expanded[full] = parts
    return expanded


def _part_name(key: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^A-Za-z0-9_.]+", "_", f"{key}_{text}").strip("_")


def _nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _changed(base: Mapping[str, Any], parts: Iterable[Part]) -> dict[str, Any]:
    return reduce(merge, (part.changes for part in parts), dict(base))


def _fewest_first(parts: Sequence[Part]) -> Iterator[tuple[Part, ...]]:
    return itertools.chain.from_iterable(
        itertools.combinations(parts, count) for count in range(len(parts) + 1)
    )


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
        if known.setdefault(data.name.casefold(), data) != data:
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
