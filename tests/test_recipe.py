"""Recipes: read, merged, varied, swept, cut for each stage; and how faults of a config are told."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairway.errors import UserError
from fairway.recipe import (
    SECTIONS,
    VARIED,
    canonical,
    complete,
    cut,
    load_config,
    read_recipe,
    section_class,
    sections_of,
)
from fairway.settings import Settings, merge
from fairway.stages import STAGES, stages_per
from malformed_configs import LONGEST_MESSAGE
from tiny import ROOT, TINY_CONFIG

RECIPES = sorted(path.stem for path in (ROOT / "config").glob("*.yaml"))
WITH_TEXT = merge(TINY_CONFIG, {"data": {"paths": ["text.jsonl"]}})
"""The tiny configuration; tokenize would read the file, validation does not."""


def config(**changes):
    return complete(merge(WITH_TEXT, changes))


def with_variants(variants: Any, **changes):
    """The tiny configuration with these variants in place of its own and of the default one."""
    if isinstance(variants, dict):
        variants = {"causal": None, **variants}
    return complete({**merge(WITH_TEXT, changes), "variants": variants})


def refused(changes: dict) -> str:
    """The message for the tiny configuration with `changes`."""
    with pytest.raises(UserError) as error:
        complete(merge(WITH_TEXT, changes))
    message = str(error.value)
    assert "\n" not in message
    return message


def folders(of, stage: str) -> dict[str, str]:
    """variant → folder of the stage."""
    return {variant: stages[stage] for variant, stages in of.folders.items()}


# The shipped recipes


@pytest.mark.parametrize("recipe", RECIPES)
def test_shipped_recipes_make_every_stages_settings(recipe):
    shipped = complete({"recipe": recipe, "seeds": [1]})
    assert list(shipped.variants) in (["causal", "leaky"], ["causal"])
    for variant in shipped.variants:
        for name, stage in STAGES.items():
            made = sections_of(shipped.stage_settings(name, variant))
            assert set(made) == {section.partition(".")[0] for section in stage.sections}
        evaluated, audited = (
            shipped.stage_settings(name, variant)["evaluation"] for name in ("slot_eval", "audit")
        )
        assert evaluated == audited


def test_the_shipped_config_loads():
    shipped = load_config([ROOT / "config.yaml"])
    assert shipped.run == "quickstart" and shipped.seeds == (1337, 42, 2025)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_key_of_a_recipe_says_what_holds_without_it(recipe):
    """So no key only undoes another, and what a recipe says is what is special in it."""
    whole = read_recipe(recipe)
    before = meaning(whole)
    idle = [path for path in leaves(whole) if meaning(without(whole, path)) == before]
    assert idle == []


def meaning(recipe: dict) -> str | None:
    """All sections of all variants; None where they would not be valid."""
    try:
        made = complete({**recipe, "seeds": [1]})
    except UserError:
        return None
    return canonical(
        {
            variant: {name: one.model_dump(mode="json") for name, one in sections.items()}
            for variant, sections in ((name, made.sections(name)) for name in made.variants)
        }
    )


def leaves(values: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value; a list is one, but for that of adapters."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from leaves(value, (*path, key))
    elif path[-1] == "adapters":
        for index, entry in enumerate(values):
            yield from leaves(entry, (*path, index))
    else:
        yield path


def without(values: Any, path: tuple) -> Any:
    left = copy.deepcopy(values)
    place = left
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return left


def test_a_recipe_is_complete_over_the_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {name: mine, source: embedded}\nttt: {epochs: 2}\n")
    made = complete({"recipe": str(path), "seeds": [3]})
    assert made.run == "mine" and list(made.variants) == ["causal"]
    sections = made.sections("causal")
    assert set(sections) == set(SECTIONS)
    assert sections["ttt"] == section_class("ttt")(epochs=2)
    for name in set(SECTIONS) - {"data", "ttt"}:
        assert sections[name] == section_class(name)()


def test_a_config_needs_no_recipe():
    made = complete({"seeds": [1], "data": {"name": "text", "source": "embedded"}})
    assert (made.run, made.results, made.seeds) == ("run", "results", (1,))
    assert made.sections("causal")["model"] == section_class("model")()


def test_a_configs_sections_go_over_its_recipes():
    made = complete({"recipe": "quickstart", "seeds": [1], "model": {"layers": 5}})
    assert made.sections("causal")["model"].layers == 5
    assert made.sections("causal")["model"].width == 96


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: other", "says recipe 'other', expected its own name, 'mine'"),
        (
            "trian: {}",
            "unknown key trian; did you mean train?; allowed: recipe, variants",
        ),
        ("seeds: [1]", "unknown key seeds; allowed: recipe, variants"),
        ("variants: 3", "variants: found 3, expected a mapping of names"),
        ("variants: {causal: }", "variants.causal: found None, expected a mapping of sections"),
        ("5: 6", "mine.yaml: found the key 5, expected text: quote it"),
        ("train: 5", "train: found 5, expected a mapping of keys"),
    ],
)
def test_a_recipes_faults_are_told_in_one_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    values = {"recipe": str(path), "seeds": [1], "data": WITH_TEXT["data"]}
    with pytest.raises(UserError) as error:
        complete(values)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_is_found_beside_the_workflow_or_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / "config/mine.yaml").write_text("ttt: {epochs: 9}")
    assert complete({**WITH_TEXT, "recipe": "mine"}, home=tmp_path).variants["causal"]
    monkeypatch.chdir(tmp_path)
    assert read_recipe("mine") == {"ttt": {"epochs": 9}}
    assert read_recipe("quickstart")["model"]["width"] == 96


def test_a_recipes_name_must_do_as_a_folder(tmp_path):
    path = tmp_path / "my recipe.yaml"
    path.write_text("ttt: {}")
    given = {**WITH_TEXT, "recipe": str(path), "run": None}
    with pytest.raises(
        UserError, match="run: the recipe's name 'my recipe' is no name of a folder"
    ):
        complete(given)
    assert complete({**given, "run": "mine"}).run == "mine"


# Files


def test_later_files_go_over_earlier_ones_key_by_key(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(yaml.safe_dump(WITH_TEXT))
    second.write_text(
        "seeds: [1, 2]\nevaluation: {lanes: 9, adapters: {slot: {l2: 3.5}, ngram: null}}\n"
    )
    merged = load_config([first, second])
    before, after = (one.sections("causal")["evaluation"] for one in (config(), merged))
    assert merged.seeds == (1, 2)
    assert after.labels == ["lora", "slot"]
    assert after.adapters[0] == before.adapters[0]
    assert after.adapters[1].settings == before.adapters[1].settings.changed(l2=3.5)
    assert after == before.changed(lanes=9, adapters=after.adapters)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "could not be read: No such file or directory"),
        ("run: [", "is not YAML"),
        ("- run", "holds list, expected a mapping of keys"),
        ("", "holds nothing, expected a mapping of keys"),
        (b"run: \xff", "could not be read"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        load_config([path])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_validation_changes_nothing_that_was_given():
    before = json.dumps(WITH_TEXT)
    made = complete(WITH_TEXT)
    assert made.folders
    assert json.dumps(WITH_TEXT) == before


# What a stage sees


def test_a_variants_changes_are_its_own():
    made = config()
    scopes = {
        variant: [
            choice.settings.scope
            for choice in made.sections(variant)["evaluation"].adapters
            if choice.name == "slot"
        ]
        for variant in made.variants
    }
    assert scopes == {"causal": ["window"], "leaky": ["batch"]}
    with pytest.raises(UserError, match="no variant 'other': the config has causal, leaky"):
        made.sections("other")
    with pytest.raises(UserError, match="did you mean leaky?"):
        made.sections("leeky")


def test_a_stage_sees_its_own_sections_only():
    made = config()
    assert set(made.stage_settings("train")) == {"model", "train", "gptq", "runtime"}
    assert made.stage_settings("train")["gptq"] == {"quantizer": "gptq"}
    gptq = made.stage_settings("gptq", "causal")
    assert set(gptq) == {"gptq", "budgets", "runtime"}
    assert gptq["budgets"] == {"artifact_bytes": 16_000_000}


def test_only_adapters_that_are_listed_are_seen():
    made = with_variants({"plain": {"evaluation": {"adapters": []}}, **WITH_TEXT["variants"]})
    for stage in ("slot_eval", "audit"):
        seen = {
            variant: [
                next(iter(entry))
                for entry in made.stage_settings(stage, variant)["evaluation"]["adapters"]
            ]
            for variant in made.variants
        }
        listed = ["lora", "slot", "ngram"]
        assert seen == {"plain": [], "causal": listed, "leaky": ["slot"]}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"evaluation": {"adapters": [{"slot": {"l2": 14}}]}},
         {"evaluation": {"adapters": [{"slot": {"l2": 14.0}}]}}),
        ({"evaluation": {"adapters": ["slot"]}}, {"evaluation": {"adapters": [{"slot": {}}]}}),
        ({"evaluation": {"adapters": [{"slot": {"clamp": 5, "l2": 3}}]}},
         {"evaluation": {"adapters": [{"slot": {"l2": 3, "clamp": 5}}]}}),
        ({"train": {"max_seconds": 5, "weight_decay": 0}},
         {"train": {"weight_decay": 0.0, "max_seconds": 5.0}}),
        ({"train": {"matrix_learning_rate": "1e-3"}}, {"train": {"matrix_learning_rate": 0.001}}),
        ({"runtime": {"compile": True}}, {"runtime": {"compile": "on"}}),
        ({"train": {"max_seconds": "null"}}, {"train": {"max_seconds": None}}),
        ({"gptq": {"quantizer": "gptq"}}, {"gptq": {"quantizer": {"gptq": {}}}}),
        ({"model": {"width": "32"}}, {"model": {"width": 32}}),
        ({"seeds": ["010"]}, {"seeds": [10]}),
    ],
)  # fmt: skip
def test_what_means_the_same_is_the_same_to_a_stage(one, other):
    made = [config(**changes) for changes in (one, other)]
    assert made[0].seeds == made[1].seeds
    for stage in STAGES:
        assert len({canonical(each.stage_settings(stage, "causal")) for each in made}) == 1


def numbers(kind: type[Settings], name: str) -> st.SearchStrategy:
    """Values for a plain numeric field, some of them outside its range."""
    default = kind.model_fields[name].default
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(0, 4096) | st.integers(0, 64).map(str)
    return st.floats(0, 1000, allow_nan=False) | st.integers(0, 3) | st.just("1e-3")


PLAIN_FIELDS = [
    (section, name)
    for section in ("train", "ttt", "gptq", "evaluation", "audit", "budgets")
    for name, field in section_class(section).model_fields.items()
    if isinstance(field.default, bool | int | float)
]


@st.composite
def changes_of_plain_fields(draw):
    changed: dict[str, dict] = {}
    for section, name in draw(st.lists(st.sampled_from(PLAIN_FIELDS), max_size=6, unique=True)):
        value = draw(numbers(section_class(section), name))
        changed.setdefault(section, {})[name] = value
    return changed


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(changes_of_plain_fields())
def test_settings_read_back_from_a_stages_json_are_the_same(changes):
    """A stage that gets `--settings` works as one that reads the config."""
    try:
        made = config(**changes)
    except UserError as error:
        assert "\n" not in str(error)
        return
    for variant in made.variants:
        for stage in STAGES.values():
            given_json = canonical(cut(made.sections(variant), stage))
            again = cut(sections_of(json.loads(given_json)), stage)
            assert canonical(again) == given_json


@settings(max_examples=60, deadline=None)
@given(changes_of_plain_fields(), changes_of_plain_fields())
def test_merging_is_by_key_and_the_later_value_counts(first, second):
    merged = merge(first, second)
    for section in {*first, *second}:
        expected = {**first.get(section, {}), **second.get(section, {})}
        assert merged[section] == expected
    assert merge(merged, second) == merged


# Variants and folders


def test_which_variants_run():
    assert list(with_variants("all").variants) == ["causal"]
    quickstart = {"recipe": "quickstart", "seeds": [1]}
    assert list(complete(quickstart).variants) == ["causal", "leaky"]
    for wanted in ("leaky", ["leaky"]):
        assert list(complete({**quickstart, "variants": wanted}).variants) == ["leaky"]
    for nothing in (None, "null"):
        changed = complete({**quickstart, "variants": {"leaky": nothing, "own": {"ttt": {}}}})
        assert list(changed.variants) == ["causal", "own"]
    replaced = complete({**quickstart, "variants": {"leaky": {"ttt": {"epochs": 4}}}})
    assert replaced.sections("leaky")["ttt"].epochs == 4
    assert replaced.sections("leaky")["ttt"].data == "train"


@pytest.mark.parametrize("section", VARIED)
def test_a_variant_may_change_any_section_but_those_of_all_variants(section):
    change = {"data": {"name": "other"}}.get(section, {})
    assert with_variants({"own": {section: change}}).sections("own")
    assert set(VARIED) == set(SECTIONS) - {"report", "gpus", "cluster"}


def test_stages_whose_settings_agree_share_a_folder():
    made = config()
    names = [stage.name for stage in stages_per("variant", on_request=True)]
    assert made.folders["causal"] == dict.fromkeys(names, "shared")
    assert made.folders["leaky"] == {
        **dict.fromkeys(("train", "ema"), "shared"),
        **dict.fromkeys(("ttt", "gptq", "slot_eval", "audit", "export"), "leaky"),
    }


def test_two_trainings_have_folders_of_their_own_from_train_on():
    made = with_variants(
        {"slow": {"train": {"matrix_learning_rate": 0.01}}, "wide": {"model": {"mlp_width": 96}}}
    )
    for variant, stages in made.folders.items():
        assert set(stages.values()) == {variant}


def test_variants_share_what_the_first_of_them_made():
    ttt = {"epochs": 3}
    made = with_variants(
        {"a": {"ttt": ttt}, "b": {"ttt": ttt, "gptq": {"dampening_fraction": 0.01}}}
    )
    assert folders(made, "ema") == {"a": "shared", "b": "shared"}
    assert folders(made, "ttt") == {"a": "a", "b": "a"}
    assert folders(made, "gptq") == {"a": "a", "b": "b"}


def test_a_sweep_is_every_combination():
    made = config(sweep={"gptq.dampening_fraction": [0.002, 0.01], "ttt.epochs": [1, 2]})
    assert list(made.variants) == [
        f"{variant}-dampening_fraction_{fraction}-epochs_{epochs}"
        for variant in ("causal", "leaky")
        for fraction in (0.002, 0.01)
        for epochs in (1, 2)
    ]
    one = made.sections("leaky-dampening_fraction_0.01-epochs_2")
    assert (one["gptq"].dampening_fraction, one["ttt"].epochs) == (0.01, 2)
    assert one["ttt"].data == "val"


def test_a_sweeps_values_share_what_they_do_not_reach():
    made = with_variants({"causal": {}}, sweep={"gptq.dampening_fraction": [0.002, 0.005, 0.01]})
    for stage in ("train", "ema", "ttt"):
        assert set(folders(made, stage).values()) == {"shared"}
    assert list(folders(made, "gptq").values()) == [
        "dampening_fraction_0.002",
        "shared",  # 0.005 is the default
        "dampening_fraction_0.01",
    ]


def test_a_stage_lies_under_the_names_of_what_reaches_it():
    made = config(sweep={"train.max_steps": [4, 5], "evaluation.lanes": [2, 3]})
    variant = "leaky-max_steps_4-lanes_3"
    assert made.folders[variant] == {
        **dict.fromkeys(("train", "ema"), "max_steps_4"),
        **dict.fromkeys(("ttt", "gptq"), "leaky-max_steps_4"),
        **dict.fromkeys(("slot_eval", "audit", "export"), variant),
    }
    lanes = [made.folders[name]["train"] for name in made.variants if "max_steps_4" in name]
    assert set(lanes) == {"max_steps_4"}


def test_what_is_added_changes_no_folder_that_was_there():
    sweep = {"ttt.epochs": [1, 2]}
    before = config(sweep=sweep).folders
    added = merge(WITH_TEXT, {"variants": {"third": {"ttt": {"frozen_blocks": 0}}}})
    for more in (
        complete({**added, "sweep": sweep}).folders,
        config(sweep={"ttt.epochs": [1, 2, 5]}).folders,
    ):
        assert len(more) > len(before)
        assert {name: more[name] for name in before} == before


def test_variants_need_not_be_valid_without_their_changes():
    """The text is each variant's own, so the config without a variant has none."""
    values = copy.deepcopy(WITH_TEXT)
    del values["data"]["paths"]
    own = {name: {"data": {"name": name, "paths": [f"{name}.jsonl"]}} for name in ("old", "new")}
    values["variants"] = {"causal": None, **own}
    made = complete(values)
    assert [made.dataset(name) for name in made.variants] == ["old", "new"]
    assert folders(made, "train") == {"old": "old", "new": "new"}


