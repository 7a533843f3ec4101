"""Making a dataset from each kind of source, and reading it back."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fairway.data import build
from fairway.data.build import make_dataset
from fairway.data.dataset import load_dataset, read_split
from fairway.data.settings import DataSettings
from fairway.data.shards import read_shard, write_shard
from fairway.data.token_bytes import byte_counts, token_bytes
from fairway.data.tokenizer import load_tokenizer
from fairway.errors import UserError
from fairway.files import sha256_of
from tiny import given_model, run_script

TEXTS = [
    f"document {number}: the river of {number * 37} words 😀 — naïve\n\nleft the winter house"
    for number in range(120)
]
VAL_DOCS = 10


@pytest.fixture
def settings(tmp_path) -> DataSettings:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return DataSettings(
        name="test",
        source="jsonl",
        paths=[str(path)],
        vocab_size=320,
        val_docs=VAL_DOCS,
        shard_tokens=1024,
        selection_tokens=300,
        adaptation_tokens=1100,
    )


def with_shards(settings: DataSettings, source: str, **data) -> DataSettings:
    """The same dataset from finished shards, which need none of the keys of documents."""
    sizes = {"vocab_size", "selection_tokens", "adaptation_tokens"}
    return DataSettings(name="test", source=source, **settings.model_dump(include=sizes), **data)


@pytest.fixture
def made(settings, tmp_path) -> Path:
    make_dataset(settings, tmp_path / "made", threads=1)
    return tmp_path / "made"


def flipped(contents: bytes) -> bytes:
    """One bit of the last token is another."""
    return contents[:-2] + bytes([contents[-2] ^ 1]) + contents[-1:]


def challenge_folder(made: Path, folder: Path) -> Path:
    """The same shards under the challenge's names."""
    folder.mkdir()
    for path in made.glob("*.bin"):
        shutil.copy(path, folder / f"fineweb_{path.name}")
    return folder


def test_validation_comes_first_and_each_document_behind_a_bos(made):
    dataset = load_dataset(made / "manifest.json")
    tokenizer = load_tokenizer(made / "tokenizer.model")
    val = read_split(dataset, "val")
    assert val.dtype == np.uint16 and val[0] == dataset.bos_id == 1
    documents = np.split(val, np.flatnonzero(val == 1))[1:]
    normal = [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS[:VAL_DOCS]]
    assert [tokenizer.decode(ids[1:].tolist()) for ids in documents] == normal


def test_splits_are_disjoint_and_tails_of_the_training_text(made):
    dataset = load_dataset(made / "manifest.json")
    parts = [read_split(dataset, split) for split in ("train", "selection", "adaptation")]
    assert [len(part) for part in parts[1:]] == [300, 1100]
    shards = [read_shard(path) for path in sorted(made.glob("train_*.bin"))]
    assert len(shards) > 2  # so that the adaptation text crosses a border
    np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(shards))


def test_manifest_counts_bytes_documents_and_hashes(made):
    manifest = json.loads((made / "manifest.json").read_text())
    tokenizer = load_tokenizer(made / "tokenizer.model")
    splits = manifest["splits"]
    lengths = [len(tokenizer.decode(tokenizer.encode(text)).encode()) for text in TEXTS]
    training = [splits[split] for split in ("train", "selection", "adaptation")]
    assert splits["val"]["bytes"] == sum(lengths[:VAL_DOCS])
    assert sum(split["bytes"] for split in training) == sum(lengths[VAL_DOCS:])
    assert sum(split["documents"] for split in training) == len(TEXTS) - VAL_DOCS
    assert splits["val"]["documents"] == VAL_DOCS
    assert {name: shard["sha256"] for name, shard in manifest["shards"].items()} == {
        path.name: sha256_of(path) for path in made.glob("*.bin")
    }
    assert manifest["tokenizer"]["sha256"] == sha256_of(made / "tokenizer.model")


