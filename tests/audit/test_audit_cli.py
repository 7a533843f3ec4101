"""`fairway audit` from Python and from the command line, on the worked example."""

import doctest
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fairway.audit import runner
from fairway.audit.runner import audit
from fairway.cli import main
from fairway.data.shards import write_shard
from fairway.errors import UserError
from malformed_products import ODD_TEXTS, time_limit
from provenance_chain import make_chain

EXAMPLE = Path(__file__).parents[2] / "docs/examples/leaking_evaluator.py"


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """The command line of the worked example, in a folder of its own."""
    shutil.copy(EXAMPLE, tmp_path / "worked_example.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "worked_example", raising=False)
    import worked_example

    write_shard("example.bin", worked_example.example_text(513).numpy())
    return {
        "--evaluator": "worked_example:honest",
        "--next-token": "worked_example:next_token",
        "--base": "worked_example:base",
        "--tokens": "example.bin",
        "--vocab-size": "64",
        "--window-tokens": "32",
        "--stride-tokens": "32",
        "--batch-windows": "8",
        "--flips": "24",
        "--null-tokens": "512",
        "--output": "audit.json",
    }


def run(arguments: dict[str, str], *more: str) -> int:
    """In this process, unless `more` says otherwise: a new one for each call takes seconds."""
    words = [word for pair in arguments.items() for word in pair]
    return main(["audit", *words, *(more or ["--no-fresh"])])


def verdicts() -> dict[str, str]:
    content = json.loads(Path("audit.json").read_text())
    return {check["name"]: check["verdict"] for check in content["checks"]}


def test_the_honest_example_exits_0(arguments, capsys):
    assert run(arguments) == 0
    assert set(verdicts().values()) == {"PASS", "NOT APPLICABLE"}
    printed = capsys.readouterr().out
    assert re.search("^PASS +flip ", printed, re.MULTILINE)
    last = printed.strip().splitlines()[-1]
    assert re.match("PASS +overall +7 of 7 applicable checks pass; ", last)
    assert "NOT APPLICABLE: attribution, lineage, budgets" in last


def test_with_provenance_eight_of_eight_checks_pass(arguments, capsys, tmp_path):
    assert run(arguments | {"--provenance": str(make_chain(tmp_path))}) == 0
    assert "8 of 8 applicable checks pass" in capsys.readouterr().out


def test_without_the_plain_model_the_null_test_is_not_run(arguments, capsys):
    del arguments["--next-token"]
    assert run(arguments) == 0
    assert verdicts()["null"] == "NOT RUN"
    assert re.search("^NOT RUN +overall ", capsys.readouterr().out, re.MULTILINE)


def test_the_leaking_example_exits_1_and_its_reach_is_its_block(arguments, capsys):
    assert run(arguments | {"--evaluator": "worked_example:leaking"}) == 1
    found = verdicts()
    assert found["flip"] == found["self_influence"] == found["null"] == "FAIL"
    assert found["normalization"] == found["coverage"] == "PASS"
    flip = json.loads(Path("audit.json").read_text())["checks"][0]
    assert 200 < flip["evidence"]["reach_tokens"] < 8 * 32
    assert re.search("^FAIL +overall ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--evaluator": "worked_example"}, "expected module:function"),
        ({"--evaluator": "worked_example:nothing"}, "no function 'nothing'"),
        ({"--tokens": "missing.bin"}, "missing.bin"),
        ({"--tokens": "worked_example.py"}, "shard"),
        ({"--vocab-size": "8"}, "the vocabulary size is 8"),
        ({"--stride-tokens": "64"}, "stride"),
        ({"--flips": "1"}, "audit.flips"),
        ({"--bos-id": "64"}, "bos_id is 64"),
        ({"--limits": "seconds"}, "expected name=number"),
        ({"--table": "missing.parquet"}, "missing.parquet"),
        ({"--artifact": "missing.bin"}, "missing.bin"),
        ({"--tokenizer": "worked_example.py"}, "not a SentencePiece model"),
    ],
)
def test_bad_usage_exits_2_with_one_line(arguments, capsys, change, message):
    assert run(arguments | change) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fairway: ") and message in error


OPTIONS = ("--tokens", "--tokenizer", "--table", "--provenance", "--output")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    "make",
    [
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path),
        *(lambda path, text=text: path.write_bytes(text) for text in ODD_TEXTS),
    ],
)
def test_an_option_may_name_anything(arguments, capsys, option, make):
    """No file, or another; a provenance.json that does not hold is a FAIL, and an output is lost
    only where it is a folder."""
    make(Path("odd"))
    few = {"--flips": "2", "--null-tokens": "64"}
    with time_limit():
        status = run(arguments | few | {option: "odd"})
    told = capsys.readouterr()
    if option == "--provenance":
        assert status == 1 and re.search("^FAIL +lineage ", told.out, re.MULTILINE)
    elif option == "--output" and not Path("odd").is_dir():
        assert status == 0 and json.loads(Path("odd").read_text())["verdict"] == "PASS"
    else:
        *_, line = told.err.splitlines()
        assert status == 2 and line.startswith("fairway: ") and "odd" in line