def test_folders_of_one_name_are_refused():
    """A variant where the sweep changes nothing, beside one that the sweep alone changes."""
    variants = {"epochs_3": {"ttt": {"frozen_blocks": 0}}, "plain": {}}
    made = with_variants(variants, sweep={"ttt.epochs": [1, 3]})
    with pytest.raises(UserError, match="two variants would share epochs_3/ttt: rename one"):
        assert made.folders


def test_two_datasets_under_one_name_are_refused():
    changes = {"variants": {"other": {"data": {"vocab_size": 400}}}}
    assert "variants.other changes `data` but not data.name 'tiny'" in refused(changes)
    changes["variants"]["other"]["data"]["name"] = "other"
    assert config(**changes).dataset("other") == "other"


# Named lists and classes of one's own

PLUGIN = '''
from fairway.evaluation.adapters.base import Adapted, Adapter


class Nothing(Adapter):
    """Leaves everything as it is."""

    title = "Nothing"

    class Settings(Adapter.Settings):
        weight: float = 0.5
        """Of nothing."""

    def adapt(self, batch, logits, scored):
        return Adapted(logits, scored)


class Other(Nothing):
    title = "Other"
'''


@pytest.fixture
def own_adapters(tmp_path, monkeypatch):
    """A module with two adapters beside a config."""
    (tmp_path / "own_adapters_of_recipes.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_adapters_of_recipes:Nothing", "own_adapters_of_recipes:Other"


def adapters(made, variant: str = "causal") -> list[str]:
    return made.sections(variant)["evaluation"].labels


def test_a_mapping_changes_the_entries_of_those_names(own_adapters):
    nothing, _ = own_adapters
    changes = {"adapters": {"lora": None, "slot": {"l2": 2.0}, nothing: {"weight": 0.25}}}
    with pytest.raises(UserError, match="Nothing changes logits, so it must come before"):
        config(evaluation=changes)
    changes["adapters"]["ngram"] = "null"
    made = config(evaluation=changes)
    assert adapters(made) == ["slot", "nothing"]
    slot, own = made.sections("causal")["evaluation"].adapters
    assert (slot.settings.l2, slot.settings.iterations) == (2.0, 5)
    assert own.settings.weight == 0.25


def test_without_a_list_the_mapping_goes_over_the_defaults(own_adapters):
    nothing, _ = own_adapters
    values = {
        "seeds": [1],
        "data": {"name": "text", "source": "embedded"},
        "evaluation": {"adapters": {"slot": {"l2": 3.0}}},
        "variants": {
            "plain": {"evaluation": {"adapters": {"slot": None, "lora": None}}},
            "own": {"evaluation": {"adapters": {"ngram": None, nothing: {}}}},
        },
    }
    made = complete(values)
    assert adapters(made) == ["lora", "slot", "ngram"]
    assert made.sections("causal")["evaluation"].adapters[1].settings.l2 == 3.0
    assert adapters(made, "plain") == ["ngram"]
    assert adapters(made, "own") == ["lora", "slot", "nothing"]


def test_a_list_replaces_a_list():
    made = with_variants({"own": {"evaluation": {"adapters": ["ngram"]}}})
    assert adapters(made, "own") == ["ngram"]


def test_a_class_in_place_of_another_takes_none_of_its_settings(own_adapters):
    first, second = ({name: {"weight": 0.1}} for name in ("a:B", "c:D"))
    assert merge({"quantizer": first}, {"quantizer": second}) == {"quantizer": second}
    changed = {"a:B": {"rank": 2}}
    both = {"a:B": {"weight": 0.1, "rank": 2}}
    assert merge({"quantizer": first}, {"quantizer": changed}) == {"quantizer": both}
    assert merge({"quantizer": "gptq"}, {"quantizer": second}) == {"quantizer": second}


def test_modules_beside_a_config_file_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "beside_the_config.py").write_text(PLUGIN)
    values = merge(WITH_TEXT, {"evaluation": {"adapters": ["beside_the_config:Nothing"]}})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert adapters(load_config([path])) == ["nothing"]


