"""Whatever a config says is taken in its plain sense or refused at once, in one line."""

import math
import os
import time
from argparse import Namespace
from collections import Counter

import pytest

import malformed_configs
from fairway.errors import UserError
from fairway.recipe import complete, load_config, read_yaml, sections_of, typed_values
from fairway.settings import merge
from fairway.stage import stage_settings
from fairway.stages import STAGES
from malformed_configs import BOMB, laid

BASE = malformed_configs.BASE
SOON_SECONDS = 5


def refused(call, *arguments) -> str:
    """The one line of a refusal."""
    started = time.process_time()
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert time.process_time() - started < SOON_SECONDS
    message = str(error.value)
    assert message.isprintable() and len(message) < malformed_configs.LONGEST_MESSAGE
    return message


def with_changes(**changes):
    return complete(merge(BASE, changes))


# The campaign


def outcomes(seed: int, count: int) -> Counter:
    found = list(malformed_configs.tries(seed, count))
    faults = [": ".join(one) for one in found if one[0] not in ("accepted", "refused")]
    assert not faults, "\n".join(faults[:20])
    return Counter(outcome for outcome, _ in found)


def test_a_sample_of_configs_is_accepted_or_refused_in_one_line():
    counted = outcomes(seed=13, count=150)
    assert counted["accepted"] > 10 and counted["refused"] > 75


@pytest.mark.many
@pytest.mark.parametrize("seed", [1, 2])
def test_many_configs_are_accepted_or_refused_in_one_line(seed):
    counted = outcomes(seed, 2000)
    print(f"malformed configs, seed {seed}: {dict(counted)}")
    assert counted["accepted"] > 100 and counted["refused"] > 1000


