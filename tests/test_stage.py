"""The frame of every stage script: options, settings, seconds, metrics.json, provenance.json."""

import argparse
import errno
import gc
import json
import os
import signal
import sys
import time

import pytest
import torch
from pydantic import ValidationError

from fairway.distributed import World
from fairway.errors import UserError
from fairway.files import sha256_of
from fairway.metrics import METRICS, Metrics, checked_metrics
from fairway.recipe import complete, section_class
from fairway.report.results import FINAL_STAGE
from fairway.settings import merge
from fairway.stage import StageRun, run_stage, stage_parser, stage_settings, user_errors
from fairway.stages import STAGES, Stage, chain, stages_per
from producers import write_record
from provenance_chain import edit
from tiny import TINY_CONFIG

CONFIG = merge(TINY_CONFIG, {"data": {"paths": ["text.jsonl"]}})
OWN = Stage("own", "A stage of mine", sections=("ttt",), needs=("tokenize", "ema"), products=("x",))
WORLD = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _signals():
    """Scripts change what a closed pipe does."""
    on_pipe = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, on_pipe)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(CONFIG))
    return path


def arguments(stage: Stage, folder, *source) -> list[str]:
    """The options of a stage whose inputs lie in `folder`."""
    options = [*source, "--output", folder / "shared" / stage.name]
    if stage.per == "variant":
        options += ["--seed", 7]
    for name in stage.needs if stage.per != "run" else ():
        options += [f"--{name}", folder / name]
    return [str(one) for one in options]


# Options and settings


@pytest.mark.parametrize("name", STAGES)
def test_a_stages_options_follow_from_its_row(name, tmp_path, config_file):
    stage = STAGES[name]
    options = stage_parser(stage, "What it does.").parse_args(
        arguments(stage, tmp_path, "--config", config_file)
    )
    takes = set(stage.needs) if stage.per != "run" else set()
    assert {one for one in STAGES if hasattr(options, one)} == takes
    assert hasattr(options, "seed") == (stage.per == "variant")
    settings = stage_settings(stage, options)
    assert settings == complete(CONFIG).stage_settings(name, "causal")
    told = arguments(stage, tmp_path, "--settings", json.dumps(settings))
    assert stage_settings(stage, stage_parser(stage, None).parse_args(told)) == settings


def test_settings_are_those_of_the_variant(tmp_path, config_file):
    stage = STAGES["ttt"]
    given = arguments(stage, tmp_path, "--variant", "leaky", "--config", config_file)
    options = stage_parser(stage, None).parse_args(given)
    assert stage_settings(stage, options)["ttt"]["data"] == "val"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "--settings is not JSON: "),
        ("5", "--settings: found 5, expected the sections ['runtime', 'ttt']"),
        ("[]", "--settings: found [], expected the sections"),
        ("{}", "--settings: found [], expected the sections"),
        ('{"ttt": {}}', "--settings: found ['ttt'], expected the sections ['runtime', 'ttt']"),
        ('{"ttt": {}, "runtime": {}, "ema": {}}', "found ['ema', 'runtime', 'ttt'], expected"),
        ('{"ttt": {"epoch": 1}, "runtime": {}}', "ttt: unknown key epoch; did you mean epochs?"),
        ('{"ttt": 5, "runtime": {}}', "ttt: found 5, expected a mapping of keys"),
        ('{"ttt": {}, "runtime": 5}', "runtime: found 5, expected a mapping of keys"),
    ],
)
def test_settings_that_are_not_the_stages_are_told_in_one_line(text, message, tmp_path, capsys):
    def work(stage):
        raise AssertionError("it must not start")

    with pytest.raises(SystemExit) as exit_:
        run_stage("ttt", work, None, arguments(STAGES["ttt"], tmp_path, "--settings", text))
    assert exit_.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_exactly_one_source_of_settings(tmp_path, config_file, capsys):
    stage = STAGES["ttt"]
    for source in ([], ["--config", config_file, "--settings", "{}"]):
        with pytest.raises(SystemExit) as exit_:
            stage_parser(stage, None).parse_args(arguments(stage, tmp_path, *source))
        assert exit_.value.code == 2
        assert "--settings" in capsys.readouterr().err


def test_a_script_may_add_options_and_gets_settings_as_objects(tmp_path, config_file):
    seen = []
    given = arguments(STAGES["ttt"], tmp_path, "--config", config_file)
    run_stage(
        "ttt", seen.append, "Words.", [*given, "--more", "3"],
        add_options=lambda parser: parser.add_argument("--more", type=int),
    )  # fmt: skip
    (stage,) = seen
    assert stage.options.more == 3
    assert (stage.seed, stage.folder) == (7, "shared")
    assert stage.settings.ttt.epochs == 1 and stage.settings.runtime.device == "cpu"
    assert not hasattr(stage.settings, "train")
    assert stage.inputs == {name: tmp_path / name for name in ("tokenize", "ema")}