def test_metrics_and_inputs(settings, tmp_path):
    metrics, inputs = make_dataset(settings, tmp_path / "made", threads=1)
    shards = (tmp_path / "made").glob("*.bin")
    assert metrics["tokens"] == sum(len(read_shard(path)) for path in shards)
    assert metrics["bytes_per_token"] == pytest.approx(metrics["bytes"] / metrics["tokens"])
    for unit in ("tokens", "bytes", "documents"):
        assert metrics[unit] == sum(split[unit] for split in metrics["splits"].values())
    assert inputs == [Path(settings.paths[0])]
    given = settings.changed(tokenizer=str(tmp_path / "made/tokenizer.model"))
    _, inputs = make_dataset(given, tmp_path / "again", threads=1)
    assert inputs == [Path(settings.paths[0]), tmp_path / "made/tokenizer.model"]


def test_the_data_do_not_depend_on_threads_or_batches(made, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 500)
    make_dataset(settings, tmp_path / "again", threads=3)
    for path in [*made.glob("*.bin"), made / "manifest.json", made / "tokenizer.model"]:
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_the_tokenizer_learns_nothing_from_validation(made, settings, tmp_path):
    path = Path(settings.paths[0])
    training = path.read_text().splitlines(keepends=True)[VAL_DOCS:]
    other = [json.dumps({"text": "Ünrelated ẞymbols ¡¿ 0"}) + "\n"] * VAL_DOCS
    path.write_text("".join(other + training))
    make_dataset(settings, tmp_path / "again", threads=1)
    assert sha256_of(tmp_path / "again/tokenizer.model") == sha256_of(made / "tokenizer.model")


def test_a_given_tokenizer_is_used_as_it_is(made, settings, tmp_path):
    given = settings.changed(tokenizer=str(made / "tokenizer.model"))
    make_dataset(given, tmp_path / "again", threads=1)
    for path in [*made.glob("*.bin"), made / "tokenizer.model"]:
        assert sha256_of(tmp_path / "again" / path.name) == sha256_of(path)


def test_fewer_training_documents_on_request(settings, tmp_path):
    metrics, _ = make_dataset(settings.changed(max_train_docs=80), tmp_path / "less", threads=1)
    assert metrics["documents"] == VAL_DOCS + 80


def test_the_largest_numbers_are_no_fault(settings, tmp_path):
    largest = settings.changed(max_train_docs=2**63 - 1, shard_tokens=2**31 - 1, seed=2**32 - 1)
    metrics, _ = make_dataset(largest, tmp_path / "all", threads=1)
    assert metrics["documents"] == len(TEXTS)
    with pytest.raises(UserError, match=r"the \d+ of data.selection_tokens and data.adaptation"):
        make_dataset(largest.changed(selection_tokens=2**63 - 1), tmp_path / "none", threads=1)
    with pytest.raises(
        UserError, match="holds 120 documents, expected data.val_docs 9223372036854"
    ):
        make_dataset(largest.changed(val_docs=2**63 - 1), tmp_path / "none", threads=1)


def test_a_dataset_is_replaced_whole(made, settings):
    make_dataset(settings.changed(shard_tokens=100_000), made, threads=1)
    assert sorted(path.name for path in made.glob("*.bin")) == [
        "train_000000.bin",
        "val_000000.bin",
    ]
    load_dataset(made / "manifest.json")


def test_challenge_folder_is_used_in_place(made, settings, tmp_path):
    folder = challenge_folder(made, tmp_path / "challenge")
    before = {path: (sha256_of(path), path.stat().st_mtime_ns) for path in folder.iterdir()}
    make_dataset(in_place_settings(settings, made, folder), tmp_path / "described", threads=2)
    assert not list((tmp_path / "described").glob("*.bin"))
    assert before == {path: (sha256_of(path), path.stat().st_mtime_ns) for path in folder.iterdir()}
    dataset, original = (
        load_dataset(tmp_path / name / "manifest.json") for name in ("described", "made")
    )
    for split, spans in dataset.splits.items():
        assert all(span.path.is_absolute() for span in spans)
        np.testing.assert_array_equal(read_split(dataset, split), read_split(original, split))
    manifests = [
        json.loads((tmp_path / name / "manifest.json").read_text())
        for name in ("described", "made")
    ]
    for split in dataset.splits:
        for unit in ("tokens", "bytes", "documents"):
            assert manifests[0]["splits"][split][unit] == manifests[1]["splits"][split][unit]


