"""The configuration: defaults, merging, what each stage sees, and how faults are told."""

import json

import pytest
import yaml

from fairway.audit.runner import AuditSettings
from fairway.config import (
    ADAPTERS,
    SCHEMA_PATH,
    STAGE_SECTIONS,
    load_config,
    merge,
    stage_settings,
    validated,
    variant_config,
)
from fairway.data.settings import DataSettings
from fairway.errors import UserError
from fairway.evaluation.evaluator import evaluator_settings
from fairway.model.runtime import RuntimeSettings
from fairway.quantization.gptq import GptqSettings
from fairway.training.selection import EMASettings
from fairway.training.trainer import TrainSettings
from fairway.training.ttt import TTTSettings
from tiny import ROOT, TINY_CONFIG

SHIPPED = (["config.yaml"], ["config.yaml", "config/record.yaml"])


@pytest.fixture
def config(tiny_config):
    return validated(tiny_config)


def refused(changes: dict) -> str:
    """The message for the tiny configuration with `changes`."""
    base = merge(TINY_CONFIG, {"data": {"paths": ["text.jsonl"]}})
    with pytest.raises(UserError) as error:
        validated(merge(base, changes))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("names", SHIPPED, ids=lambda names: names[-1])
def test_shipped_configurations_make_every_stages_settings(names):
    complete = load_config(ROOT / name for name in names)
    for variant in complete["variants"]:
        stages = {stage: stage_settings(complete, stage, variant) for stage in STAGE_SECTIONS}
        DataSettings(**stages["tokenize"]["data"])
        TrainSettings(**stages["train"]["train"])
        RuntimeSettings(**stages["train"]["runtime"])
        EMASettings(**stages["ema"]["ema"])
        TTTSettings(**stages["ttt"]["ttt"])
        GptqSettings(**stages["gptq"]["gptq"])
        evaluator = evaluator_settings(stages["slot"])
        assert evaluator == evaluator_settings(stages["audit"])
        AuditSettings(**stages["audit"]["audit"])


def test_the_schemas_defaults_are_valid_and_every_key_has_one_or_is_required():
    schema = yaml.safe_load(SCHEMA_PATH.read_text())
    for name, section in schema["properties"].items():
        if "$ref" not in section:
            continue
        section = schema["$defs"][section["$ref"].removeprefix("#/$defs/")]
        for key, rules in section.get("properties", {}).items():
            assert "default" in rules or key in section["required"], f"{name}.{key}"
    minimal = {key: TINY_CONFIG[key] for key in ("run", "seeds")}
    complete = validated(
        {
            **minimal,
            "variants": {"causal": {}},
            "data": {"name": "text", "source": "embedded"},
            "model": {},
            "train": {},
        }
    )
    assert validated(complete) == complete


def test_validation_changes_nothing_that_was_given(tiny_config):
    before = json.dumps(tiny_config)
    complete = validated(tiny_config)
    assert json.dumps(tiny_config) == before
    assert merge(complete, tiny_config) == complete


