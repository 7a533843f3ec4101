"""Bad input as a user meets it: one clear line, a non-zero status, no traceback, no long work."""

import errno
import json
import os
import shutil
import signal
import subprocess

import pytest
import torch

from checkouts import CONFIG_FILE, TEXT, change_config, make_project
from fairway import files
from fairway.data.shards import read_shard, write_shard
from fairway.settings import merge
from malformed_configs import BOMB
from producers import write_record
from tiny import TINY_CONFIG, run_script, synthetic_documents, write_jsonl
from trainings import run_here

# --- the configuration, at Snakemake's parse time ----------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("checkout") / "project")


@pytest.fixture
def project(checkout):
    """The checkout, its configuration put back afterwards."""
    text = (checkout / CONFIG_FILE).read_text()
    yield checkout
    (checkout / CONFIG_FILE).write_text(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seds": [1]}, "config: unknown key seds; did you mean seeds?; allowed: run"),
        ({"recipe": "quikstart"}, "did you mean quickstart?"),
        ({"train": {"max_stepz": 1}}, "train: unknown key max_stepz; did you mean max_steps?"),
        (
            {"variants": {"causal": {"evaluation": {"adapters": {"slot": {"l3": 1}}}}}},
            "variants.causal: evaluation.adapters.slot: unknown key l3; allowed: scope",
        ),
        (
            {"evaluation": {"adapters": {"lorra": {}}}},
            "evaluation.adapters.3: found 'lorra', expected one of lora, ngram, slot",
        ),
        ({"train": {"matrix_learning_rate": "fast"}}, "found 'fast', expected a number"),
        ({"run": 1.5}, "run: found the number 1.5, expected text: quote it"),
        ({"variants": {"causal": None, "leaky": None}}, "variants: none is left"),
        (
            {"report": {"against": "leeky"}},
            "report.against: no variant 'leeky': the config has causal, leaky; did you mean leaky?",
        ),
        ({"model": {"heads": 3}}, "model.heads 3 does not divide model.width 32"),
        ({"evaluation": {"stride_tokens": 33}}, "evaluation.stride_tokens"),
        ({"ttt": {"frozen_blocks": 4}}, "ttt.frozen_blocks"),
        ({"data": {"paths": []}}, "data.source is 'jsonl' but data.paths is empty: list the files"),
        ({"data": {"paths": ["nowhere.jsonl"]}}, "Missing input files for rule run_tokenize"),
        ({"results": "{seed}"}, "results: found '{seed}', expected a path without line breaks"),
        ({"results": f"{CONFIG_FILE}/x"}, f"results: {CONFIG_FILE}/x is or lies in a file"),
    ],
    ids=str,
)  # fmt: skip
def test_a_configs_fault_stops_snakemake_before_any_job(project, dry_runs, changes, message):
    change_config(project, changes)
    code, output = dry_runs.run(project, "--configfile", CONFIG_FILE)
    assert code != 0
    assert sum(message in line for line in output.splitlines()) == 1, output
    assert "Traceback" not in output and "Job stats" not in output


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "config.yaml",
            "run: caf\xe9".encode("latin-1"),
            "config.yaml could not be read: byte 9 is",
        ),
        (
            "more.yaml",
            b"run: a\nrun: b",
            "more.yaml is not YAML: found the key 'run' twice, line 2",
        ),
        ("more.yaml", BOMB, "more.yaml: run: found more than 100,000 values, aliases counted"),
    ],
    ids=["latin-1", "twice", "bomb"],
)
def test_a_file_that_is_no_config_stops_snakemake(project, dry_runs, name, content, message):
    (project / "more.yaml").write_text("{}")
    before = (project / name).read_bytes()
    (project / name).write_bytes(content)
    code, output = dry_runs.run(project, "--configfile", CONFIG_FILE, "more.yaml")
    (project / name).write_bytes(before)
    assert code != 0 and "Traceback" not in output
    assert sum(message in line for line in output.splitlines()) == 1, output