# Faults


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sead": 1}, "config: unknown key sead; did you mean seeds?; allowed: run, recipe"),
        ({"trian": {}}, "config: unknown key trian; did you mean train?"),
        ({"slot_eval": {"windows": 1}}, "config: unknown key slot_eval"),
        ({5: 1}, "config: found the key 5, expected text"),
        ({None: 1}, "config: found the key None, expected text"),
        ({"evaluation": {"windows": 1}}, "evaluation: unknown key windows"),
        ({"evaluation": {"stride": 1}}, "did you mean stride_tokens?; allowed: window_tokens"),
        ({"evaluation": {"adapters": {"slot": {"windows": 1}}}},
         "evaluation.adapters.slot: unknown key windows; did you mean batch_windows?; allowed:"),
        ({"evaluation": {"adapters": {"slot": {"lanes": 1}}}},
         "evaluation.adapters.slot: unknown key lanes; allowed: scope, batch_windows"),
        ({"evaluation": {"adapters": {"lora": {"alpha": 1}}}},
         "evaluation.adapters.lora: unknown key alpha; allowed: rank, projections"),
        ({"variants": {"leaky": {"ttt": {"epoch": 3}}}},
         "variants.leaky: ttt: unknown key epoch; did you mean epochs?"),
        ({"variants": {"leaky": {"trian": {}}}},
         "variants.leaky: unknown key trian; did you mean train?; allowed: data"),
        ({"variants": {"leaky": {"report": {}}}}, "variants.leaky: unknown key report;"),
        ({"train": {"max_steps": "many"}}, "train.max_steps: found 'many', expected a whole"),
        ({"train": {"max_seconds": "soon"}}, "train.max_seconds: found 'soon', expected a number"),
        ({"model": {"width": -32}}, "model.width: found -32, expected at least 1"),
        ({"model": {"layers": 0}}, "model.layers: found 0, expected at least 1"),
        ({"model": {"layers": 2.5}}, "model.layers: found 2.5, expected a whole number"),
        ({"model": {"layers": True}}, "model.layers: found 'true', expected a whole number"),
        ({"model": {"rope_base": True}}, "model.rope_base: found 'true', expected a number"),
        ({"model": {"rope_base": float("nan")}}, "found nan, expected a finite number"),
        ({"model": {"value_layers": [True]}}, "model.value_layers.0: found 'true', expected"),
        ({"train": {"checkpoint_seconds": 0}}, "found 0, expected more than 0"),
        ({"train": {"ema_decays": [1.0]}}, "train.ema_decays.0: found 1.0, expected less than 1"),
        ({"train": {"ema_decays": []}}, "train.ema_decays: found [], expected a list of at"),
        ({"ttt": {"final_learning_rate_fraction": 2}}, "found 2, expected at most 1"),
        ({"seeds": []}, "seeds: found [], expected a list of at least 1"),
        ({"seeds": [1, 1]}, "seeds: found [1, 1], expected each once"),
        ({"seeds": 7}, "seeds: found 7, expected a list"),
        ({"seeds": {}}, "seeds: found {}, expected a list"),
        ({"seeds": [-1]}, "seeds.0: found -1, expected at least 0"),
        ({"seeds": [2**32]}, "seeds.0: found 4294967296, expected less than 4294967296"),
        ({"seeds": [True]}, "seeds.0: found 'true', expected a whole number"),
        ({"run": "a b"}, "run: found 'a b', expected text matching"),
        ({"run": "../x"}, "run: found '../x', expected text matching"),
        ({"results": ""}, "results: found '', expected text of at least 1 characters"),
        ({"recipe": "quikstart"}, "recipe: found 'quikstart', expected one of frontier,"),
        ({"recipe": "quikstart"}, "did you mean quickstart?"),
        ({"recipe": 5}, "recipe: found '5', expected one of"),
        ({"recipe": []}, "recipe: found [], expected text"),
        ({"recipe": "none/such.yaml"}, "none/such.yaml could not be read: No such file"),
        ({"ema": {"kind": "average"}}, "ema.kind: found 'average', expected one of ema, swa, none"),
        ({"runtime": {"compile": 1}}, "runtime.compile: found 1, expected one of auto, on, off"),
        ({"runtime": {"device": "gpu"}}, "runtime.device: found 'gpu', expected one of auto, cpu"),
        ({"data": {"paths": []}}, "data.source is 'jsonl' but data.paths is empty"),
        ({"data": {"source": "shards", "paths": []}},
         "data.source is 'shards' but data.folder is not set"),
        ({"data": {"source": "jsnl"}}, "data.source: found 'jsnl', expected one of embedded"),
        ({"data": {"source": "jsnl"}}, "did you mean jsonl?"),
        ({"model": {"heads": 3}}, "model.heads 3 does not divide model.width 32"),
        ({"model": {"kv_heads": 3}}, "model.kv_heads 3 does not divide model.heads 4"),
        ({"model": {"rotary_dimensions": 10}}, "must be even and at most the head width 8"),
        ({"model": {"rotary_dimensions": 3}}, "model.rotary_dimensions 3 must be even"),
        ({"model": {"value_layers": [3]}}, "value_layers names block 3, but model.layers is 3"),
        ({"train": {"batch_tokens": 250}}, "train.sequence_tokens 32 does not divide"),
        ({"ema": {"decay": 0.123}}, "ema.decay 0.123 is not tracked: choose auto or one of"),
        ({"ttt": {"frozen_blocks": 4}}, "ttt.frozen_blocks"),
        ({"gptq": {"quantizer": "gtpq"}}, "did you mean gptq?"),
        ({"evaluation": {"stride_tokens": 64}}, "evaluation.stride_tokens 64 is larger than"),
        ({"evaluation": {"lanes": 0}}, "evaluation.lanes: found 0, expected at least 1"),
        ({"evaluation": {"adapters": {"slot": {"focal_tokens": "most"}}}},
         "evaluation.adapters.slot.focal_tokens: found 'most', expected one of"),
        ({"evaluation": {"adapters": {"slot": {"focal_tokens": 8}}}}, "slot.focal_tokens"),
        ({"variants": {"leaky": {"evaluation": {"adapters": {"slot": {"focal_tokens": 4}}}}}},
         "variants.leaky: evaluation.adapters.slot.focal_tokens"),
        ({"evaluation": {"adapters": ["slot", "slot"]}}, "evaluation.adapters names slot twice"),
        ({"evaluation": {"adapters": ["slot", "lora"]}},
         "evaluation.adapters.lora computes logits anew and would drop"),
        ({"variants": {"leaky": {"evaluation": {"adapters": [
            {"lora": {"rank": 2, "chunk_tokens": 16, "context_tokens": 32}},
            {"slot": {"scope": "batch"}}]}}}},
         "variants.leaky: evaluation.adapters: found [lora, slot], one of which scores several"),
        ({"evaluation": {"adapters": [{"slot": {"scope": "batch", "context_logits": "scored"}}]}},
         "evaluation.adapters.slot.context_logits 'scored' needs scope 'window'"),
        ({"evaluation": {"adapters": {"lora": {"projections": ["gate"]}}}},
         "evaluation.adapters.lora.projections.0: found 'gate', expected one of"),
        ({"evaluation": {"adapters": {"lora": {"projections": ["up", "up"]}}}},
         "evaluation.adapters.lora.projections is ['up', 'up']: expected each once"),
        ({"evaluation": {"adapters": {"lora": {"projections": []}}}}, "or set scales"),
        ({"evaluation": {"adapters": {"lora": {"chunk_tokens": 12}}}},
         "lora.chunk_tokens 12 is not a multiple of evaluation"),
        ({"evaluation": {"adapters": {"lora": {"chunk_tokens": 40}}}}, "expected chunk_tokens"),
        ({"evaluation": {"adapters": {"lora": {"context_tokens": 8}}}},
         "lora.context_tokens is 8: expected"),
        ({"evaluation": {"adapters": {"lora": {"context_tokens": 33}}}},
         "lora.context_tokens is 33: expected"),
        ({"evaluation": {"adapters": {"lora": {"rank": 0}}}},
         "evaluation.adapters.lora.rank: found 0, expected at least 1"),
        ({"evaluation": {"adapters": {"lora": {"learning_rate": 0}}}},
         "lora.learning_rate: found 0, expected more than 0"),
        ({"evaluation": {"adapters": {"lora": {"betas": [0.9, 1]}}}},
         "lora.betas.1: found 1, expected less than 1"),
        ({"evaluation": {"adapters": {"lora": {"betas": [0.9]}}}}, "lora.betas"),
        ({"sweep": {"ttt": [3]}}, "sweep: found ttt: [3], expected section.key: [values]"),
        ({"sweep": {"tt.epochs": [3]}}, "did you mean ttt?"),
        ({"sweep": {"ttt.epochs": []}}, "sweep: found ttt.epochs: [], expected section.key"),
        ({"sweep": {"ttt.epochs": 3}}, "sweep.ttt.epochs: found 3, expected a list"),
        ({"sweep": {"ttt.epochz": [3]}}, "ttt: unknown key epochz; did you mean epochs?"),
        ({"sweep": {"ttt.epochs": [1, 1]}}, "two variants would be named causal-epochs_1"),
        ({"sweep": {"report.significance": [0.1]}}, "sweep: found report.significance, expected"),
    ],
    ids=str,
)  # fmt: skip
def test_a_fault_is_told_in_one_line_with_its_key(changes, message):
    assert message in refused(changes)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"causal": None}, "variants: none is left, expected at least one"),
        ({"causal": "null"}, "variants: none is left"),
        ([], "variants: none is left"),
        (
            ["casual"],
            "variants: found 'casual', expected one of the recipe's, causal; did you",
        ),
        ("casual", "did you mean causal?"),
        (3, "variants: found '3', expected one of the recipe's"),
        (None, "variants: found None, expected text or a list or a mapping of keys"),
        ({"shared": {}}, "variants: found the name 'shared', expected text matching"),
        ({"a b": {}}, "variants: found the name 'a b', expected text matching"),
        ({"a\n": {}}, "variants: found the name 'a\\n', expected text matching"),
        ({"": {}}, "variants: found the name '', expected text matching"),
        ({"own": 3}, "variants.own: found 3, expected a mapping of sections"),
        ({"own": {"train": 5}}, "variants.own: train: found 5, expected a mapping of keys"),
    ],
    ids=str,
)
def test_variants_that_cannot_be_are_told_in_one_line(variants, message):
    with pytest.raises(UserError) as error:
        with_variants(variants)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_key_is_named():
    values = {key: value for key, value in WITH_TEXT.items() if key != "seeds"}
    with pytest.raises(UserError, match="config: missing key seeds$"):
        complete(values)
    for key in ("name", "source"):
        data = {name: value for name, value in WITH_TEXT["data"].items() if name != key}
        with pytest.raises(UserError, match=f"data: missing key {key}$"):
            complete({**WITH_TEXT, "data": data})


WRONG = [3, -1, 1.5, True, None, "null", "text", "", [], [3], [None], [[]], {}, {"x": 1}, {3: 4}]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_value_of_any_type_anywhere_is_taken_or_refused_in_one_line(value):
    """Every key of every level, each given everything that YAML can hold."""
    places = [
        ("x",),
        *((name,) for name in (*TINY_CONFIG, "recipe", "results", "sweep", *SECTIONS)),
    ]
    places += [(name, key) for name in SECTIONS for key in section_class(name).model_fields]
    places += [
        ("variants", "own"),
        ("variants", "own", "train"),
        ("variants", "own", "evaluation", "adapters"),
        ("sweep", "ttt.epochs"),
        ("evaluation", "adapters", "lora"),
        ("evaluation", "adapters", "lora", "betas"),
        ("evaluation", "adapters", "ngram", "caches"),
        ("gptq", "quantizer", "gptq"),
        ("data", "source", "jsonl"),
    ]
    for place in places:
        changes = value
        for key in reversed(place):
            changes = {key: changes}
        try:
            assert config(**changes).folders, place
        except UserError as error:
            assert "\n" not in str(error), place
            assert len(str(error)) < LONGEST_MESSAGE, place
