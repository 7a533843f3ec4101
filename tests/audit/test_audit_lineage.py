"""Lineage: provenance files are followed and verified by hash; one edited by hand is found."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from fairway.audit.interface import FAIL, NOT_APPLICABLE, NOT_RUN, PASS
from fairway.audit.lineage import check_lineage
from fairway.files import sha256_of
from malformed_products import ODD_TEXTS, ODD_VALUES, time_limit, with_odd_value
from producers import write_record
from provenance_chain import NO_OVERLAP, STAGES, edit, make_chain
from tiny import synthetic_documents, write_jsonl
from trainings import run_here


def test_an_honest_ancestry_passes(tmp_path):
    check = check_lineage(make_chain(tmp_path))
    assert check.verdict == PASS, check.sentence
    assert check.evidence["splits"] == ["train"]
    assert check.evidence["files_verified"] == 2 * len(STAGES) + 1


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
    shard, manifest = folder / "shard.bin", folder / "manifest.json"
    shard.write_text("tokens")
    content = json.loads(manifest.read_text())
    manifest.write_text(
        json.dumps(content | {"shards": {shard.name: {"sha256": sha256_of(shard)}}})
    )
    for stage in STAGES:
        relist(tmp_path / stage / "provenance.json")
    assert check_lineage(provenance).verdict == PASS
    shard.write_text("changed")
    assert "is not the file listed" in check_lineage(provenance).sentence
    shard.unlink()
    assert "missing" in check_lineage(provenance).sentence


def relist(provenance: Path) -> None:
    """List the files as they are now."""
    entry = json.loads(provenance.read_text())
    edit(
        provenance,
        inputs={name: sha256_of(name) for name in entry["inputs"]},
        outputs={name: sha256_of(provenance.parent / name) for name in entry["outputs"]},
    )


@pytest.mark.parametrize(
    ("exact", "near", "limit", "verdict"),
    [
        (40, 0, 0.01, FAIL),
        (0, 1, 0.01, FAIL),
        (1, 0, 0.02, PASS),
        (1, 1, 0.02, FAIL),
        (0, 0, 0.0, PASS),
        (1, 0, 0.0, FAIL),
        (50, 0, 1.0, PASS),
    ],
)
def test_validation_documents_in_the_training_text_may_be_few(
    tmp_path, exact, near, limit, verdict
):
    provenance = make_chain(tmp_path, overlap=NO_OVERLAP | {"exact": exact, "near": near})
    check = check_lineage(provenance, overlap_share=limit)
    said = f"{exact + near} of 50 validation documents occur in the training text ({exact} exactly"
    assert check.verdict == verdict
    assert said in check.sentence and check.evidence["faults"] == []
    assert check.evidence["overlap"]["exact"] == exact


def test_without_a_count_of_the_overlap_nothing_passes(tmp_path):
    provenance = make_chain(tmp_path, overlap=None)
    check = check_lineage(provenance)
    assert check.verdict == NOT_RUN and check.evidence["overlap"] is None
    assert "training text was not checked" in check.sentence
    edit(provenance, splits=["train", "val"], splits_read=["val"])
    assert check_lineage(provenance).verdict == FAIL


@pytest.fixture
def datasets(tmp_path) -> Callable[..., Path]:
    """Make a dataset by its script, from a text that is the same for all; its folder."""
    text = write_jsonl(tmp_path / "text.jsonl", synthetic_documents(30))
    data = {"source": "jsonl", "paths": [str(text)], "vocab_size": 320, "val_docs": 3}
    sizes = {"selection_tokens": 512, "adaptation_tokens": 512}

    def make(name: str, **changes) -> Path:
        source = changes if changes.get("source") == "shards" else data | changes
        sections = {"data": {"name": name, "vocab_size": 320, **sizes, **source}}
        settings = json.dumps(sections)
        run_here("tokenize_text.py", "--settings", settings, "--output", tmp_path / "data" / name)
        return tmp_path / "data" / name

    return make


def test_a_dataset_may_use_the_tokenizer_of_another(datasets):
    """Which lies beside that one's provenance.json; whatever becomes of the rest of it later."""
    first = datasets("first")
    model = str(first / "tokenizer.model")
    tokenized = datasets("second", tokenizer=model)
    in_place = datasets("third", source="shards", folder=str(first), tokenizer=model)
    for folder in (tokenized, in_place):
        check = check_lineage(folder / "provenance.json")
        assert check.verdict == PASS, check.sentence
    before = sha256_of(first / "provenance.json")
    datasets("first", tokenizer=shutil.copy(model, first.parent), val_docs=4)
    assert sha256_of(first / "provenance.json") != before
    assert check_lineage(tokenized / "provenance.json").verdict == PASS
    assert check_lineage(in_place / "provenance.json").verdict == FAIL  # its shards are others now


