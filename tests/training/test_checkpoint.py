"""Checkpoints of training: kept, checked, and locked."""

import subprocess
import sys
import time

import pytest
import torch

from fairway.errors import UserError
from fairway.training.checkpoint import Checkpoints, exclusive, tensors_under, with_prefix


def test_two_checkpoints_are_kept_and_a_damaged_one_is_not_counted(tmp_path):
    checkpoints = Checkpoints(tmp_path, "a" * 64)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": torch.full((2,), float(step))}, {"seconds": step})
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["step-00000002", "step-00000003"]
    newest = checkpoints.folder / "step-00000003/tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    (checkpoints.folder / ".partial-00000004").mkdir()
    tensors, state = checkpoints.load_latest()
    assert state["step"] == 2 and tensors["x"].tolist() == [2.0, 2.0]
    assert Checkpoints(tmp_path, "b" * 64).load_latest() is None


def test_a_second_process_waits_for_the_lock(tmp_path):
    code = (
        "import sys, time; from filelock import FileLock\n"
        f"with FileLock({str(tmp_path / 'lock')!r}): print('held', flush=True); time.sleep(1)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    started = time.monotonic()
    with exclusive(tmp_path):
        assert holder.poll() is not None or time.monotonic() - started > 0.5
    holder.wait()


def test_names_are_prefixed_and_found_again():
    tensors = {"a.b": torch.ones(1), "c": torch.zeros(1)}
    together = {**with_prefix("x", tensors), **with_prefix("xy", tensors)}
    assert sorted(together) == ["x.a.b", "x.c", "xy.a.b", "xy.c"]
    assert tensors_under(together, "x") == tensors
    assert tensors_under(together, "y") == {}


def test_unwritable_results_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="choose another `results` folder"),
        exclusive(tmp_path / "file/folder"),
    ):
        pass