@pytest.mark.parametrize(
    "text",
    [
        *(text for text in ODD_TEXTS if text not in (b"{}", b'{"stage": "\xff"}')),
        *(b'{"val_loss": %s}' % value for value in (b'"1"', b"[1]", b"true", b"{}", b"NaN")),
    ],
)
def test_a_submission_of_another_shape_is_refused(arguments, capsys, text):
    Path("submission.json").write_bytes(text)
    with time_limit():
        assert run(arguments | {"--submission": "."}) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fairway: submission.json") and "the submission's author" in line


def test_a_reported_score_is_a_number(arguments, capsys):
    assert run(arguments | {"--val-loss": "nan"}) == 2
    assert "val_loss: found nan, expected a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys; sys.exit(0)", "ended the program with sys.exit(0)"),
        ("1 / 0", "raised ZeroDivisionError: division by zero ("),
        ("def evaluate(tokens): exit()", "ended the program with sys.exit(None)"),
        ("def evaluate(tokens): return tokens.x", "stops.py, line 1)"),
        ("def evaluate(tokens)", "raised SyntaxError"),
    ],
)
def test_an_evaluator_that_stops_or_raises_is_not_audited(arguments, capsys, body, message):
    """Neither 0, as where no check fails, nor 1, as where one does."""
    Path("stops.py").write_text(f"{body}\n")
    sys.modules.pop("stops", None)
    assert run(arguments | {"--evaluator": "stops:evaluate"}) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fairway: stops:evaluate ") and message in error
    assert not Path("audit.json").exists()


@pytest.fixture
def table(arguments):
    """The honest example's table of scored targets: its file, val_loss and val_bpb."""
    import worked_example

    tokens = worked_example.example_text(513)
    nll = worked_example.honest(tokens).reported_nll.double().numpy()
    count = len(nll)
    pd.DataFrame(
        {
            "position": np.arange(1, count + 1),
            "token": tokens[1:].numpy(),
            "window": np.arange(count) // 32,
            "lane": 0,
            "nll_before": nll,
            "nll_after": nll,
            "bytes": 2,
            "in_own_loss": False,
        }
    ).to_parquet("tokens.parquet")
    return Path("tokens.parquet"), nll.mean(), nll.sum() / np.log(2) / (2 * count)


def test_with_table_artifact_and_limits_all_ten_checks_pass(arguments, table, tmp_path, capsys):
    path, val_loss, val_bpb = table
    Path("weights.bin").write_bytes(bytes(1000))
    more = {
        "--provenance": str(make_chain(tmp_path)),
        "--table": str(path),
        "--val-loss": str(val_loss),
        "--val-bpb": str(val_bpb),
        "--artifact": "weights.bin",
        "--used": "evaluation_seconds=455",
        "--limits": "evaluation_seconds=600",
    }
    assert run(arguments | more) == 0
    assert "10 of 10 applicable checks pass" in capsys.readouterr().out
    assert run(arguments | more | {"--val-bpb": str(val_bpb - 0.01)}) == 1
    assert verdicts()["reported_score"] == "FAIL"
    assert run(arguments | more | {"--limits": "artifact_bytes=999"}) == 1
    assert verdicts()["budgets"] == "FAIL"


def test_a_submissions_folder_feeds_the_checks(arguments, table, tmp_path):
    path, val_loss, val_bpb = table
    folder = tmp_path / "submission"
    folder.mkdir()
    shutil.copy(path, folder)
    scores = {"val_loss": val_loss, "val_bpb": val_bpb}
    (folder / "submission.json").write_text(json.dumps(scores))
    (folder / "artifact.bin").write_bytes(bytes(100))
    assert run(arguments | {"--submission": str(folder)}) == 0
    found = verdicts()
    assert found["attribution"] == found["reported_score"] == found["budgets"] == "PASS"
    (folder / "submission.json").write_text(json.dumps(scores | {"val_loss": val_loss - 0.1}))
    assert run(arguments | {"--submission": str(folder)}) == 1
    assert verdicts()["reported_score"] == "FAIL"


@pytest.mark.slow  # half a dozen processes that import torch
def test_each_call_has_a_process_of_its_own_unless_told(arguments):
    few = {"--flips": "2", "--null-tokens": "0", "--stream-tokens": "64"}
    assert run(arguments | few, "--fresh", "--no-whole-text") == 0
    assert json.loads(Path("audit.json").read_text())["parameters"]["fresh"] is True


def test_the_python_example_does_what_it_says():
    tried = doctest.testmod(runner)
    assert tried.attempted > 5 and tried.failed == 0


@pytest.mark.parametrize("tokens", [[1, 2], [[1, 2], [3, 4], [5, 6]], [1, 2, 8], [1, 2, -1]])
def test_a_text_that_cannot_be_audited_is_a_clear_error(tokens):
    with pytest.raises(UserError, match="the text"):
        audit(lambda text: text, torch.tensor(tokens), vocab_size=8)