def test_the_collector_that_the_launcher_switched_off_works_again(tmp_path, config_file):
    seen = []
    gc.disable()
    try:
        run_stage(
            "ttt", lambda stage: seen.append(gc.isenabled()), None,
            arguments(STAGES["ttt"], tmp_path, "--config", config_file),
        )  # fmt: skip
        assert seen == [True] and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.enable()


# Errors


@pytest.mark.parametrize(
    ("rank", "start"), [(None, "error: "), ("0", "error: "), ("3", "(rank 3): ")]
)
def test_a_users_error_is_one_line(rank, start, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as exit_, user_errors():
        raise UserError("no such thing")
    assert exit_.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert start in line and line.endswith("no such thing")


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), user_errors():
        print(1 // 0)


def failed(error: BaseException, capsys, stage: Stage | None = None, status: int = 1) -> str:
    """The one line that a script whose work raises `error` leaves."""
    with pytest.raises(SystemExit) as exit_, user_errors(stage):
        raise error
    assert exit_.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    return line


def caused_by(cause: Exception, error: Exception) -> Exception:
    error.__cause__ = cause
    return error


NO_MEMORY = [
    MemoryError(),
    MemoryError("Unable to allocate 191. MiB for an array with shape (100000000,)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has\na total"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("can't start new thread"),
    RuntimeError("std::bad_alloc"),
    SystemError("error return without exception set"),
    ImportError("libscipy_openblas.so: failed to map segment from shared object"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    caused_by(MemoryError("malloc of size 128 failed"), UserError("x.parquet is damaged")),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_lack_of_memory_is_one_line_with_the_keys_to_lower(error, capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    error.add_note("the last good checkpoint is here")
    line = failed(error, capsys, STAGES["train"])
    assert line.startswith("error: there is too little memory or no thread to be had (")
    assert "lower train.micro_batch_sequences or model.width, or " in line
    assert line.endswith("; the last good checkpoint is here")


def test_the_keys_to_lower_are_keys_of_the_config():
    for stage in STAGES.values():
        for key in stage.memory:
            section, _, name = key.partition(".")
            assert name in section_class(section).model_fields, key


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_log_that_cannot_be_written_is_one_line(number, capsys):
    line = failed(OSError(number, os.strerror(number)), capsys)
    assert line == (
        f"error: a file could not be written (OSError: [Errno {number}] {os.strerror(number)}): "
        "free disk space"
    )


def test_ctrl_c_is_one_line(capsys):
    assert "interrupted" in failed(KeyboardInterrupt(), capsys)


LOST = [
    RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:6030"),
    RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
    torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0"),
    torch.distributed.DistNetworkError("failed to recv, got 0 bytes"),
]


@pytest.mark.parametrize("error", LOST, ids=str)
def test_the_loss_of_another_process_is_one_line(error, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = failed(error, capsys, STAGES["ttt"])
    assert "another process of this stage is gone" in line and "ttt.batch_sequences" in line
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError), user_errors():
        raise error


@pytest.mark.parametrize("name", ["weights.safetensors", "provenance.json"])
def test_a_folder_in_a_products_place_is_refused_before_any_work(
    name, tmp_path, config_file, capsys
):
    given = arguments(STAGES["ttt"], tmp_path, "--config", config_file)
    (tmp_path / "shared/ttt" / name).mkdir(parents=True)
    with pytest.raises(SystemExit):
        run_stage("ttt", lambda stage: pytest.fail("it must not start"), None, given)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} is a folder, expected to write a file there" in line


# Seconds, metrics, provenance


def parent(folder, name: str, splits: list[str]):
    """A stage's folder with a product and the provenance that says which splits it knows."""
    (folder / name).mkdir()
    (folder / name / "product").write_text(name)
    write_record(folder / name, splits)
    return folder / name


@pytest.fixture
def own_run(tmp_path):
    """A run of OWN whose inputs know training text."""
    parent(tmp_path, "tokenize", [])
    parent(tmp_path, "ema", ["train"])
    settings = {"ttt": complete(CONFIG).stage_settings("ttt")["ttt"]}
    options = argparse.Namespace(
        seed=7, output=tmp_path / "shared/own", tokenize=tmp_path / "tokenize", ema=tmp_path / "ema"
    )
    options.output.mkdir(parents=True)
    return StageRun(OWN, options, settings, WORLD)


def test_seconds_are_charged_to_budgets(own_run):
    with own_run.charge("training"):
        time.sleep(0.02)
    with own_run.charge("training"):
        time.sleep(0.02)
    own_run.add_seconds("training", 5.0)
    own_run.add_seconds("evaluation", 3.0)
    (own_run.output / "x").write_text("made")
    own_run.finish({})
    metrics = json.loads((own_run.output / "metrics.json").read_text())
    assert 5.04 <= metrics["training_seconds"] < 6
    assert metrics["evaluation_seconds"] == 3.0
    assert 0.04 <= metrics["seconds"] < 5
    with pytest.raises(KeyError):
        own_run.add_seconds("lunch", 1.0)


def test_a_stage_of_ones_own_says_what_it_likes(own_run):
    (own_run.output / "x").write_text("made")
    own_run.finish({"mine": [1, 2], "processes": 4})
    metrics = json.loads((own_run.output / "metrics.json").read_text())
    assert metrics["mine"] == [1, 2]
    assert metrics["processes"] == 4  # a stage knows better
    assert set(Metrics.model_fields) <= set(metrics)
    assert (metrics["stage"], metrics["seed"], metrics["folder"]) == ("own", 7, "shared")


def test_provenance_says_what_went_in_and_what_came_out(own_run, tmp_path):
    taken = own_run.take("ema", "product")
    outside = tmp_path / "text.jsonl"
    outside.write_text("{}")
    own_run.note_inputs([outside])
    for name in ("x", "more"):
        (own_run.output / name).write_text(name)
    own_run.finish({}, splits_read=["val"], products=["more"])
    found = json.loads((own_run.output / "provenance.json").read_text())
    parents = [str(tmp_path / name / "provenance.json") for name in ("tokenize", "ema")]
    assert (found["stage"], found["seed"]) == ("own", 7)
    assert found["settings"] == own_run.plain_settings
    assert found["parents"] == parents
    assert set(found["inputs"]) == {str(taken), str(outside), *parents}
    assert set(found["outputs"]) == {"x", "more", "metrics.json"}
    assert all(sha256_of(path) == digest for path, digest in found["inputs"].items())
    assert all(sha256_of(own_run.output / name) == found["outputs"][name] for name in ("x", "more"))
    assert found["splits"] == ["train", "val"]  # its parents' and its own
    assert found["splits_read"] == ["val"]


def test_a_missing_input_names_the_stage_that_makes_it(own_run):
    with pytest.raises(UserError, match="the ema stage; run `snakemake --cores 2 ema`"):
        own_run.take("ema", "weights.safetensors")


def flip_a_bit(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("product", flip_a_bit, "product has changed since it was made: found SHA-256 "),
        ("product", lambda path: path.write_bytes(b""), "found SHA-256 e3b0c44298fc, "),
        ("product", lambda path: path.write_text("emaema"), "has changed since it was made"),
        ("provenance.json", lambda path: path.unlink(), "provenance.json is missing"),
        ("provenance.json", lambda path: edit(path, outputs={}), "lists no such file"),
        ("provenance.json", lambda path: rewrite(path, seed=8), "has changed since it was written"),
        ("provenance.json", lambda path: rewrite(path, sha256=None), "sha256: found None"),
        ("provenance.json", lambda path: rewrite(path, outputs=[]), "outputs: found [], expected"),
        ("provenance.json", lambda path: rewrite(path, outputs={"product": 5}), "product: found 5"),
        ("provenance.json", lambda path: path.write_text("[]"), "expected a mapping of keys"),
        ("provenance.json", lambda path: path.write_text("{"), "damaged or not JSON"),
    ],
)
def test_what_is_not_as_its_stage_left_it_is_not_taken(own_run, name, damage, message):
    damage(own_run.inputs["ema"] / name)
    with pytest.raises(UserError) as caught:
        own_run.take("ema", "product")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not own_run.taken


def test_products_of_another_seed_are_not_taken(own_run):
    write_record(own_run.inputs["ema"], ["train"], seed=8)
    with pytest.raises(UserError, match="ema is of seed 8: expected seed 7 of the ema stage; run "):
        own_run.take("ema", "product")


def test_products_made_from_another_dataset_are_not_taken(own_run, tmp_path):
    dataset, elsewhere = own_run.inputs["tokenize"], tmp_path / "elsewhere"
    for folder in (dataset, elsewhere):
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text(folder.name)
        write_record(folder)
    write_record(own_run.inputs["ema"], ["train"], inputs=[elsewhere / "manifest.json"])
    own_run.take("tokenize", "manifest.json")
    with pytest.raises(UserError, match="ema was made from another dataset than .*/tokenize: "):
        own_run.take("ema", "product")


def test_both_hashes_and_the_command_are_named(own_run):
    product = own_run.inputs["ema"] / "product"
    listed = sha256_of(product)
    product.write_text("other")
    with pytest.raises(UserError) as caught:
        own_run.take("ema", "product")
    for words in (
        str(product), f"found SHA-256 {sha256_of(product)[:12]}", f"lists {listed[:12]}",
        "run `snakemake --cores 2 --forcerun ema`",
    ):  # fmt: skip
        assert words in str(caught.value)


def test_a_file_is_hashed_when_it_is_taken_and_not_again(own_run):
    taken = own_run.take("ema", "product")
    digest = sha256_of(taken)
    taken.write_text("changed while the stage ran")
    assert own_run.take("ema", "product") == taken
    (own_run.output / "x").write_text("made")
    own_run.finish({})
    found = json.loads((own_run.output / "provenance.json").read_text())
    assert found["inputs"][str(taken)] == digest == own_run.taken[taken]


def test_the_audit_takes_a_changed_file_to_fail_it(own_run):
    product = own_run.inputs["ema"] / "product"
    product.write_text("other")
    assert own_run.take("ema", "product", check=False) == product
    assert own_run.taken[product] == sha256_of(product)


# metrics.json


COMMON = {
    "seed": 7, "folder": "shared", "device": "cpu", "processes": 1, "peak_memory_bytes": 1,
    "seconds": 1.0, "phase_seconds": {"start": 1.0, "work": 1.0},
}  # fmt: skip
TTT = {
    "kernels": "plain", "attention_backend": "sdpa", "precision": "float32", "val_loss": 1.0,
    "val_bpb": 1.0, "tokens": 1, "bytes": 1, "data": "train", "epoch_losses": [1.0],
}  # fmt: skip


def test_metrics_are_held_against_their_stages_class():
    values = checked_metrics({"stage": "ttt", **COMMON, **TTT})
    assert values["training_seconds"] == 0.0 and values["kernels_reason"] is None
    assert json.loads(json.dumps(values)) == values


@pytest.mark.parametrize(
    "changes", [{"mine": 1}, {"val_loss": "low"}, {"val_loss": float("nan")}, {"tokens": 1.5}]
)
def test_what_a_known_stage_does_not_declare_is_the_programmers_fault(changes):
    with pytest.raises(ValidationError):
        checked_metrics({"stage": "ttt", **COMMON, **TTT, **changes})


def test_slot_eval_may_add_the_gain_of_each_adapter_and_no_more():
    own = METRICS["slot_eval"].model_fields
    numbers = {name: 1.0 for name, field in own.items() if field.annotation is float}
    whole = {name: 1 for name, field in own.items() if field.annotation is int}
    values = {
        **TTT, **numbers, **whole, **COMMON, "stage": "slot_eval", "adapters": [],
        "shares_batches": False,
    }  # fmt: skip
    values = {key: value for key, value in values.items() if key in own}
    assert checked_metrics({**values, "gain_slot_nats": 0.1})["gain_slot_nats"] == 0.1
    with pytest.raises(ValidationError, match="unknown keys gains_slot"):
        checked_metrics({**values, "gains_slot": 0.1})


def test_a_missing_metric_is_the_programmers_fault():
    for name in ("val_loss", "epoch_losses"):
        left = {key: value for key, value in TTT.items() if key != name}
        with pytest.raises(ValidationError):
            checked_metrics({"stage": "ttt", **COMMON, **left})


def test_every_stage_that_scores_has_a_score_in_its_metrics():
    assert set(METRICS) == set(STAGES)
    for stage in STAGES.values():
        fields = METRICS.get(stage.name, Metrics).model_fields
        assert stage.scores == ("val_bpb" in fields)


# The table of stages


def test_a_chain_is_all_that_a_stage_builds_on():
    names = {name: [one.name for one in chain(name)] for name in STAGES}
    assert names["tokenize"] == ["tokenize"]
    assert names["gptq"] == ["tokenize", "train", "ema", "ttt", "gptq"]
    assert names["report"] == [name for name in STAGES if not STAGES[name].on_request]
    for name, chained in names.items():
        assert chained[-1] == name or name == "audit"
        assert set(STAGES[name].needs) <= set(chained)


def test_who_runs_how_often():
    assert [one.name for one in stages_per("dataset")] == ["tokenize"]
    assert [one.name for one in stages_per("run")] == ["report"]
    assert len(stages_per("variant")) == 6
    assert FINAL_STAGE == "slot_eval"