def test_published_shards_come_through_the_hub(made, settings, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    (cache / "datasets/datasets").mkdir(parents=True)
    (cache / "datasets/tokenizers").mkdir()
    challenge_folder(made, cache / "datasets/datasets/fineweb10B_sp320")
    shutil.copy(made / "tokenizer.model", cache / "datasets/tokenizers/fineweb_320_bpe.model")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(cache))
    published = with_shards(settings, "huggingface", form="shards")
    make_dataset(published, tmp_path / "hub", threads=1)
    dataset = load_dataset(tmp_path / "hub/manifest.json")
    assert sha256_of(dataset.tokenizer_path) == sha256_of(made / "tokenizer.model")
    assert all(cache in span.path.parents for span in dataset.splits["val"])


def test_published_documents_come_through_the_hub(made, settings, tmp_path, monkeypatch):
    (tmp_path / "cache/datasets").mkdir(parents=True)
    shutil.copy(settings.paths[0], tmp_path / "cache/datasets/docs_selected.jsonl")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "cache")
    )
    make_dataset(settings.changed(source="huggingface", paths=[]), tmp_path / "hub", threads=1)
    for path in made.glob("*.bin"):
        assert sha256_of(tmp_path / "hub" / path.name) == sha256_of(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"val_docs": 121}, "holds 120 documents, expected data.val_docs 121"),
        ({"val_docs": 120}, "holds 120 documents, expected data.val_docs 120 and at least one"),
        ({"adaptation_tokens": 10**6}, "training text has .* tokens, expected more than"),
        ({"paths": ["missing.jsonl"]}, "missing.jsonl is missing"),
        ({"tokenizer": "missing.model"}, "missing.model is missing"),
        ({"vocab_size": 4000}, "pieces, expected data.vocab_size 4000"),
    ],
)
def test_bad_input_leaves_no_manifest(settings, tmp_path, change, complaint):
    with pytest.raises(UserError, match=complaint):
        make_dataset(settings.changed(**change), tmp_path / "made", threads=1)
    assert not (tmp_path / "made/manifest.json").exists()


def with_documents(settings: DataSettings, validation: list[str]) -> DataSettings:
    """The same training text behind other validation documents."""
    path = Path(settings.paths[0])
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in validation + TEXTS))
    return settings.changed(val_docs=len(validation))


@pytest.mark.parametrize("text", ["", " \n\t ", "\u3000"])
def test_validation_without_text_is_refused_before_a_tokenizer_is_trained(
    settings, tmp_path, monkeypatch, text
):
    monkeypatch.setattr(build, "train_tokenizer", pytest.fail)
    with pytest.raises(UserError, match="first 12 documents, which data.val_docs makes validation"):
        make_dataset(with_documents(settings, [text] * 12), tmp_path / "made", threads=1)
    assert not (tmp_path / "made").exists()


def test_validation_that_normalization_leaves_nothing_of_is_refused(settings, tmp_path):
    with pytest.raises(UserError, match="the validation documents stand for no bytes"):
        make_dataset(with_documents(settings, ["\u200b"] * 12), tmp_path / "made", threads=1)
    assert not (tmp_path / "made/manifest.json").exists()


def test_training_without_text_is_refused(made, settings, tmp_path):
    path = Path(settings.paths[0])
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:VAL_DOCS]))
    with path.open("a") as file:
        file.write('{"text": ""}\n' * 2000)
    given = settings.changed(tokenizer=str(made / "tokenizer.model"))
    with pytest.raises(UserError, match="the training documents stand for no bytes"):
        make_dataset(given, tmp_path / "again", threads=1)


FEW_DOCUMENTS = (
    "The validation text has {} documents: of fewer than 20 one may decide, so intervals over "
    "documents are wide."
)
FEW_TOKENS = "tokens: over fewer than 10,000, chance moves the mean loss by 0.03 nats or more."


