"""Lineage: provenance files are followed and verified by hash; one edited by hand is found."""

import json

import pytest

from fairway.audit.interface import FAIL, NOT_APPLICABLE, PASS
from fairway.audit.lineage import check_lineage
from fairway.files import sha256_of
from provenance_chain import STAGES, edit, make_chain


def test_an_honest_ancestry_passes(tmp_path):
    check = check_lineage(make_chain(tmp_path))
    assert check.verdict == PASS, check.sentence
    assert check.evidence["splits"] == ["train"]
    assert check.evidence["files_verified"] == 2 * len(STAGES)


def test_validation_text_in_the_ancestry_fails_and_names_the_stage(tmp_path):
    check = check_lineage(make_chain(tmp_path, ttt_data="val"))
    assert check.verdict == FAIL
    assert check.evidence["faults"] == []
    assert "read by ttt" in check.sentence


@pytest.mark.parametrize("stage", STAGES)
def test_a_changed_product_fails(tmp_path, stage):
    provenance = make_chain(tmp_path)
    (tmp_path / stage / "product").write_text("another")
    check = check_lineage(provenance)
    assert check.verdict == FAIL
    assert "is not the file listed" in check.sentence


@pytest.mark.parametrize("name", ["product", "provenance.json"])
def test_a_missing_ancestor_fails(tmp_path, name):
    provenance = make_chain(tmp_path)
    (tmp_path / "train" / name).unlink()
    check = check_lineage(provenance)
    assert check.verdict == FAIL
    assert "missing" in check.sentence


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("ttt", {"splits": ["train"]}),
        ("ttt", {"splits": ["train"], "splits_read": []}),
        ("ttt", {"splits": ["train"], "splits_read": [], "settings": {}}),
        ("ttt", {"parents": []}),
        ("slot_eval", {"splits": ["train"]}),
        ("slot_eval", {"splits": [], "parents": []}),
        ("gptq", {"parents": "none"}),
        ("ttt", {"seed": 2}),
    ],
)
def test_a_file_edited_by_hand_fails(tmp_path, stage, changes):
    provenance = make_chain(tmp_path, ttt_data="val")
    edit(tmp_path / stage / "provenance.json", **changes)
    check = check_lineage(provenance)
    assert check.verdict == FAIL
    assert check.evidence["faults"], "the edit itself must be found, not only the split"


def test_a_forged_last_file_contradicts_its_own_settings(tmp_path):
    """No later file hashes the last one, so its parts are compared with each other."""
    make_chain(tmp_path, ttt_data="val")
    provenance = tmp_path / "ttt" / "provenance.json"
    edit(provenance, splits=["train"], splits_read=[])
    assert "setting data: val" in check_lineage(provenance).sentence


def test_an_audited_file_that_no_ancestor_lists_fails(tmp_path):
    provenance = make_chain(tmp_path)
    product = tmp_path / "gptq" / "product"
    assert check_lineage(provenance, [product]).verdict == PASS
    other = tmp_path / "other"
    other.write_bytes(product.read_bytes())
    assert "other was audited, but nothing" in check_lineage(provenance, [product, other]).sentence


def test_the_manifest_s_shards_are_verified(tmp_path):
    provenance, folder = make_chain(tmp_path), tmp_path / "tokenize"
    (folder / "shard.bin").write_text("tokens")
    (folder / "tokenizer.model").write_text("pieces")
    entries = {
        name: {"sha256": sha256_of(folder / name)} for name in ("shard.bin", "tokenizer.model")
    }
    manifest = folder / "manifest.json"
    tokenizer = {"path": "tokenizer.model"} | entries.pop("tokenizer.model")
    manifest.write_text(json.dumps({"shards": entries, "tokenizer": tokenizer}))
    last = json.loads(provenance.read_text())
    edit(provenance, inputs=last["inputs"] | {str(manifest): sha256_of(manifest)})
    assert check_lineage(provenance).verdict == PASS
    for name, fault in (("tokenizer.model", "is not the file listed"), ("shard.bin", "missing")):
        content = (folder / name).read_text()
        if fault == "missing":
            (folder / name).unlink()
        else:
            (folder / name).write_text("changed")
        assert fault in check_lineage(provenance).sentence
        (folder / name).write_text(content)


def test_a_loop_of_ancestors_ends(tmp_path):
    provenance = make_chain(tmp_path)
    edit(tmp_path / "tokenize" / "provenance.json", parents=[str(provenance)])
    assert check_lineage(provenance).verdict == FAIL


def test_damaged_and_absent_files(tmp_path):
    assert check_lineage(None).verdict == NOT_APPLICABLE
    assert check_lineage(tmp_path / "nothing.json").verdict == FAIL
    damaged = tmp_path / "provenance.json"
    damaged.write_text("{")
    assert check_lineage(damaged).verdict == FAIL
    damaged.write_text("[]")
    assert check_lineage(damaged).verdict == FAIL
