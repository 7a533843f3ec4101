"""Checkpoints of training: kept and checked."""

import shutil

import pytest
import torch

from fairway.training.checkpoint import Checkpoints, tensors_under, with_prefix


def test_two_checkpoints_are_kept_and_a_damaged_one_is_not_counted(tmp_path):
    checkpoints = Checkpoints(tmp_path, "a" * 64)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": torch.full((2,), float(step))}, {"seconds": step})
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["step-00000002", "step-00000003"]
    newest = checkpoints.folder / "step-00000003/tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    (checkpoints.folder / ".step-00000004.a1b2c3d4.partial").mkdir()
    tensors, state = checkpoints.load_latest()
    assert state["step"] == 2 and tensors["x"].tolist() == [2.0, 2.0]
    assert Checkpoints(tmp_path, "b" * 64).load_latest() is None


STATE = {"seconds": 1.5, "history": [{"step": 1}], "loader": {"batch": 3}, "swa_count": 0}


def two_checkpoints(folder, identity="a" * 64) -> Checkpoints:
    """Checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(folder, identity)
    for step in (1, 2):
        checkpoints.save(step, {"x": torch.arange(3.0) * step}, STATE)
    return checkpoints


def flip(path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "another shape": lambda path: path.write_text("[]"),
    "not text": lambda path: path.write_bytes(b"\xff" * 64),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "checksum"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, capsys, name, damage):
    checkpoints = two_checkpoints(tmp_path)
    newest = checkpoints.folder / "step-00000002"
    DAMAGES[damage](newest / name)
    with pytest.raises(MemoryError) as caught, checkpoints.named_in_errors():
        raise MemoryError
    assert caught.value.__notes__ == [
        f"the last good checkpoint is {checkpoints.folder / 'step-00000001'}"
    ]
    assert checkpoints.load_latest()[1] == {**STATE, "step": 1}
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{newest} is damaged" in line
    assert newest.exists()  # nothing is lost


def test_a_flipped_bit_of_any_byte_is_seen(tmp_path):
    checkpoints = two_checkpoints(tmp_path)
    for name in ("tensors.safetensors", "state.json", "checksum"):
        path = checkpoints.folder / "step-00000002" / name
        for byte in range(path.stat().st_size):
            bit = 8 * byte + byte % 8
            flip(path, bit)
            assert checkpoints.load_latest()[1]["step"] == 1, (name, bit)
            flip(path, bit)
    assert checkpoints.load_latest()[1]["step"] == 2


def test_a_changed_state_is_not_resumed(tmp_path):
    checkpoints = two_checkpoints(tmp_path)
    state = checkpoints.folder / "step-00000002/state.json"
    state.write_text(state.read_text().replace('"step": 2', '"step": 18'))
    assert checkpoints.load_latest()[1]["step"] == 1


def test_files_of_another_run_are_not_resumed(tmp_path):
    own, other = two_checkpoints(tmp_path), two_checkpoints(tmp_path, "b" * 64)
    shutil.copytree(
        other.folder / "step-00000002", own.folder / "step-00000002", dirs_exist_ok=True
    )
    assert own.load_latest()[1]["step"] == 1
    shutil.copy(own.folder / "step-00000001/state.json", other.folder / "step-00000002/state.json")
    assert other.load_latest()[1]["step"] == 1


def test_damaged_checkpoints_of_later_steps_do_not_push_out_new_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, "a" * 64)
    for step in (10, 20):
        checkpoints.save(step, {"x": torch.ones(1)}, STATE)
        (checkpoints.folder / f"step-{step:08d}/state.json").write_text("{}")
    assert checkpoints.load_latest() is None
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": torch.ones(1)}, STATE)
        assert checkpoints.load_latest()[1]["step"] == step
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["step-00000002", "step-00000003"]


def test_names_are_prefixed_and_found_again():
    tensors = {"a.b": torch.ones(1), "c": torch.zeros(1)}
    together = {**with_prefix("x", tensors), **with_prefix("xy", tensors)}
    assert sorted(together) == ["x.a.b", "x.c", "xy.a.b", "xy.c"]
    assert tensors_under(together, "x") == tensors
    assert tensors_under(together, "y") == {}