@pytest.mark.parametrize(
    ("validation", "warnings"),
    [
        (["a"] * 12, [FEW_DOCUMENTS.format(12), f"The validation text has 24 {FEW_TOKENS}"]),
        (["a", ""] * 10, [f"The validation text has 30 {FEW_TOKENS}",
                          "10 of the 20 validation documents are empty."]),
        ([" ".join("0123456789" * 100)] * 19, [FEW_DOCUMENTS.format(19)]),
        ([" ".join("0123456789" * 100)] * 20, []),
    ],
)  # fmt: skip
def test_a_small_validation_text_is_warned_of(settings, tmp_path, capsys, validation, warnings):
    make_dataset(with_documents(settings, validation), tmp_path / "made", threads=1)
    manifest = json.loads((tmp_path / "made/manifest.json").read_text())
    assert manifest["warnings"] == warnings
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert told == ([" ".join(["warning:", *warnings])] if warnings else [])
    load_dataset(tmp_path / "made/manifest.json")


def test_the_bytes_before_normalization_are_counted(settings, tmp_path):
    """A ligature that decodes to twelve times its bytes does not hide what spaces lose."""
    validation = ["ﷺ", "two  spaces\n\nand a line ", "plain", "\u200bnothing"]
    metrics, _ = make_dataset(with_documents(settings, validation), tmp_path / "made", threads=1)
    tokenizer = load_tokenizer(tmp_path / "made/tokenizer.model")
    manifest = json.loads((tmp_path / "made/manifest.json").read_text())
    for name, texts, splits in (
        ("validation", validation, ["val"]),
        ("training", TEXTS, ["train", "selection", "adaptation"]),
    ):
        decoded = [tokenizer.decode(tokenizer.encode(text)) for text in texts]
        pairs = list(zip(texts, decoded, strict=True))
        changes = [len(after.encode()) - len(text.encode()) for text, after in pairs]
        assert manifest["original"][name] == {
            "bytes": sum(len(text.encode()) for text in texts),
            "lost_bytes": -sum(min(0, change) for change in changes),
            "added_bytes": sum(max(0, change) for change in changes),
            "changed_documents": sum(text != after for text, after in pairs),
        }
        left = sum(manifest["splits"][split]["bytes"] for split in splits)
        assert left == manifest["original"][name]["bytes"] + sum(changes)
    found = manifest["original"]["validation"]
    assert found["added_bytes"] >= 30 and found["lost_bytes"] >= 6
    assert found["changed_documents"] == 3
    assert load_dataset(tmp_path / "made/manifest.json").original_bytes == found["bytes"]
    total = sum(one["bytes"] for one in manifest["original"].values())
    assert metrics["original_bytes"] == total


def test_with_case_markers_each_document_counts_the_bytes_of_its_original(settings, tmp_path):
    validation = ["Two  Spaces\n\nAND a line", " ﷺ iPhone", "\ue011 ▁\0", "", "\u200bÉCOLE"]
    changed = with_documents(settings, validation).changed(
        case="markers", normalization="none", selection_tokens=400
    )
    metrics, _ = make_dataset(changed, tmp_path / "made", threads=2)
    dataset = load_dataset(tmp_path / "made/manifest.json")
    tokenizer, val = load_tokenizer(dataset.tokenizer_path), read_split(dataset, "val")
    lengths = token_bytes(np.append(dataset.bos_id, val), byte_counts(tokenizer))
    begins = np.flatnonzero(val == dataset.bos_id)
    expected = [len(text.encode()) for text in validation]
    assert np.add.reduceat(lengths, begins).tolist() == expected
    assert dataset.original_bytes == sum(expected)
    assert metrics["bytes"] == metrics["original_bytes"]
    given = with_documents(settings, validation).changed(tokenizer=str(dataset.tokenizer_path))
    make_dataset(given, tmp_path / "again", threads=1)
    assert (tmp_path / "again/val_000000.bin").read_bytes() == next(
        (tmp_path / "made").glob("val_*.bin")
    ).read_bytes()