# Files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: café".encode("latin-1"), "could not be read: byte 9 is not UTF-8: save it as UTF-8"),
        ("run: x".encode("utf-16"), "could not be read: byte 1 is not UTF-8"),
        (b"run: x\0", "is not YAML: unacceptable character #x0000"),
        (b"", "holds nothing, expected a mapping of keys"),
        (b"- run", "holds list, expected a mapping of keys"),
        (b"run: x\nrun: y", "is not YAML: found the key 'run' twice, line 2, column 1"),
        (b"train: {max_steps: 1, max_steps: 2}", "found the key 'max_steps' twice, line 1"),
        (b"run: x\n---\nrun: y", "expected a single document in the stream, but found another"),
        (b"run: !!python/object:os.system ls", "is not YAML: found a tag, line 1, column 6"),
        (b"seeds: [!!int '7']", "is not YAML: found a tag"),
        (b'run: "\\UFFFFFFFF"', "is not YAML: "),
        (b"run: " + b"[" * 2000, "is not YAML: it is nested too deeply"),
        (b"run: " + b"[" * 100 + b"]" * 100, "more than 20 levels of nesting"),
        (b"seeds: [" + b"1" * 5000 + b"]", "seeds.0: found text of 5,000 characters"),
        (BOMB, "found more than 100,000 values, aliases counted where they stand"),
        (b"variants: &a {x: *a}", "more than 20 levels of nesting"),
        (b"x" * 10**6, "could not be read: it has more than 262,144 bytes"),
        (b"yes: 1\ntrue: 1", "found the key True, expected text: quote it"),
        (b"1: 2", "found the key 1, expected text"),
        (b"train: {~: 1}", "train: found the key None, expected text"),
        (b"? [1]\n: 2", "is not YAML: "),
        (b"{1: 2}: 3", "is not YAML: "),
        (b"train: {max_seconds: 1e999}", "train.max_seconds: found inf, expected a finite number"),
    ],
    ids=lambda one: repr(one[:25]) if isinstance(one, bytes) else "",
)
def test_a_file_that_is_no_config_is_named_with_the_fault(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    told = refused(read_yaml, path)
    assert told.startswith(str(path)) and message in told


def test_configs_and_recipes_are_read_alike(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(BOMB)
    told = refused(read_yaml, path)
    assert refused(load_config, [path]) == told
    assert refused(complete, {"recipe": str(path), "seeds": [1]}) == told


def test_a_byte_order_mark_and_merge_keys_are_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name in ("pipe.yaml", "zero.yaml"):
        assert f"{name} could not be read: it is no file" in refused(read_yaml, tmp_path / name)
    assert "loop.yaml could not be read" in refused(read_yaml, tmp_path / "loop.yaml")
    assert "could not be read: it is a folder" in refused(read_yaml, tmp_path)
    assert "could not be read: File name too long" in refused(read_yaml, "x" * 300)
    assert "could not be read: embedded null byte" in refused(read_yaml, "a\0b.yaml")


# Numbers


def places_of(*kinds: type) -> list[tuple]:
    """The path of every key of a section whose type has one of these."""
    return [
        place.path
        for place in malformed_configs.places()
        if place.path[:1] not in ((), ("variants",), ("sweep",))
        and set(kinds) & set(malformed_configs.parts_of(place.annotation))
    ]


NO_NUMBERS = (
    math.nan, math.inf, -math.inf, ".nan", ".inf", "nan", "inf", "1e999", 10**400, "9" * 400, True
)  # fmt: skip


@pytest.mark.slow
def test_no_key_takes_a_number_that_is_none():
    paths = places_of(int, float)
    assert len(paths) > 70
    for path in paths:
        for value in NO_NUMBERS:
            for one in (value, [value]):
                told = refused(complete, merge(BASE, laid(path, one)))
                assert told.startswith(path[0]) and ": found " in told, (path, told)


def test_whole_numbers_are_written_as_such_everywhere():
    paths = [path for path in places_of(int) if path not in places_of(float)]
    assert len(paths) > 40
    for path in paths:
        for value in (2.0, "2.0", 1e3, "1e3", 2**63, -(2**70)):
            told = refused(complete, merge(BASE, laid(path, value)))
            assert told.startswith(path[0]) and ": found " in told, (path, told)


def test_a_number_that_text_would_not_keep_is_refused():
    for path in (("run",), ("data", "name"), ("data", "revision"), ("report", "baseline", "name")):
        told = refused(complete, merge(BASE, laid(path, 1234e5)))
        assert told == f"{'.'.join(path)}: found the number 123400000.0, expected text: quote it"


# Names and paths


@pytest.mark.parametrize(
    "name",
    ["xy" * 101, "a" + "b" * 20, "xyz" * 20, "a\n", "a\nb", "a b", ".", "..", "-a", "ä", "a/b", ""],
)
def test_names_of_folders(name):
    for path in (("run",), ("data", "name")):
        told = refused(complete, merge(BASE, laid(path, name)))
        assert told.startswith(f"{'.'.join(path)}: found ")
    assert refused(complete, merge(BASE, {"variants": {name: {}}})).startswith("variants: found")


def test_names_that_a_file_system_may_not_tell_apart():
    told = refused(complete, merge(BASE, {"variants": {"Causal": {}}}))
    assert told.startswith("variants: two variants would be named Causal")
    other = {"variants": {"other": {"data": {"name": "TINY", "vocab_size": 400}}}}
    assert "variants.other changes `data` but not data.name 'TINY'" in refused(
        complete, merge(BASE, other)
    )
    for name in ("data", "logs"):  # of all runs
        assert f"run: found '{name}'" in refused(complete, merge(BASE, {"run": name}))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("results/", "results"),
        ("a//b", "a/b"),
        ("./results", "results"),
        ("../x", "../x"),
        ("/a/b/", "/a/b"),
        ("//a/./b", "/a/b"),
        ("a b'c", "a b'c"),
        (".", "."),
    ],
)
def test_paths_are_taken_in_the_plain_sense(written, meant):
    assert with_changes(results=written).results == meant
    data = with_changes(data={"paths": [written]}).sections("causal")["data"]
    assert data.paths == (meant,)


@pytest.mark.parametrize(
    "path",
    ["", " ", "a ", "{x}", "a{", "*", "a?", "-a", "~/x", "a\nb", "a\n", "a\0", "\ud800", "x" * 256],
)
def test_paths_that_nobody_means_are_refused(path):
    for key, value in (("paths", [path]), ("tokenizer", path), ("folder", path)):
        told = refused(complete, merge(BASE, {"data": {key: value}}))
        assert told.startswith(f"data.{key}")
    for key in ("results", "recipe"):
        assert refused(complete, merge(BASE, {key: path})).startswith(f"{key}: found ")


