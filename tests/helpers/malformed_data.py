"""Damage to each kind of file that tokenize and `load_dataset` read, and what comes of it.

python tests/helpers/malformed_data.py 20000
"""

import contextlib
import gzip
import io
import json
import lzma
import os
import shutil
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import zstandard

from fairway.data.build import make_dataset
from fairway.data.dataset import load_dataset, read_split
from fairway.data.manifest_fields import SPLITS
from fairway.data.settings import DataSettings
from fairway.data.tokenizer import train_tokenizer
from fairway.errors import UserError

LONGEST_LINE = 1000
"""Characters of a message to a user, who reads it on a terminal."""

TEXTS = [
    f'document {number}: the river of {number * 37} words 😀 — naïve\n\n"left" the winter house'
    for number in range(60)
]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "text.jsonl": bytes,
    "text.jsonl.gz": gzip.compress,
    "text.jsonl.xz": lzma.compress,
    "text.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
SIZES = {"vocab_size": 320, "selection_tokens": 100, "adaptation_tokens": 100}

FOREIGN = ("text.jsonl", "given.model", "shards/train_000000.bin", "shards/val_000000.bin")
"""Files of which nothing says how they were."""
VOUCHED = (*(name for name in COMPRESSIONS if name not in FOREIGN), "made/manifest.json",
           "made/tokenizer.model", "made/train_000000.bin", "made/val_000000.bin",
           "previous/manifest.json")  # fmt: skip
"""Files with a checksum of their own, a dataset's files, and the manifest of one to be replaced."""

ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2.5, 10**30, float("nan"), float("inf"), "", "x", "1", "a\nb", "\0",
    "\ud800", "x" * 300, "../" * 9, "/dev/zero", [], [[]], {}, {"a": {"a": 1}}, [1, 2],
]  # fmt: skip
ODD_JSON = ["9" * 5000, "-" + "9" * 5000, "[" * 100_000, '{"a":' * 3000, "1e999", '"\\ud800"', "\\"]
ODD_WORDS = [0, 1, 2, -1, 255, 256, 20240520, 2**31 - 1, -(2**31)]
NO_FILES: list[Callable[[Path], object]] = [
    lambda path: None,
    Path.mkdir,
    os.mkfifo,
    lambda path: path.symlink_to(path),
    lambda path: path.symlink_to("/dev/zero"),
]
"""What may stand where a file is expected."""


def run(folder: Path, seed: int, count: int) -> Counter[str]:
    """Damage one file after the other, `count` times in all, and count what comes of it.

    folder: an empty one to work in. The same seed gives the same damage.
    `refused`: a UserError of one line.
    `accepted`: the dataset can be made, or read. Of VOUCHED files it then has the very tokens of
    the intact ones (a gzip header may have another date, a manifest another name). Of FOREIGN files
    it may have others, for another letter in a text is another text, and another token another one.
    `traceback`: anything else, also a message of several lines or of more than LONGEST_LINE
    characters, and other tokens from a VOUCHED file.
    """
    counts = Counter(accepted=0, refused=0, traceback=0)
    counts.update(outcome for _, outcome in outcomes(folder, seed, count))
    return counts


def outcomes(folder: Path, seed: int, count: int) -> Iterator[tuple[str, str]]:
    """The file that was damaged, by its name in `folder`, and what came of it, `count` times."""
    lay_out(folder)
    generator = Random(seed)
    names = [*FOREIGN, *VOUCHED]
    intact = {name: (folder / name).read_bytes() for name in names}
    tokens = {name: use(folder, name) for name in names}
    for number in range(count):
        name = names[number % len(names)]
        put_damage(folder / name, intact, generator)
        outcome = outcome_of(folder, name, tokens[name])
        if outcome == "traceback":
            print(f"damage {number} of seed {seed}, to {name}", file=sys.stderr)
        yield name, outcome
        remove(folder / name)
        (folder / name).write_bytes(intact[name])


def lay_out(folder: Path) -> None:
    """Texts, a tokenizer, a dataset made of them, and shards to describe."""
    text = "".join(json.dumps({"text": one, "id": 7}) + "\n" for one in TEXTS).encode()
    for name, compress in COMPRESSIONS.items():
        (folder / name).write_bytes(compress(text))
    (folder / "given.model").write_bytes(train_tokenizer(TEXTS, SIZES["vocab_size"], seed=0))
    make(folder, "text.jsonl", "made")
    for copy in ("shards", "previous"):
        shutil.copytree(folder / "made", folder / copy)