def test_of_finished_shards_the_original_bytes_are_not_known(made, settings, tmp_path):
    folder = challenge_folder(made, tmp_path / "challenge")
    described = in_place_settings(settings, made, folder)
    metrics, _ = make_dataset(described, tmp_path / "described", threads=2)
    assert metrics["original_bytes"] is None
    assert load_dataset(tmp_path / "described/manifest.json").original_bytes is None


@pytest.mark.parametrize("expected", [1, VAL_DOCS - 1, VAL_DOCS, VAL_DOCS + 1, 50_000])
def test_finished_shards_hold_as_many_validation_documents_as_they_should(
    made, settings, tmp_path, expected
):
    folder = challenge_folder(made, tmp_path / "challenge")
    described = in_place_settings(settings, made, folder).changed(val_docs=expected)
    if expected == VAL_DOCS:
        metrics, _ = make_dataset(described, tmp_path / "described", threads=2)
        assert metrics["splits"]["val"]["documents"] == VAL_DOCS
    else:
        complaint = (
            f"hold {VAL_DOCS} documents, expected data.val_docs {expected}: .* to {VAL_DOCS}"
        )
        with pytest.raises(UserError, match=complaint):
            make_dataset(described, tmp_path / "described", threads=2)
        assert not (tmp_path / "described").exists()


def test_validation_shards_without_a_document_are_refused(made, settings, tmp_path):
    folder = challenge_folder(made, tmp_path / "challenge")
    write_shard(folder / "fineweb_val_000000.bin", np.full(1000, 290))
    with pytest.raises(UserError, match="validation shards hold no BOS token"):
        make_dataset(in_place_settings(settings, made, folder), tmp_path / "described", threads=2)


def test_a_given_tokenizer_may_be_small_and_must_know_all_characters(settings, tmp_path):
    known = {"vocab_size": 80, "byte_fallback": False, "character_coverage": 1.0}
    model = given_model(tmp_path, TEXTS, **known)
    given = settings.changed(tokenizer=str(model), vocab_size=80)
    make_dataset(given, tmp_path / "made", threads=1)
    assert load_dataset(tmp_path / "made/manifest.json").vocab_size == 80
    with pytest.raises(UserError, match="no piece for '漢字' and no byte fallback: it makes <unk>"):
        make_dataset(with_documents(given, ["some 漢字"]), tmp_path / "again", threads=1)


def test_an_earlier_dataset_stays_until_the_new_input_has_proved_good(made, settings):
    before = {path: sha256_of(path) for path in made.iterdir()}
    with Path(settings.paths[0]).open("a") as file:
        file.write('{"text": "cut')
    for bad in (settings, settings.changed(tokenizer="missing.model")):
        with pytest.raises(UserError):
            make_dataset(bad, made, threads=1)
        assert {path: sha256_of(path) for path in made.iterdir()} == before


def in_place_settings(settings: DataSettings, made: Path, folder: Path) -> DataSettings:
    model = str(made / "tokenizer.model")
    return with_shards(settings, "shards", folder=str(folder), tokenizer=model)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "is truncated"),
        (lambda path: path.write_bytes(b"\1" * 2000), "not a token shard"),
        (lambda path: write_shard(path, np.array([1, 320, 5])), "holds token 320 at position 1"),
        (lambda path: path.unlink(), "no val shards"),
    ],
)
def test_foreign_shards_are_checked_before_they_are_used(
    made, settings, tmp_path, damage, complaint
):
    folder = challenge_folder(made, tmp_path / "challenge")
    damage(folder / "fineweb_val_000000.bin")
    with pytest.raises(UserError, match=complaint):
        make_dataset(in_place_settings(settings, made, folder), tmp_path / "described", threads=2)
    assert not (tmp_path / "described/manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "new_name", "complaint"),
    [
        ("train_000000", None, "train_000001.bin where fineweb_train_000000.bin was expected"),
        ("train_000001", None, "train_000002.bin where fineweb_train_000001.bin was expected"),
        ("val_000000", "val_000001", "val_000001.bin where fineweb_val_000000.bin was expected"),
        ("train_000001", "train_1a", "train_1a.bin where"),
        ("train_000001", "train_00000", "where fineweb_train_000001.bin was expected"),
        ("train_000001", "train_-00001", "train_-00001.bin where"),
    ],
)
def test_a_shard_that_is_lost_is_missed(made, settings, tmp_path, name, new_name, complaint):
    folder = challenge_folder(made, tmp_path / "challenge")
    path = folder / f"fineweb_{name}.bin"
    path.unlink() if new_name is None else path.rename(folder / f"fineweb_{new_name}.bin")
    with pytest.raises(UserError, match=complaint):
        make_dataset(in_place_settings(settings, made, folder), tmp_path / "described", threads=2)
    assert not (tmp_path / "described/manifest.json").exists()