def test_later_files_go_over_earlier_ones_key_by_key(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    data = {"data": {"paths": ["text.jsonl"]}}
    first.write_text(yaml.safe_dump(merge(TINY_CONFIG, data)))
    second.write_text("seeds: [1, 2]\nevaluation: {lanes: 9}\nslot: {l2: 3.5}\n")
    merged = load_config([first, second])
    assert merged["seeds"] == [1, 2]
    assert merged["slot"]["l2"] == 3.5
    assert merged["slot"]["batch_windows"] == TINY_CONFIG["slot"]["batch_windows"]
    assert merged["evaluation"] == {**TINY_CONFIG["evaluation"], "lanes": 9}


def test_a_variants_changes_are_its_own(config):
    assert variant_config(config, "published")["slot"]["scope"] == "batch"
    assert variant_config(config, "causal")["slot"]["scope"] == "window"
    assert config["slot"]["scope"] == "window"
    with pytest.raises(UserError, match="no variant 'other': the config has causal, published"):
        variant_config(config, "other")


def test_a_stage_sees_its_own_sections_only(config):
    assert set(stage_settings(config, "train")) == {"model", "train", "runtime"}
    gptq = stage_settings(config, "gptq", "causal")
    assert set(gptq) == {"gptq", "budgets", "runtime"}
    assert gptq["budgets"] == {"artifact_bytes": 16_000_000}


def test_an_adapters_section_is_seen_only_where_it_is_listed(config):
    for stage in ("slot", "audit"):
        own = {name for name in STAGE_SECTIONS[stage] if name not in ADAPTERS}
        for variant, listed in (("causal", set(ADAPTERS)), ("published", {"slot"})):
            assert set(stage_settings(config, stage, variant)) == own | listed
        plain = merge(config, {"variants": {"plain": {"evaluation": {"adapters": []}}}})
        settings = stage_settings(plain, stage, "plain")
        assert set(settings) == own
        assert evaluator_settings(settings).evaluation.adapters == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sead": 1}, "config: unknown key sead; allowed: run, results, seeds"),
        ({"slot": {"windows": 1}}, "slot: unknown key windows; allowed: scope, batch_windows"),
        ({"slot": {"lanes": 1}}, "slot: unknown key lanes; allowed: scope, batch_windows"),
        (
            {"evaluation": {"windows": 1}},
            "evaluation: unknown key windows; allowed: adapters, window_tokens",
        ),
        ({"lora": {"alpha": 1}}, "lora: unknown key alpha; allowed: rank, projections"),
        (
            {"variants": {"published": {"slot": {"l3": 0.0}}}},
            "variants.published: slot: unknown key l3",
        ),
        ({"variants": {"published": {"train": {}}}}, "variants.published: unknown key train"),
        ({"train": {"max_steps": "many"}}, "train.max_steps: found 'many', expected type integer"),
        (
            {"train": {"matrix_learning_rate": "1e-3"}},
            "expected type number (YAML reads 1e-3 as text: write 1.0e-3)",
        ),
        ({"model": {"width": -32}}, "model.width: found -32, expected at least 1"),
        ({"model": {"layers": 0}}, "model.layers: found 0, expected at least 1"),
        ({"model": {"layers": 2.5}}, "model.layers: found 2.5, expected type integer"),
        ({"train": {"checkpoint_seconds": 0}}, "found 0, expected more than 0"),
        ({"train": {"ema_decays": [1.0]}}, "train.ema_decays.0: found 1.0, expected less than 1"),
        ({"ttt": {"final_learning_rate_fraction": 2}}, "found 2, expected at most 1"),
        ({"seeds": []}, "seeds: found [], expected a list of at least 1"),
        ({"seeds": [1, 1]}, "seeds: found [1, 1], expected"),
        ({"seeds": 7}, "seeds: found 7, expected type array"),
        ({"seeds": [-1]}, "seeds.0: found -1, expected at least 0"),
        ({"run": "a b"}, "run: found 'a b', expected text matching"),
        ({"ema": {"kind": "average"}}, "ema.kind: found 'average', expected one of ema, swa, none"),
        ({"slot": {"focal_tokens": "most"}}, "slot.focal_tokens: found 'most', expected one of"),
        ({"runtime": {"compile": True}}, "runtime.compile: found True, expected one of auto"),
        ({"data": {"paths": []}}, "data.source is 'jsonl' but data.paths is empty"),
        ({"data": {"source": "shards"}}, "data.source is 'shards' but data.folder is not set"),
        ({"model": {"heads": 3}}, "model.heads 3 does not divide model.width 32"),
        ({"model": {"kv_heads": 3}}, "model.kv_heads 3 does not divide model.heads 4"),
        ({"model": {"rotary_dimensions": 10}}, "must be even and at most the head width 8"),
        ({"model": {"rotary_dimensions": 3}}, "model.rotary_dimensions 3 must be even"),
        ({"model": {"value_layers": [3]}}, "value_layers names block 3, but model.layers is 3"),
        ({"train": {"batch_tokens": 250}}, "train.sequence_tokens 32 does not divide"),
        ({"ema": {"decay": 0.123}}, "ema.decay 0.123 is not tracked: choose auto or one of"),
        ({"ttt": {"frozen_blocks": 4}}, "ttt.frozen_blocks"),
        ({"evaluation": {"stride_tokens": 64}}, "evaluation.stride_tokens 64 is larger than"),
        ({"evaluation": {"lanes": 0}}, "evaluation.lanes: found 0, expected at least 1"),
        ({"slot": {"focal_tokens": 8}}, "slot.focal_tokens"),
        ({"variants": {"published": {"slot": {"focal_tokens": 4}}}}, "slot.focal_tokens"),
        ({"evaluation": {"adapters": ["ema"]}}, "evaluation.adapters.0: found 'ema', expected one"),
        ({"evaluation": {"adapters": ["slot", "slot"]}}, "evaluation.adapters: found"),
        ({"evaluation": {"adapters": ["slot", "lora"]}}, "each once and in this order"),
        (
            {"variants": {"published": {"evaluation": {"adapters": ["lora", "slot"]}}}},
            "variants.published: slot.scope 'batch' fits to targets before they are scored, so no "
            "other adapter goes with it: found evaluation.adapters ['lora', 'slot']",
        ),
        (
            {"variants": {"published": {"slot": {"context_logits": "scored"}}}},
            "variants.published: slot.context_logits 'scored' needs slot.scope 'window'",
        ),
        ({"lora": {"projections": ["gate"]}}, "lora.projections.0: found 'gate', expected one of"),
        ({"lora": {"projections": ["up", "up"]}}, "found ['up', 'up'], expected each entry once"),
        ({"lora": {"projections": []}}, "name lora.projections or set lora.scales"),
        ({"lora": {"chunk_tokens": 12}}, "lora.chunk_tokens 12 is not a multiple of evaluation"),
        ({"lora": {"chunk_tokens": 40}}, "expected lora.chunk_tokens (40) to evaluation.window"),
        ({"lora": {"context_tokens": 8}}, "lora.context_tokens is 8: expected lora.chunk_tokens"),
        ({"lora": {"context_tokens": 33}}, "lora.context_tokens is 33: expected lora.chunk_tokens"),
        ({"lora": {"rank": 0}}, "lora.rank: found 0, expected at least 1"),
        ({"lora": {"learning_rate": 0}}, "lora.learning_rate: found 0, expected more than 0"),
        ({"lora": {"betas": [0.9, 1]}}, "lora.betas.1: found 1, expected less than 1"),
        ({"lora": {"betas": [0.9]}}, "lora.betas: found [0.9], expected a list of at least 2"),
    ],
    ids=str,
)
def test_a_fault_is_told_in_one_line_with_its_key(changes, message):
    assert message in refused(changes)


def test_an_adapter_that_no_variant_lists_may_be_set_to_anything_that_fits_by_itself(tiny_config):
    changes = {"evaluation": {"adapters": ["slot"]}, "lora": {"chunk_tokens": 12}}
    assert validated(merge(tiny_config, changes))["lora"]["chunk_tokens"] == 12


@pytest.mark.parametrize("key", ["run", "seeds", "variants", "data", "model", "train"])
def test_a_missing_section_is_named(tiny_config, key):
    config = {name: value for name, value in tiny_config.items() if name != key}
    with pytest.raises(UserError, match=f"config: missing key {key}$"):
        validated(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "could not be read: No such file or directory"),
        ("run: [", "is not YAML"),
        ("- run", "holds list, expected a mapping of keys"),
        ("", "holds NoneType, expected a mapping of keys"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config([path])
    assert str(path) in str(error.value) and "\n" not in str(error.value)
