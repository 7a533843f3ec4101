"""Lineage: records are followed and verified by hash; a record edited by hand is found."""

import json

import pytest

from fairway.audit.interface import FAIL, NOT_RUN, PASS
from fairway.audit.lineage import check_lineage
from fairway.files import sha256_of
from fairway.provenance import write_provenance

STAGES = ("tokenize", "train", "ttt", "gptq", "slot")


def make_run(folder, ttt_data="train"):
    """A chain of stage folders; each reads the product of the one before it and the manifest."""
    manifest = folder / "tokenize" / "product"
    for stage, before in zip(STAGES, (None, *STAGES), strict=False):
        place = folder / stage
        place.mkdir()
        (place / "product").write_text(f"made by {stage}")
        inputs = [] if before is None else [folder / before / "product", manifest]
        read = {"train": ["train"], "ttt": [ttt_data]}.get(stage, [])
        write_provenance(
            place,
            stage=stage,
            settings={stage: {"data": ttt_data}} if stage == "ttt" else {},
            inputs=inputs,
            outputs=[place / "product"],
            splits_read=read,
            seed=1,
            parents=[] if before is None else [folder / before / "provenance.json"],
        )
    return folder / "slot" / "provenance.json"


def edit(path, **changes):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | changes))


def test_an_honest_ancestry_passes(tmp_path):
    check = check_lineage(make_run(tmp_path))
    assert check.verdict == PASS, check.sentence
    assert check.evidence["splits"] == ["train"]
    assert check.evidence["files_verified"] == 2 * len(STAGES)


def test_validation_text_in_the_ancestry_fails_and_names_the_stage(tmp_path):
    check = check_lineage(make_run(tmp_path, ttt_data="val"))
    assert check.verdict == FAIL
    assert check.evidence["faults"] == []
    assert "read by ttt" in check.sentence


@pytest.mark.parametrize("stage", STAGES)
def test_a_changed_product_fails(tmp_path, stage):
    record = make_run(tmp_path)
    (tmp_path / stage / "product").write_text("another")
    check = check_lineage(record)
    assert check.verdict == FAIL
    assert "is not the file recorded" in check.sentence


@pytest.mark.parametrize("name", ["product", "provenance.json"])
def test_a_missing_ancestor_fails(tmp_path, name):
    record = make_run(tmp_path)
    (tmp_path / "train" / name).unlink()
    check = check_lineage(record)
    assert check.verdict == FAIL
    assert "missing" in check.sentence


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("ttt", {"splits": ["train"]}),
        ("ttt", {"splits": ["train"], "splits_read": []}),
        ("ttt", {"splits": ["train"], "splits_read": [], "settings": {}}),
        ("ttt", {"parents": []}),
        ("slot", {"splits": ["train"]}),
        ("slot", {"splits": [], "parents": []}),
        ("gptq", {"parents": "none"}),
        ("ttt", {"seed": 2}),
    ],
)
def test_a_record_edited_by_hand_fails(tmp_path, stage, changes):
    record = make_run(tmp_path, ttt_data="val")
    edit(tmp_path / stage / "provenance.json", **changes)
    check = check_lineage(record)
    assert check.verdict == FAIL
    assert check.evidence["faults"], "the edit itself must be found, not only the split"


def test_a_forged_last_record_contradicts_its_own_settings(tmp_path):
    """Nothing hashes the last record of a chain, so its parts are held against each other."""
    make_run(tmp_path, ttt_data="val")
    record = tmp_path / "ttt" / "provenance.json"
    edit(record, splits=["train"], splits_read=[])
    assert "setting data: val" in check_lineage(record).sentence


def test_an_audited_file_that_no_record_names_fails(tmp_path):
    record = make_run(tmp_path)
    product = tmp_path / "gptq" / "product"
    assert check_lineage(record, [product]).verdict == PASS
    other = tmp_path / "other"
    other.write_bytes(product.read_bytes())
    assert "no record" in check_lineage(record, [product, other]).sentence


def test_the_manifest_s_shards_are_verified(tmp_path):
    record, folder = make_run(tmp_path), tmp_path / "tokenize"
    (folder / "shard.bin").write_text("tokens")
    (folder / "tokenizer.model").write_text("pieces")
    entries = {
        name: {"sha256": sha256_of(folder / name)} for name in ("shard.bin", "tokenizer.model")
    }
    manifest = folder / "manifest.json"
    tokenizer = {"path": "tokenizer.model"} | entries.pop("tokenizer.model")
    manifest.write_text(json.dumps({"shards": entries, "tokenizer": tokenizer}))
    slot = json.loads(record.read_text())
    edit(record, inputs=slot["inputs"] | {str(manifest): sha256_of(manifest)})
    assert check_lineage(record).verdict == PASS
    for name, fault in (("tokenizer.model", "is not the file listed"), ("shard.bin", "missing")):
        content = (folder / name).read_text()
        if fault == "missing":
            (folder / name).unlink()
        else:
            (folder / name).write_text("changed")
        assert fault in check_lineage(record).sentence
        (folder / name).write_text(content)


def test_a_loop_of_records_ends(tmp_path):
    record = make_run(tmp_path)
    edit(tmp_path / "tokenize" / "provenance.json", parents=[str(record)])
    assert check_lineage(record).verdict == FAIL


def test_damaged_and_absent_records(tmp_path):
    assert check_lineage(None).verdict == NOT_RUN
    assert check_lineage(tmp_path / "nothing.json").verdict == FAIL
    damaged = tmp_path / "provenance.json"
    damaged.write_text("{")
    assert check_lineage(damaged).verdict == FAIL
    damaged.write_text("[]")
    assert check_lineage(damaged).verdict == FAIL
