"""The configuration: read, merged, validated, and cut into what each stage may see.

Defaults live in workflow/schemas/config.schema.yaml and nowhere else, beside the types and ranges
that a configuration is held to. A stage is handed only the sections listed in STAGE_SECTIONS, so a
change elsewhere cannot rerun it.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match

from fairway.errors import UserError

SCHEMA_PATH = Path(__file__).resolve().parents[2] / "workflow/schemas/config.schema.yaml"

VARIANT_STAGES = ("ttt", "gptq", "slot", "audit")

ADAPTERS = ("lora", "slot", "ngram")
"""In the order in which they compose: lora changes the model, slot its logits, ngram mixes."""

STAGE_SECTIONS = {
    "tokenize": ("data",),
    "train": ("model", "train", "runtime"),
    "ema": ("ema", "runtime"),
    "ttt": ("ttt", "runtime"),
    "gptq": ("gptq", "budgets.artifact_bytes", "runtime"),
    "slot": ("evaluation", *ADAPTERS, "runtime"),
    "audit": ("audit", "evaluation", *ADAPTERS, "budgets", "runtime"),
    "report": ("report", "budgets"),
}


def load_config(paths: Iterable[str | Path]) -> dict[str, Any]:
    """Read YAML files, merge each over the ones before it, validate and fill in defaults.

    Raises UserError naming the file, or the key's path with what it allows.
    """
    config: dict[str, Any] = {}
    for path in paths:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path} could not be read: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(loaded, dict):
            raise UserError(f"{path} holds {type(loaded).__name__}, expected a mapping of keys")
        config = merge(config, loaded)
    return validated(config)


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`overlay` over `base`: mappings merge key by key, anything else is replaced."""
    merged = dict(base)
    for key, value in overlay.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def validated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` with defaults filled in; UserError for whatever the schema refuses.

    Each variant's overlay is validated as merged into its section, so that a wrong key inside a
    variant is found as well.
    """
    schema = yaml.safe_load(SCHEMA_PATH.read_text(encoding="utf-8"))
    complete = copy.deepcopy(dict(config))
    _check(complete, schema)
    _fill_defaults(complete, schema, schema)
    check_data(complete["data"])
    check_model(complete["model"])
    _check_train(complete["train"])
    _check_ema(complete["ema"], complete["train"])
    for name in complete["variants"]:
        _check_variant(variant_config(complete, name), schema, name)
    return complete


def variant_config(config: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """The configuration as `variant` sees it: its overlay merged into the sections it changes."""
    if variant not in config["variants"]:
        raise UserError(f"no variant {variant!r}: the config has {', '.join(config['variants'])}")
    return merge(config, config["variants"][variant] or {})


def stage_settings(
    config: Mapping[str, Any], stage: str, variant: str | None = None
) -> dict[str, Any]:
    """The sections of a validated config that `stage` may read, as `variant` sees them."""
    seen = variant_config(config, variant) if variant else config
    settings: dict[str, Any] = {}
    for name in STAGE_SECTIONS[stage]:
        section, _, key = name.partition(".")
        settings[section] = {key: seen[section][key]} if key else dict(seen[section])
    # An adapter that is not listed is not read, so that its keys rerun nothing.
    for name in ADAPTERS:
        if name in settings and name not in seen["evaluation"]["adapters"]:
            del settings[name]
    return settings


def _check(config: Mapping[str, Any], schema: Mapping[str, Any], prefix: str = "") -> None:
    error = best_match(Draft202012Validator(schema).iter_errors(config))
    if error is not None:
        raise UserError(prefix + _explain(error))


def _check_variant(config: Mapping[str, Any], schema: Mapping[str, Any], name: str) -> None:
    _check(config, schema, prefix=f"variants.{name}: ")
    try:
        check_evaluation(config["evaluation"])
        check_adapters(config)
        check_frozen_blocks(config["ttt"]["frozen_blocks"], config["model"]["layers"])
    except UserError as error:
        raise UserError(f"variants.{name}: {error}") from None


def _explain(error: ValidationError) -> str:
    """One line: the key's path, what was found, and what is allowed."""
    where = ".".join(str(part) for part in error.absolute_path) or "config"
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        unknown = sorted(set(error.instance) - set(known))
        return f"{where}: unknown key {', '.join(unknown)}; allowed: {', '.join(known) or 'none'}"
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        return f"{where}: missing key {', '.join(missing)}"
    if error.validator == "uniqueItems":
        return f"{where}: found {error.instance!r}, expected each entry once"
    hint = ""
    if error.validator == "type" and isinstance(error.instance, str) and _is_number(error.instance):
        hint = " (YAML reads 1e-3 as text: write 1.0e-3)"
    allowed = {
        "enum": "one of",
        "type": "type",
        "minimum": "at least",
        "maximum": "at most",
        "exclusiveMinimum": "more than",
        "exclusiveMaximum": "less than",
        "const": "",
        "pattern": "text matching",
        "minItems": "a list of at least",
        "minProperties": "entries, at least",
    }.get(error.validator, error.validator)
    expected = error.validator_value
    if isinstance(expected, list):
        expected = ", ".join(str(item) for item in expected)
    if error.validator == "anyOf":
        choices = (choice.get("const", choice.get("type", "")) for choice in error.validator_value)
        allowed, expected = "one of", ", ".join(map(str, choices))
    expectation = f"{allowed} {expected}".strip()
    return f"{where}: found {error.instance!r}, expected {expectation}{hint}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _fill_defaults(
    value: dict[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any]
) -> None:
    for key, subschema in schema.get("properties", {}).items():
        if "$ref" in subschema:
            name = subschema["$ref"].removeprefix("#/$defs/")
            subschema = {**root["$defs"][name], **subschema}
        if key not in value and "default" in subschema:
            value[key] = copy.deepcopy(subschema["default"])
        if isinstance(value.get(key), dict):
            _fill_defaults(value[key], subschema, root)


def check_data(data: Mapping[str, Any]) -> None:
    """UserError where the section `data` lacks a key that its source needs, or has one too many."""
    source, tokenizer = data["source"], data["tokenizer"]
    if source == "jsonl" and not data["paths"]:
        raise UserError("data.source is 'jsonl' but data.paths is empty: list the files")
    if source == "shards" and not data["folder"]:
        raise UserError("data.source is 'shards' but data.folder is not set: name the folder")
    if source == "shards" and not tokenizer:
        raise UserError(
            "data.source is 'shards' but data.tokenizer is not set: name its .model file"
        )
    if source == "huggingface" and data["form"] == "shards" and tokenizer:
        raise UserError(
            "data.tokenizer is set but data.form is 'shards', which brings its own tokenizer: "
            "remove data.tokenizer or set data.form to 'documents'"
        )


def check_model(model: Mapping[str, Any]) -> None:
    """UserError where keys of the section `model`, each allowed by itself, do not fit together."""
    width, heads, kv_heads = model["width"], model["heads"], model["kv_heads"]
    if width % heads:
        raise UserError(f"model.heads {heads} does not divide model.width {width}")
    if heads % kv_heads:
        raise UserError(f"model.kv_heads {kv_heads} does not divide model.heads {heads}")
    rotary, head_width = model["rotary_dimensions"], width // heads
    if rotary > head_width or rotary % 2:
        raise UserError(
            f"model.rotary_dimensions {rotary} must be even and at most the head width "
            f"{head_width} (model.width / model.heads)"
        )
    outside = [layer for layer in model["value_layers"] if layer >= model["layers"]]
    if outside:
        raise UserError(
            f"model.value_layers names block {outside[0]}, but model.layers is {model['layers']}"
        )


def _check_train(train: Mapping[str, Any]) -> None:
    if train["batch_tokens"] % train["sequence_tokens"]:
        raise UserError(
            f"train.sequence_tokens {train['sequence_tokens']} does not divide "
            f"train.batch_tokens {train['batch_tokens']}"
        )


def _check_ema(ema: Mapping[str, Any], train: Mapping[str, Any]) -> None:
    decay, decays = ema["decay"], train["ema_decays"]
    if ema["kind"] == "ema" and decay != "auto" and decay not in decays:
        raise UserError(
            f"ema.decay {decay} is not tracked: choose auto or one of train.ema_decays {decays}"
        )


def check_evaluation(evaluation: Mapping[str, Any]) -> None:
    """UserError where keys of `evaluation`, each allowed by itself, do not fit together."""
    window, stride = evaluation["window_tokens"], evaluation["stride_tokens"]
    if stride > window:
        raise UserError(
            f"evaluation.stride_tokens {stride} is larger than evaluation.window_tokens {window}: "
            "targets would be skipped; lower the stride"
        )
    adapters = list(evaluation["adapters"])
    if adapters != [name for name in ADAPTERS if name in adapters]:
        raise UserError(
            f"evaluation.adapters is {adapters}: expected some of {', '.join(ADAPTERS)}, each once "
            "and in this order, in which they compose"
        )


def check_adapters(sections: Mapping[str, Any]) -> None:
    """UserError where an adapter that is listed does not fit the evaluation's windows.

    sections: the config's, `evaluation` and those of the listed adapters at least.
    """
    evaluation = sections["evaluation"]
    if "slot" in evaluation["adapters"]:
        _check_slot(evaluation, sections["slot"])
    if "lora" in evaluation["adapters"]:
        _check_lora(evaluation, sections["lora"])


def _check_slot(evaluation: Mapping[str, Any], slot: Mapping[str, Any]) -> None:
    window, stride = evaluation["window_tokens"], evaluation["stride_tokens"]
    focal = window if slot["focal_tokens"] == "all" else slot["focal_tokens"]
    if focal > window:
        raise UserError(
            f"slot.focal_tokens {focal} exceeds evaluation.window_tokens {window}: lower it, or "
            "use 'all'"
        )
    if focal <= stride:
        raise UserError(
            f"slot.focal_tokens {slot['focal_tokens']} leaves no context before the scored "
            f"{stride} (evaluation.stride_tokens): expected more than that, or 'all'"
        )
    if slot["scope"] == "batch" and slot["context_logits"] == "scored":
        raise UserError(
            "slot.context_logits 'scored' needs slot.scope 'window', found 'batch': use 'current'"
        )
    if slot["scope"] == "batch" and len(evaluation["adapters"]) > 1:
        raise UserError(
            "slot.scope 'batch' fits to targets before they are scored, so no other adapter goes "
            f"with it: found evaluation.adapters {list(evaluation['adapters'])}, use [slot]"
        )


def _check_lora(evaluation: Mapping[str, Any], lora: Mapping[str, Any]) -> None:
    chunk, stride = lora["chunk_tokens"], evaluation["stride_tokens"]
    context, window = lora["context_tokens"], evaluation["window_tokens"]
    if chunk % stride:
        raise UserError(
            f"lora.chunk_tokens {chunk} is not a multiple of evaluation.stride_tokens {stride}: a "
            "chunk is learned from when it has been scored"
        )
    if not chunk <= context <= window:
        raise UserError(
            f"lora.context_tokens is {context}: expected lora.chunk_tokens ({chunk}) to "
            f"evaluation.window_tokens ({window})"
        )
    if not lora["projections"] and not lora["scales"]:
        raise UserError("lora adapts nothing: name lora.projections or set lora.scales")


def check_frozen_blocks(frozen_blocks: int, layers: int) -> None:
    """UserError where TTT would freeze more blocks than there are."""
    if frozen_blocks > layers:
        raise UserError(f"ttt.frozen_blocks {frozen_blocks} exceeds model.layers {layers}")