def test_a_dataset_is_not_written_over_its_source(made, settings):
    before = sorted((path.name, sha256_of(path)) for path in made.iterdir())
    with pytest.raises(UserError, match="is where the dataset would be written"):
        make_dataset(in_place_settings(settings, made, made), made, threads=1)
    assert before == sorted((path.name, sha256_of(path)) for path in made.iterdir())


@pytest.mark.parametrize("contents", ["{}", "[]", "cut", '{"format": 1, "shards": ["x"]}'])
def test_a_foreign_or_damaged_manifest_is_not_overwritten(settings, tmp_path, contents):
    (tmp_path / "manifest.json").write_text(contents)
    with pytest.raises(UserError, match="was not written by tokenize, or is damaged"):
        make_dataset(settings, tmp_path, threads=1)
    assert (tmp_path / "manifest.json").read_text() == contents


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "is truncated"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: write_shard(path, np.array([1, 5, 5])), "holds 3 tokens, .* lists"),
        (lambda path: path.write_bytes(flipped(path.read_bytes())), "changed since it was made"),
        (lambda path: shutil.copy(path.with_name("train_000000.bin"), path), "changed since it"),
        (
            lambda path: write_shard(path, np.full(len(read_shard(path)), 400)),
            "changed since it was made",
        ),
    ],
)
def test_damage_after_tokenizing_is_found_when_loading(made, damage, complaint):
    damage(made / "train_000001.bin")
    with pytest.raises(UserError, match=complaint):
        load_dataset(made / "manifest.json")


def test_only_the_shards_of_the_splits_that_are_read_are_looked_at(made):
    (made / "train_000001.bin").unlink()
    dataset = load_dataset(made / "manifest.json", ("val",))
    assert list(dataset.splits) == ["val"] and len(read_split(dataset, "val")) > 0


def edited(made: Path, keys: tuple, value) -> Path:
    """The manifest with another value of one field; None takes it out."""
    path = made / "manifest.json"
    manifest = json.loads(path.read_text())
    holder = manifest
    for key in keys[:-1]:
        holder = holder[key]
    if value is None:
        del holder[keys[-1]]
    else:
        holder[keys[-1]] = value
    path.write_text(json.dumps(manifest))
    return path


def leaves(value, keys=()) -> Iterator[tuple[tuple, object]]:
    """Every number and text of a JSON value, with its keys."""
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(one, (*keys, key))
    else:
        yield keys, value


FREE = {"name", "source", "bytes", "documents", "original", "overlap", "warnings"}
"""Fields that no other field of the manifest tells."""
TRAIN, VAL = ("splits", "train"), ("splits", "val")


