"""A shard is hashed once, and again as soon as anything was written to it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from fairway.data import dataset as loading
from fairway.data import verified
from fairway.data.dataset import load_dataset
from fairway.data.verified import RECORD, shard_hashes
from fairway.distributed import World
from fairway.errors import UserError
from fairway.files import sha256_of


@pytest.fixture
def made(tiny_dataset, tmp_path, monkeypatch) -> Path:
    """A dataset's folder, whose files need not lie for two seconds before they are trusted."""
    monkeypatch.setattr(verified, "SETTLED_NS", 0)
    return Path(
        shutil.copytree(
            tiny_dataset.parent, tmp_path / "made", ignore=shutil.ignore_patterns(RECORD)
        )
    )


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the shards that are hashed from now on."""
    names: list[str] = []

    def noted(path: Path) -> str:
        names.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(verified, "sha256_of", noted)
    return names


def shards_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.bin"))


def test_a_shard_is_hashed_once(made, hashed):
    load_dataset(made / "manifest.json", ("val",))
    assert hashed == ["val_000000.bin"]
    load_dataset(made / "manifest.json")
    assert sorted(hashed) == shards_of(made)
    load_dataset(made / "manifest.json")
    assert sorted(hashed) == shards_of(made)


def test_any_write_is_seen_even_where_size_and_date_are_the_old_ones(made):
    load_dataset(made / "manifest.json")
    path = made / "train_000000.bin"
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=r"train_000000.bin has changed since it was made: found"):
        load_dataset(made / "manifest.json")


def test_a_file_put_in_the_place_of_a_shard_is_seen(made, tmp_path):
    load_dataset(made / "manifest.json")
    path = made / "train_000000.bin"
    other, content = tmp_path / "other", path.read_bytes()
    other.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.rename(path)
    with pytest.raises(UserError, match=r"train_000000.bin has changed since it was made: found"):
        load_dataset(made / "manifest.json")


def test_a_copy_is_hashed_once_more(made, hashed, tmp_path):
    load_dataset(made / "manifest.json")
    hashed.clear()
    copy = shutil.copytree(made, tmp_path / "copy")
    for _ in range(2):
        load_dataset(copy / "manifest.json")
    assert sorted(hashed) == shards_of(made)


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "other hash"])
def test_a_damaged_record_costs_no_more_than_hashing_again(made, hashed, damage):
    load_dataset(made / "manifest.json")
    record = made / RECORD
    if damage == "other hash":
        content = json.loads(record.read_text())
        for one in content["shards"].values():
            one["sha256"] = "0" * 64
        damage = json.dumps(content)
    record.write_text(damage)
    hashed.clear()
    for _ in range(2):
        load_dataset(made / "manifest.json")
    assert sorted(hashed) == shards_of(made)


def test_a_young_file_is_not_trusted(made, hashed, monkeypatch):
    monkeypatch.setattr(verified, "SETTLED_NS", 3600 * 10**9)
    for _ in range(2):
        load_dataset(made / "manifest.json", ("val",))
    assert hashed == ["val_000000.bin"] * 2
    assert not (made / RECORD).exists()


def test_a_folder_that_cannot_be_written_is_told(made, hashed, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # tests may be root
    load_dataset(made / "manifest.json", ("val",))
    assert "every stage hashes its shards again: make it writable" in capsys.readouterr().err
    assert hashed and not (made / RECORD).exists()


def test_without_an_expectation_every_shard_is_hashed(made, hashed):
    names = dict.fromkeys(shards_of(made))
    for _ in range(2):
        assert shard_hashes(made, names) == {name: sha256_of(made / name) for name in names}
    assert sorted(hashed) == sorted([*names, *names])


def test_the_first_process_hashes_for_all(made, hashed, monkeypatch):
    """The others take what it found, and refuse what it refuses."""
    listed = json.loads((made / "manifest.json").read_text())["shards"]
    found = {name: shard["sha256"] for name, shard in listed.items()}
    told = []

    def gather(world: World, own: dict[str, str]) -> list[dict[str, str]]:
        told.append(own)
        return [found, {}]

    monkeypatch.setattr(loading, "gather_objects", gather)
    first, second = (World(rank, 2, torch.device("cpu")) for rank in range(2))
    load_dataset(made / "manifest.json", world=second)
    assert told == [{}] and not hashed
    load_dataset(made / "manifest.json", world=first)
    assert told[1] == found
    found["val_000000.bin"] = "0" * 64
    with pytest.raises(UserError, match=r"val_000000.bin has changed since it was made"):
        load_dataset(made / "manifest.json", world=second)