def make(folder: Path, name: str, output: str) -> None:
    """Make a dataset of a text or, where `name` is `shards`, of finished shards."""
    is_text = name != "shards"
    keys = (
        {"paths": [str(folder / name)], "val_docs": 8}
        if is_text
        else {"folder": str(folder / name)}
    )
    settings = DataSettings(
        name="malformed",
        source="jsonl" if is_text else "shards",
        tokenizer=str(folder / "given.model"),
        **SIZES,
        **keys,
    )
    with contextlib.redirect_stderr(io.StringIO()):
        make_dataset(settings, folder / output, threads=1)


def use(folder: Path, name: str) -> list[bytes]:
    """Read a file as it is meant to be read: the tokens of each split."""
    place, _, inside = name.rpartition("/")
    output = place if place in ("made", "previous") else "used"
    if place != "made":
        text = inside if inside in COMPRESSIONS else "text.jsonl"
        make(folder, "shards" if place == "shards" else text, output)
    dataset = load_dataset(folder / output / "manifest.json")
    return [read_split(dataset, split).tobytes() for split in SPLITS]


def outcome_of(folder: Path, name: str, tokens: list[bytes]) -> str:
    """What comes of using a damaged file. tokens: those of the intact one."""
    try:
        found = use(folder, name)
    except UserError as error:
        message = str(error)
        if "\n" not in message and len(message) <= LONGEST_LINE:
            return "refused"
        print(f"no short line: {message[: 2 * LONGEST_LINE]!r}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    else:
        if name in FOREIGN or found == tokens:
            return "accepted"
        print("other tokens without a word", file=sys.stderr)
    return "traceback"


def put_damage(path: Path, intact: dict[str, bytes], generator: Random) -> None:
    """Put something else in the place of a file."""
    contents = damaged = path.read_bytes()
    if generator.random() < 0.05:
        remove(path)
        generator.choice(NO_FILES)(path)
        return
    while damaged == contents:
        if generator.random() < 0.05:
            damaged = generator.choice(list(intact.values()))
        elif path.suffix == ".bin" and generator.random() < 0.5:
            damaged = damaged_words(contents, generator)
        elif path.suffix in (".json", ".jsonl") and generator.random() < 0.5:
            damaged = damaged_json(contents, generator)
        else:
            damaged = damaged_bytes(contents, generator)
    path.write_bytes(damaged)


def damaged_bytes(contents: bytes, generator: Random) -> bytes:
    """Bits flipped, bytes replaced, put in, taken out, repeated or zeroed, or the end cut off."""
    area = generator.choice([len(contents), min(len(contents), 4096)])
    begin = generator.randrange(area)
    length = generator.choice([1, 1, 2, 4, 100])
    before, part, behind = contents[:begin], contents[begin : begin + length], contents[begin:]
    behind = behind[length:]
    other = generator.randbytes(len(part))
    flipped = bytes([part[0] ^ (1 << generator.randrange(8))]) + part[1:]
    return generator.choice(
        [
            before + flipped + behind,
            before + flipped + behind,
            before + other + behind,
            before + other + part + behind,
            before + behind,
            before + part + part + behind,
            before + bytes(len(part)) + behind,
            before,
        ]
    )


def damaged_json(contents: bytes, generator: Random) -> bytes:
    """One value of a line of JSON is another, or lacks, or there is one more, or it is no JSON."""
    lines = contents.split(b"\n") if contents.startswith(b'{"text"') else [contents]
    number = generator.randrange(len(lines) - 1) if len(lines) > 1 else 0
    value = json.loads(lines[number])
    holder, key = generator.choice(list(holders(value)))
    mark = "the value in question"
    if generator.random() < 0.1:
        del holder[key]
    elif generator.random() < 0.1 and isinstance(holder, dict):
        holder["more"] = holder[key]
    elif generator.random() < 0.8:
        holder[key] = generator.choice(ODD_VALUES)
    else:
        holder[key] = mark
    text = json.dumps(value).replace(json.dumps(mark), generator.choice(ODD_JSON))
    lines[number] = text.encode()
    return b"\n".join(lines)


def holders(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list or object in a JSON value, with each of its keys."""
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(one, dict | list):
            yield from holders(one)


def damaged_words(contents: bytes, generator: Random) -> bytes:
    """One of the first words of a shard's header is another."""
    word = 4 * generator.randrange(4)
    value = generator.choice([*ODD_WORDS, struct.unpack_from("<i", contents, word)[0] + 1])
    return contents[:word] + struct.pack("<i", value) + contents[word + 4 :]


def remove(path: Path) -> None:
    """Remove whatever is there."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        found = Counter(outcomes(Path(name), seed=0, count=int(sys.argv[1])))
    for file in (*FOREIGN, *VOUCHED):
        numbers = {
            outcome: found[file, outcome] for outcome in ("accepted", "refused", "traceback")
        }
        print(f"{file:24}", *(f"{outcome} {number:6}" for outcome, number in numbers.items()))