# How many


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": list(range(10**6))}, "seeds: found more than 100,000 values"),
        ({"seeds": list(range(5000))}, "seeds: found 10,000 combinations with seeds and variants"),
        ({"sweep": {"ttt.epochs": list(range(1, 1001)), "train.max_steps": list(range(1, 1001))}},
         "sweep: found 2,000,000 combinations with seeds and variants, expected at most 2,000"),
        ({"sweep": {f"gptq.key{number}": [1] for number in range(20)}},
         "sweep: found 20 keys, expected at most 6"),
        ({"sweep": {"data.revision": ["x" * 300]}}, "sweep: found the name 'causal-revision_xxx"),
        ({"seeds": [2**70]}, "seeds.0: found 1180591620717411303424, expected at most 64 bits"),
        ({"seeds": [42.0]}, "seeds.0: found 42.0, expected a whole number"),
        ({"seeds": {1: 2}}, "seeds: found the key 1, expected text"),
        ({"seeds": 7}, "seeds: found 7, expected a list"),
    ],
    ids=lambda one: str(one)[:40],
)  # fmt: skip
def test_seeds_and_sweeps_that_would_never_end(changes, message):
    assert refused(complete, merge(BASE, changes)).startswith(message)


def test_a_large_sweep_is_made_in_seconds():
    started = time.process_time()
    sweep = {"train.max_steps": list(range(1, 13)), "ttt.epochs": list(range(1, 13))}
    made = with_changes(sweep=sweep)
    assert len(made.folders) == 288
    assert time.process_time() - started < 4 * SOON_SECONDS


# The command line


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model={layers: 2.0}", "model.layers: found '2.0', expected a whole number"),
        ("train={max_seconds: .inf}", "train.max_seconds: found '.inf', expected a number"),
        ("train={max_seconds: inf}", "train.max_seconds: found 'inf', expected a finite number"),
        ("train={max_steps: 1, max_steps: 2}", "train: found '{max_steps: 1, max_steps: 2}'"),
        ("seeds=" + "1" * 5000, "seeds: found text of 5,000 characters"),
        ("sweep=" + "[" * 1000, "sweep: found '[[[["),
        ("sweep={ttt.epochs: [&a [x,x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a],"
         "&c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b], &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c],"
         "&e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]]}", "sweep: found more than 100,000 values"),
        ("variants=&a {x: *a}", "variants: found '&a {x: *a}'"),
        ("run=!x y", "run: found '!x y'"),
        ("results=a\nb", "results: found 'a\\nb', expected a path without line breaks"),
        ("run=a\n", "run: found 'a\\n', expected text matching"),
    ],
    ids=lambda one: str(one)[:30],
)  # fmt: skip
def test_config_arguments(argument, message):
    assert refused(lambda: complete(merge(BASE, typed_values([argument])))).startswith(message)


def settings(text: str, **options):
    stage = STAGES["ema"]
    return sections_of(stage_settings(stage, Namespace(settings=text, config=None, **options)))


@pytest.mark.parametrize("seed", [-1, 2**32, 10**400])
def test_seeds_that_no_run_can_have(seed):
    with pytest.raises(UserError, match="--seed: found .*, expected 0 to 4294967295"):
        settings("{}", seed=seed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--settings is not JSON: Expecting value"),
        ("{ema", "--settings is not JSON: "),
        ("[]", "--settings: found [], expected the sections ['ema', 'runtime']"),
        ("7", "--settings: found 7, expected the sections"),
        ("null", "--settings: found None, expected the sections"),
        ('{"ema": {}}', "--settings: found ['ema'], expected the sections ['ema', 'runtime']"),
        ('{"ema": {}, "runtime": {}, "x": {}}', "--settings: found ['ema', 'runtime', 'x']"),
        ('{"ema": 3, "runtime": {}}', "ema: found 3, expected a mapping of keys"),
        (
            '{"ema": {}, "ema": {}, "runtime": {}}',
            "--settings is not JSON: it has the key 'ema' tw",
        ),
        ('{"ema": {"decay": NaN}, "runtime": {}}', "--settings is not JSON: it has the number NaN"),
        (
            '{"ema": {"decay": 1e999}, "runtime": {}}',
            "--settings is not JSON: it has the number 1e",
        ),
        (
            '{"ema": {"decay": ' + "1" * 5000 + '}, "runtime": {}}',
            "--settings is not JSON: it has ",
        ),
        (
            '{"ema": {"decay": ' + "1" * 30 + '}, "runtime": {}}',
            "--settings: ema.decay: found 1111",
        ),
        ("[" * 100_000, "--settings is not JSON: it is nested too deeply"),
        ("[" * 50 + "]" * 50, "--settings: 0.0.0.0"),
        ("\ud800", "--settings is not JSON: "),
    ],
    ids=lambda one: str(one)[:30],
)
def test_settings_that_no_stage_can_have(text, message):
    assert refused(settings, text).startswith(message)