@pytest.mark.parametrize(
    ("keys", "value", "complaint"),
    [
        ((*TRAIN, "spans", 0, "stop"), 5000, r"train.spans.0.stop: found 5000, expected at most"),
        ((*TRAIN, "spans", 0, "start"), -1, "train.spans.0.start: found -1, expected at least 0"),
        ((*TRAIN, "spans", 0, "start"), 1024, "spans.0.start: found 1024, expected less than"),
        ((*TRAIN, "spans", 0, "start"), 1, "splits.train.tokens: found .*, expected"),
        ((*TRAIN, "spans", 0, "path"), "val_000000.bin", "spans.0.path: found 'val_000000.bin'"),
        ((*TRAIN, "spans", 0, "path"), "x.bin", "path: found 'x.bin', expected one of `shards`"),
        ((*TRAIN, "spans"), [], r"splits.train.spans: found \[\], expected at least one"),
        ((*VAL, "spans", 0, "path"), "train_000000.bin", "splits.val.*a shard of validation text"),
        ((*VAL, "tokens"), 7, "splits.val.tokens: found 7, expected"),
        ((*VAL, "documents"), -3, "splits.val.documents: found -3, expected at least 0"),
        ((*VAL, "bytes"), None, "splits.val: missing key bytes"),
        (VAL, None, "splits: missing key val"),
        (("bos_id",), 2, "bos_id: found 2, expected 1, as .*tokenizer.model has"),
        (("bos_id",), 320, "bos_id: found 320, expected an id under vocab_size 320"),
        (("vocab_size",), 321, "vocab_size: found 321, expected 320, as .*tokenizer.model has"),
        (("vocab_size",), True, "vocab_size: found True, expected a whole number"),
        (("tokenizer", "sha256"), "0" * 64, "tokenizer.model has changed since it was made"),
        (("tokenizer", "sha256"), "none", "tokenizer.sha256: found 'none', expected text matching"),
        (("shards",), {}, "expected one of `shards`"),
        (("more",), 1, "more"),
        (("original",), None, "missing key original"),
        (("overlap",), None, "missing key overlap"),
        (("warnings",), None, "missing key warnings"),
        (("original", "training", "lost_bytes"), -1, "lost_bytes: found -1, expected at least 0"),
        (("overlap", "documents"), 0, "overlap.documents: found 0, expected at least 1"),
        (("overlap", "examples"), [-1], r"overlap.examples.*: found -1, expected at least 0"),
    ],
)
def test_a_manifest_is_held_against_itself(made, keys, value, complaint):
    path = edited(made, keys, value)
    with pytest.raises(UserError, match=complaint) as caught:
        load_dataset(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-1, 2.0, 1.5, True, "x", [], {}, [1], {"a": 1}, 10**30])
def test_a_field_of_another_type_is_refused_by_name(made, value):
    original = (made / "manifest.json").read_text()
    for keys, before in leaves(json.loads(original)):
        if isinstance(value, str | int) and type(value) is type(before) and FREE & {*keys}:
            continue
        with pytest.raises(UserError) as caught:
            load_dataset(edited(made, keys, value))
        assert ".".join(map(str, keys)) in str(caught.value) or value in (-1, 10**30, "x")
        (made / "manifest.json").write_text(original)


def test_spans_that_overlap_are_refused(made):
    manifest = json.loads((made / "manifest.json").read_text())
    selection = manifest["splits"]["selection"]
    first = selection["spans"][0]
    first["start"] -= 1
    selection["tokens"] += 1
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"selection.spans.0.start: found .* the stop of splits.tr"):
        load_dataset(made / "manifest.json")


def test_a_tokenizer_that_was_changed_is_refused_but_by_the_audit(made):
    path = made / "tokenizer.model"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"tokenizer.model has changed since it was made: found"):
        load_dataset(made / "manifest.json")
    assert load_dataset(made / "manifest.json", check_hashes=False).vocab_size == 320


def test_a_folder_without_a_dataset(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        load_dataset(tmp_path / "manifest.json")
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"found \[\], expected a mapping of keys"):
        load_dataset(tmp_path / "manifest.json")


def test_the_script_ends_in_one_line_for_a_bad_input(settings, tmp_path):
    path = Path(settings.paths[0])
    path.write_text(path.read_text() + '{"text": "cut')
    sections = json.dumps({"data": settings.model_dump(mode="json")})
    done = run_script(
        "tokenize_text.py", "--settings", sections, "--output", tmp_path / "made", check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {path}:121 is truncated")
    assert "Traceback" not in done.stderr