def test_paths_are_taken_in_their_plain_sense(project, dry_runs):
    """Snakemake warns of others, and takes them for other files."""
    change_config(project, {"results": ".//results/", "data": {"paths": [f"./{TEXT}"]}})
    code, output = dry_runs.run(project, "--configfile", CONFIG_FILE)
    assert code == 0
    assert "inconsistent results of the file-matching" not in output
    assert f" results/{TINY_CONFIG['run']}/report/report.html" in output


# --- stage scripts -----------------------------------------------------------------------------


@pytest.fixture
def fails(capsys):
    """Run a script that must fail; returns its one line."""
    handler = signal.getsignal(signal.SIGPIPE)

    def call(name: str, *arguments) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_here(name, *arguments)
        assert stopped.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("error: ") and "Traceback" not in "".join(lines)
        assert sum(line.startswith("error: ") for line in lines) == 1
        return lines[-1]

    yield call
    signal.signal(signal.SIGPIPE, handler)


@pytest.fixture
def configured(tiny_config, tmp_path):
    """Writes the tiny configuration with changes to a file."""

    def write(changes):
        path = tmp_path / "changed.yaml"
        path.write_text(json.dumps(merge(tiny_config, changes)))
        return path

    return write


def train_arguments(config, dataset, folder):
    return [
        "--config", config, "--tokenize", dataset, "--seed", 7,
        "--output", folder / "train", "--checkpoints", folder / "checkpoints",
    ]  # fmt: skip


def test_a_documents_line_that_is_no_json(fails, configured, tmp_path):
    path = write_jsonl(tmp_path / "text.jsonl", synthetic_documents(5))
    path.write_text(path.read_text() + '{"text": \n')
    config = configured({"data": {"paths": [str(path)]}})
    message = fails("tokenize_text.py", "--config", config, "--output", tmp_path / "out")
    assert f"{path}:6 is not JSON" in message


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (0, "holds no documents"),
        (4, "the source holds 4 documents, expected data.val_docs 4 and at least one to train on"),
        (8, "data.vocab_size"),
    ],
)
def test_too_little_text(fails, configured, tmp_path, documents, message):
    path = write_jsonl(tmp_path / "text.jsonl", synthetic_documents(documents))
    config = configured({"data": {"paths": [str(path)], "vocab_size": 5000}})
    assert message in fails("tokenize_text.py", "--config", config, "--output", tmp_path / "out")


def shards_in_place(configured, tiny_dataset, folder, **changes):
    """The tiny dataset as a foreign folder of shards."""
    shutil.copytree(tiny_dataset.parent, folder)
    data = {
        "source": "shards",
        "folder": str(folder),
        "tokenizer": str(folder / "tokenizer.model"),
        "paths": [],
        "val_docs": None,
        **changes,
    }
    return configured({"data": data})


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-3])


def make_foreign(path):
    path.write_bytes(bytes(4) + path.read_bytes()[4:])


def go_out_of_the_vocabulary(path):
    tokens = read_shard(path).copy()
    tokens[5] = 320
    write_shard(path, tokens)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut_short, "bytes"), (make_foreign, "magic"), (go_out_of_the_vocabulary, "320")],
)
def test_a_damaged_shard(fails, configured, tiny_dataset, tmp_path, damage, message):
    config = shards_in_place(configured, tiny_dataset, tmp_path / "shards")
    damage(tmp_path / "shards/train_000000.bin")
    line = fails("tokenize_text.py", "--config", config, "--output", tmp_path / "out")
    assert "train_000000.bin" in line and message in line
    # The same damage after tokenizing is found before training.
    arguments = train_arguments(config, tmp_path / "shards", tmp_path)
    assert "train_000000.bin" in fails("train.py", *arguments)
    assert not (tmp_path / "train").exists()


def test_a_tokenizer_of_another_size(fails, configured, tiny_dataset, tmp_path):
    config = shards_in_place(configured, tiny_dataset, tmp_path / "shards", vocab_size=512)
    line = fails("tokenize_text.py", "--config", config, "--output", tmp_path / "out")
    assert "320" in line and "512" in line


def test_a_folder_that_cannot_be_written(fails, tiny_config_file, tiny_dataset, tmp_path):
    (tmp_path / "file").write_text("")
    line = fails(
        "tokenize_text.py", "--config", tiny_config_file, "--output", tmp_path / "file/out"
    )
    assert "choose another `results` folder" in line
    arguments = train_arguments(tiny_config_file, tiny_dataset.parent, tmp_path / "file")
    assert "choose another `results` folder" in fails("train.py", *arguments)