def test_a_dataset_whose_training_text_holds_validation_documents_fails(datasets, tmp_path):
    """40 of 50, as when a validation set is made of the first documents of the training text."""
    documents = synthetic_documents(100)
    text = write_jsonl(tmp_path / "leaking.jsonl", [*documents, *documents[:40]])
    leaking = {"paths": [str(text)], "val_docs": 50}
    first = datasets("first", **leaking)
    place = {"folder": str(first), "tokenizer": str(first / "tokenizer.model")}
    in_place = datasets("second", source="shards", **place)
    for folder in (first, in_place):
        check = check_lineage(folder / "provenance.json")
        assert check.verdict == FAIL
        assert check.sentence.startswith("40 of 50 validation documents occur in the training text")
        assert check_lineage(folder / "provenance.json", overlap_share=0.8).verdict == PASS
    unchecked = datasets("third", source="shards", **place, check_overlap=False)
    check = check_lineage(unchecked / "provenance.json")
    assert check.verdict == NOT_RUN and "was not checked" in check.sentence


def test_a_text_may_lie_beside_a_provenance_of_anything(datasets, tmp_path):
    folder = datasets("first")
    for content in ("{}", "no JSON", json.dumps({"stage": "train", "splits": ["val"]})):
        (tmp_path / "provenance.json").write_text(content)
        assert check_lineage(folder / "provenance.json").verdict == PASS
    write_record(tmp_path, ["train", "val"])  # it made the text, and from validation text
    assert "is not in its ancestry" in check_lineage(folder / "provenance.json").sentence


def test_a_loop_of_ancestors_ends(tmp_path):
    provenance = make_chain(tmp_path)
    edit(tmp_path / "tokenize" / "provenance.json", parents=[str(provenance)])
    assert check_lineage(provenance).verdict == FAIL


@pytest.mark.parametrize("length", [1100, pytest.param(3000, marks=pytest.mark.many)])
def test_a_long_chain_is_followed_to_its_end(tmp_path, length):
    """Each file as a stage writes it, but for the commit, which takes a process each."""
    path = first = make_chain(tmp_path)
    record = json.loads(first.read_text())
    for number in range(length):
        parent, path = path, tmp_path / f"{number}.json"
        inputs = {str(parent): sha256_of(parent)}
        path.write_text(json.dumps(record))
        edit(path, stage=f"s{number}", inputs=inputs, outputs={}, parents=[str(parent)])
    with time_limit():
        check = check_lineage(path)
    assert (
        check.verdict == PASS and check.evidence["files_verified"] == 2 * len(STAGES) + 1 + length
    )
    (tmp_path / "ttt/product").write_text("another")
    assert check_lineage(path).verdict == FAIL


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (Path.mkdir, "is a folder"),
        (os.mkfifo, "is no file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no file"),
        (lambda path: path.symlink_to(path), "is no file"),
        *((lambda path, text=text: path.write_bytes(text), "") for text in ODD_TEXTS),
    ],
)
@pytest.mark.parametrize("name", ["product", "provenance.json"])
def test_what_is_no_file_of_the_chain_fails(tmp_path, name, make, told):
    provenance, path = make_chain(tmp_path), tmp_path / "train" / name
    path.unlink()
    make(path)
    with time_limit():
        check = check_lineage(provenance)
    assert check.verdict == FAIL and told in check.sentence and "\n" not in check.sentence


@pytest.mark.parametrize("stage", ["train", "slot_eval"])
def test_a_record_of_odd_types_fails_with_one_line(tmp_path, stage):
    """Also where its checksum is made to fit; then it may hold, such as with another seed."""
    provenance, record = make_chain(tmp_path), tmp_path / stage / "provenance.json"
    intact = json.loads(record.read_text())
    for seed in range(150):
        values = with_odd_value(copy.deepcopy(intact), Random(seed))
        record.write_text(json.dumps(values))
        with time_limit():
            checks = [check_lineage(provenance)]
            edit(record)
            checks.append(check_lineage(provenance))
        assert all("\n" not in one.sentence and len(one.sentence) < 1000 for one in checks)
        assert checks[0].verdict == FAIL or values | {"sha256": 0} == intact | {"sha256": 0}


@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
@pytest.mark.parametrize("key", ["shards", "tokenizer"])
def test_a_listed_manifest_of_another_shape_fails(tmp_path, key, value):
    provenance, manifest = make_chain(tmp_path), tmp_path / "manifest.json"
    good = {"shards": {}, "tokenizer": {"path": "tokenizer.model", "sha256": "0" * 64}}
    for other in (value, {"x": value}, {"path": value, "sha256": value}):
        manifest.write_text(json.dumps(good | {key: other}))
        last = json.loads(provenance.read_text())
        edit(provenance, inputs=last["inputs"] | {str(manifest): sha256_of(manifest)})
        with time_limit():
            check = check_lineage(provenance)
        assert check.verdict == FAIL and "\n" not in check.sentence


def test_damaged_and_absent_files(tmp_path):
    assert check_lineage(None).verdict == NOT_APPLICABLE
    assert check_lineage(tmp_path / "nothing.json").verdict == FAIL
    damaged = tmp_path / "provenance.json"
    damaged.write_text("{")
    assert check_lineage(damaged).verdict == FAIL
    damaged.write_text("[]")
    assert check_lineage(damaged).verdict == FAIL
