"""The settings that a run's stages were told, as their provenance.json have them.

They are what ran, whatever files and options the workflow was started with; so a run is made again
from them, by the config.yaml that the report leaves.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fairway.provenance import PROVENANCE, Provenance, read_provenance
from fairway.report.format import NONE, count
from fairway.report.results import FINAL_STAGE, Results
from fairway.report.table import Cell, Group, Table
from fairway.stages import made_by

ABSENT = object()
"""In place of the value of a key that one side does not have."""
CONFIG = "config.yaml"
HEADER = """\
# Every setting of the run {run}, as its stages were told. Give it alone, from a copy:
#   snakemake --cores 2 --replace-workflow-config --configfile COPY
"""


def resolved(results: Results, variant: str) -> dict[str, Any]:
    """All settings of a variant's stages, by section."""
    records = [dataset_record(results, variant)]
    records += [results.provenance[variant, results.seeds[0], one] for one in results.stages]
    sections: dict[str, dict] = {}
    for record in records:
        for name, values in record.settings.items():
            sections.setdefault(name, {}).update(values)
    return sections


def dataset_record(results: Results, variant: str) -> Provenance:
    """provenance.json of the dataset that was scored."""
    inputs = map(Path, results.provenance[variant, results.seeds[0], FINAL_STAGE].inputs)
    manifest = next(path for path in inputs if path.name == "manifest.json")
    return read_provenance(manifest.with_name(PROVENANCE), made_by("tokenize", again=True))


def config_of(
    run: str, seeds: Sequence[int], variants: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """A config that says it all. variants: the resolved sections of each, the first's written out.

    Folders are named after variants, also where those of the run were named after a sweep's values.
    """
    first, *_ = variants.values()
    changes = {name: difference(first, sections) for name, sections in variants.items()}
    # A config without a recipe has a variant `causal`, unless it is dropped.
    dropped = {} if "causal" in changes else {"causal": None}
    return {
        "run": run, "recipe": None, "seeds": list(seeds), "variants": changes | dropped, **first
    }  # fmt: skip


def difference(base: Any, other: Any) -> Any:
    """What laid over `base` gives `other`, but for keys that `other` leaves unread."""
    if not (isinstance(base, Mapping) and isinstance(other, Mapping)):
        return other
    return {
        key: difference(base.get(key), value)
        for key, value in other.items()
        if key not in base or value != base[key]
    }


def config_text(config: Mapping[str, Any]) -> str:
    """The YAML of a config."""
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=96)
    return HEADER.format(run=config["run"]) + text


def own_modules(text: str) -> list[str]:
    """The modules of the user's own, `module:Name`, that a config's YAML names."""
    return sorted(set(re.findall(r"\b([A-Za-z_][\w.]*):[A-Za-z_]", text)))


def changed_keys(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(`section.key`, A's value, B's) wherever two plain values differ; ABSENT for none.

    Lists of named entries, as `evaluation.adapters` is, are compared name by name, and as a list of
    their names.
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys((*a, *b)):
            inner = f"{path}.{key}" if path else key
            yield from changed_keys(a.get(key, ABSENT), b.get(key, ABSENT), inner)
    elif _is_named(a) and _is_named(b):
        ours, theirs = ({key: one[key] for one in side for key in one} for side in (a, b))
        if [*ours] != [*theirs]:
            yield path, [*ours], [*theirs]
        for name in (name for name in ours if name in theirs):
            yield from changed_keys(ours[name], theirs[name], f"{path}.{name}")
    elif a != b:
        yield path, a, b


def _is_named(value: Any) -> bool:
    entries = isinstance(value, list) and all(
        isinstance(one, Mapping) and len(one) == 1 for one in value
    )
    return entries and len({key for one in value for key in one}) == len(value)


def value_text(value: Any) -> str:
    """A setting as a config has it."""
    if value is ABSENT:
        return NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def changes_table(results: Results, against: str) -> Table:
    """What each variant sets otherwise than the one that it is held against."""
    base, groups = resolved(results, against), []
    for variant in results.variants:
        rows = [
            [key, value_text(theirs), value_text(ours)]
            for key, ours, theirs in changed_keys(base, resolved(results, variant))
        ]
        if rows:
            groups.append(Group(rows, Cell(variant)))
    return Table(
        "What each variant changes",
        f"Every setting that is another than {against} has it.",
        ["Key", "Value", f"In {against}"],
        groups,
    )


def setting_facts(results: Results, variant: str) -> list[tuple[str, str]]:
    """A variant's settings and sizes in a few lines."""
    settings = resolved(results, variant)
    model, train, evaluation = (settings.get(one, {}) for one in ("model", "train", "evaluation"))
    of = {stage: results.metrics[variant, results.seeds[0], stage] for stage in results.stages}
    rates = {
        key.removesuffix("_learning_rate"): value
        for key, value in train.items()
        if key.endswith("_learning_rate")
    }
    ttt, gptq = settings.get("ttt", {}), of["gptq"]
    tokens = f"{count(of['train']['train_tokens'])} tokens"
    return [
        (name, text)
        for name, text in (
            ("Model", _listed([f"{count(of['train']['parameters'])} parameters"], model,
                              ("layers", "width", "heads", "kv_heads", "mlp_width"))),
            ("Training", _listed([f"{count(of['train']['steps'])} steps", tokens], train,
                                 ("batch_tokens", "sequence_tokens", "warmdown_steps"))),
            ("Learning rates", _listed([], rates, rates)),
            ("Averaging", of["ema"]["average"]),
            ("Test-time training", _listed([f"on {of['ttt']['data']}"], ttt,
                                           ("epochs", "learning_rate", "frozen_blocks"))),
            ("Quantizer", _listed([gptq["quantizer"]], settings.get("gptq", {}),
                                  ("steps", "calibration", "calibration_sequences"))),
            ("Evaluation", _listed(list(results.adapters(variant).values()), evaluation,
                                   ("window_tokens", "stride_tokens", "lanes"))),
            ("Precision", _each(of, "precision")),
            ("Kernels", _each(of, "kernels")),
            ("Attention", _each(of, "attention_backend")),
        )
        if text
    ]  # fmt: skip


def _listed(first: list[str], values: Mapping[str, Any], keys: Iterable[str]) -> str:
    """`first` and those of the keys that there are, as `key value`."""
    told = [f"{key} {value_text(values[key])}" for key in keys if key in values]
    return ", ".join([*first, *told])


def _each(metrics: Mapping[str, Mapping[str, Any]], key: str) -> str:
    """What the stages that run the model say of it; a stage of the user's own may not."""
    return ", ".join(dict.fromkeys(one[key] for one in metrics.values() if key in one))