def test_a_full_disk(fails, tiny_config_file, tiny_dataset, tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fsync)
    line = fails("train.py", *train_arguments(tiny_config_file, tiny_dataset.parent, tmp_path))
    assert "could not be written (No space left on device): free disk space" in line


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 KB, where the user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("full", ["output", "checkpoints"])
def test_a_disk_that_fills_up(fails, configured, tiny_dataset, tmp_path, small_disk, full):
    config = configured({"train": {"checkpoint_seconds": 0.001}})
    folders = {"output": tmp_path / "train", "checkpoints": tmp_path / "checkpoints"}
    folders[full] = small_disk / "folder"
    line = fails(
        "train.py", "--config", config, "--tokenize", tiny_dataset.parent, "--seed", 7,
        "--output", folders["output"], "--checkpoints", folders["checkpoints"],
    )  # fmt: skip
    assert "could not be written" in line and "free disk space" in line
    assert str(small_disk) in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(fails, configured, tiny_dataset, tmp_path):
    config = configured({"runtime": {"device": "cuda"}})
    line = fails("train.py", *train_arguments(config, tiny_dataset.parent, tmp_path))
    assert "runtime.device is 'cuda' but PyTorch sees no GPU" in line


def test_flash_attention_that_is_not_there(fails, configured, tiny_dataset, tmp_path):
    config = configured({"runtime": {"attention": "flash_attn", "precision": "bfloat16"}})
    line = fails("train.py", *train_arguments(config, tiny_dataset.parent, tmp_path))
    assert "runtime.attention" in line


def test_a_dataset_that_was_not_made(fails, tiny_config_file, tmp_path):
    line = fails("train.py", *train_arguments(tiny_config_file, tmp_path / "no", tmp_path))
    assert "no/manifest.json is missing" in line and "the tokenize stage" in line


@pytest.mark.parametrize("contents", [b"", b"FAIRWAY\0" + bytes(100)])
def test_an_artifact_that_is_damaged(fails, tiny_config_file, tiny_dataset, tmp_path, contents):
    (tmp_path / "artifact.bin").write_bytes(contents)
    write_record(tmp_path, ["train"])
    line = fails(
        "slot_eval.py", "--config", tiny_config_file, "--variant", "causal", "--seed", 7,
        "--tokenize", tiny_dataset.parent, "--gptq", tmp_path, "--output", tmp_path / "slot_eval",
    )  # fmt: skip
    assert "does not match its checksum" in line and "rerun the gptq stage" in line


def test_a_stage_whose_predecessor_is_missing(fails, tiny_config_file, tiny_dataset, tmp_path):
    line = fails(
        "ema.py", "--config", tiny_config_file, "--seed", 7, "--tokenize", tiny_dataset.parent,
        "--train", tmp_path / "train", "--output", tmp_path / "ema",
    )  # fmt: skip
    assert str(tmp_path / "train") in line and "missing" in line


def test_a_report_of_results_that_are_not_there(fails, tiny_config_file, tmp_path):
    line = fails(
        "report.py", "--config", tiny_config_file, "--run", tmp_path,
        "--output", tmp_path / "report",
    )  # fmt: skip
    assert "missing" in line


def test_a_variant_that_the_config_does_not_have(fails, tiny_config_file, tiny_dataset, tmp_path):
    line = fails(
        "ttt.py", "--config", tiny_config_file, "--variant", "legal", "--seed", 7,
        "--tokenize", tiny_dataset.parent, "--ema", tmp_path, "--output", tmp_path / "ttt",
    )  # fmt: skip
    assert "no variant 'legal': the config has causal, leaky" in line


def test_settings_that_are_no_json(fails, tmp_path):
    line = fails("tokenize_text.py", "--settings", "{data", "--output", tmp_path / "out")
    assert "--settings is not JSON" in line


def test_a_script_without_its_options_says_which(tmp_path):
    done = run_script("train.py", "--seed", 7, check=False)
    assert done.returncode == 2
    assert "the following arguments are required" in done.stderr.splitlines()[-1]
