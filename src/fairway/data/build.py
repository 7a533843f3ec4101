"""Make a dataset: documents or finished shards → tokenizer, shards, splits and their manifest."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from fairway.claims import remove
from fairway.data.corpora.base import Corpus
from fairway.data.manifest import describe_dataset
from fairway.data.manifest_fields import TRAINING_SPLITS, read_manifest
from fairway.data.settings import DataSettings
from fairway.data.shards import TOKEN_TYPE, ShardWriter, read_shard
from fairway.data.tokenizer import load_tokenizer, train_tokenizer
from fairway.data.verified import RECORD
from fairway.errors import UserError
from fairway.files import write_bytes, write_json
from fairway.progress import progress
from fairway.provenance import PROVENANCE

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"

BATCH_CHARACTERS = 4_000_000
"""Text is encoded in batches of about this size, which keep every thread busy."""


def make_dataset(
    settings: DataSettings, folder: str | Path, threads: int
) -> tuple[dict[str, Any], list[Path]]:
    """Write tokenizer.model, shards and manifest.json to `folder`.

    Returns metrics (tokens, bytes, documents, bytes_per_token, and `splits` with the first three of
    each split) and the input files for the provenance. The manifest is written last; what it warns
    of is also told on stderr, in one line. Finished shards stay where they are and are only
    described; the manifest has their hashes. Neither the data nor the manifest depend on `threads`.
    Raises UserError for whatever is wrong with the source, the tokenizer or the shards. An earlier
    dataset stays until documents and tokenizer have proved good.
    """
    folder, corpus = Path(folder), settings.corpus()
    make = _describe_shards if corpus.brings_shards else _tokenize
    manifest, inputs = make(corpus, settings, folder, threads)
    write_json(folder / MANIFEST, manifest)
    if manifest["warnings"]:
        print("warning:", *manifest["warnings"], file=sys.stderr, flush=True)
    return _metrics(manifest), inputs


def _describe_shards(
    corpus: Corpus, settings: DataSettings, folder: Path, threads: int
) -> tuple[dict[str, Any], list[Path]]:
    """The manifest of finished shards, and the tokenizer that was copied."""
    shards = corpus.shards()
    inside = shards.train[0].parent
    if inside.resolve() == folder.resolve():
        raise UserError(
            f"data.folder {inside} is where the dataset would be written: change data.name "
            "or move the shards"
        )
    tokenizer = load_tokenizer(shards.tokenizer, settings.vocab_size)
    _check_documents(shards.val, tokenizer.bos_id(), settings.val_docs)
    _remove_previous(folder, _previous_shards(folder))
    _write_tokenizer(folder, shards.tokenizer.read_bytes())
    manifest = describe_dataset(settings, folder / TOKENIZER, shards.train, shards.val, threads)
    return manifest, [shards.tokenizer]


def _check_documents(val: Sequence[Path], bos: int, expected: int | None) -> None:
    found = sum(int(np.count_nonzero(read_shard(path) == bos)) for path in val)
    if expected not in (None, found):
        raise UserError(
            f"the validation shards in {val[0].parent} hold {found} documents, expected "
            f"data.val_docs {expected}: bring the others, or set data.val_docs to {found}"
        )


def _tokenize(
    corpus: Corpus, settings: DataSettings, folder: Path, threads: int
) -> tuple[dict[str, Any], list[Path]]:
    """The manifest of shards made from documents, and the files that these came from."""
    given = [Path(settings.tokenizer)] if settings.tokenizer else []
    for path in given:
        load_tokenizer(path, settings.vocab_size)
    previous = _previous_shards(folder)
    inputs = [*corpus.fetch(), *given]
    documents, model = _survey(corpus, settings, threads)
    _remove_previous(folder, previous)
    tokenizer_path = _write_tokenizer(folder, model)
    shards, original = _make_shards(corpus, settings, tokenizer_path, documents, threads)
    manifest = describe_dataset(settings, tokenizer_path, shards["train"], shards["val"], threads)
    manifest["original"] = {"training": original["train"], "validation": original["val"]}
    _check_bytes(manifest, tokenizer_path)
    return manifest, inputs


def _previous_shards(folder: Path) -> list[str]:
    """Names of the shards that an earlier run made here."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    try:
        manifest = read_manifest(path)
    except UserError as error:
        raise UserError(
            f"{path} was not written by tokenize, or is damaged ({error}), and would be lost: "
            "remove it, or change data.name"
        ) from error
    return [name for name in manifest.shards if Path(name).name == name]


def _remove_previous(folder: Path, shards: Iterable[str]) -> None:
    """Remove what an earlier run made here, first of all what vouches for it; no other file."""
    for name in (PROVENANCE, MANIFEST, RECORD, *shards):
        remove(folder / name)


def _write_tokenizer(folder: Path, model: bytes) -> Path:
    write_bytes(folder / TOKENIZER, model)
    return folder / TOKENIZER


def _make_shards(
    corpus: Corpus, settings: DataSettings, tokenizer_path: Path, documents: int, threads: int
) -> tuple[dict[str, list[Path]], dict[str, Counter[str]]]:
    """Tokenize: for `val` and `train`, the shards, and how their decoded text differs."""
    tokenizer = load_tokenizer(tokenizer_path, settings.vocab_size)
    source = _selected_documents(corpus, settings)
    shards: dict[str, list[Path]] = {}
    original: dict[str, Counter[str]] = {"val": Counter(), "train": Counter()}
    with progress(documents, "tokenize", "document") as bar:
        for split, count in (("val", settings.validation_documents), ("train", None)):
            writer = ShardWriter(tokenizer_path.parent, split, settings.shard_tokens)
            for batch in _batches(islice(source, count)):
                tokens, decoded = encode_documents(tokenizer, batch, threads)
                writer.write(tokens)
                original[split].update(_compare(batch, decoded))
                bar.update(len(batch))
            writer.close()
            shards[split] = writer.paths
    return shards, original


def _compare(documents: Iterable[str], decoded: Iterable[str]) -> dict[str, int]:
    """What the tokenizer's normalization did to documents; `OriginalFields` describes it."""
    lengths = [
        (len(text.encode()), len(after.encode()), text != after)
        for text, after in zip(documents, decoded, strict=True)
    ]
    return {
        "bytes": sum(before for before, _, _ in lengths),
        "lost_bytes": sum(max(0, before - after) for before, after, _ in lengths),
        "added_bytes": sum(max(0, after - before) for before, after, _ in lengths),
        "changed_documents": sum(is_changed for *_, is_changed in lengths),
    }


def _selected_documents(corpus: Corpus, settings: DataSettings) -> Iterator[str]:
    """The source's documents, validation first, cut at `max_train_docs`."""
    limit = settings.max_train_docs
    stop = None if limit is None else min(settings.validation_documents + limit, sys.maxsize)
    return islice(corpus.documents(), stop)


def _survey(corpus: Corpus, settings: DataSettings, threads: int) -> tuple[int, bytes]:
    """The number of documents and the tokenizer's file, from one pass over the documents.

    A tokenizer learns from training documents only. Bad lines and a lack of documents or of
    validation text show here, before anything is tokenized.
    """
    with progress(None, "read", "document") as bar:
        documents = _counted(_selected_documents(corpus, settings), bar)
        with_text = [
            bool(text.strip()) for text in islice(documents, settings.validation_documents)
        ]
        validation = len(with_text)
        if validation and not any(with_text):
            raise UserError(
                f"the first {validation} documents, which data.val_docs makes validation, hold no "
                "text, expected text to score: put others first, or raise data.val_docs"
            )
        first = next(documents, None)
        if first is None:
            raise UserError(
                f"the source holds {validation} documents, expected data.val_docs "
                f"{settings.validation_documents} and at least one to train on: lower "
                "data.val_docs or bring more text"
            )
        training = chain([first], documents)
        if settings.tokenizer:
            for _ in training:
                pass
            model = Path(settings.tokenizer).read_bytes()
        else:
            model = train_tokenizer(
                training,
                settings.vocab_size,
                settings.seed,
                case=settings.case,
                normalization=settings.normalization,
                threads=threads,
            )
        return bar.n, model


def _counted(documents: Iterable[str], bar: tqdm) -> Iterator[str]:
    for text in documents:
        bar.update()
        yield text


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of about BATCH_CHARACTERS."""
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode_documents(
    tokenizer: SentencePieceProcessor, documents: Sequence[str], threads: int
) -> tuple[np.ndarray, list[str]]:
    """Tokens uint16 [n], a BOS before each document, and what each document's tokens decode to.

    That is another text where normalization folds spaces and compatibility characters. Raises
    UserError for a character that the tokenizer has no piece for.
    """
    encoded = tokenizer.encode(list(documents), num_threads=threads, out_type="numpy")
    decoded = tokenizer.decode(encoded, num_threads=threads)
    bos = np.array([tokenizer.bos_id()], TOKEN_TYPE)
    parts = [part for ids in encoded for part in (bos, ids.astype(TOKEN_TYPE))]
    tokens = np.concatenate(parts)
    if np.any(tokens == tokenizer.unk_id()):
        _refuse_unknown(tokenizer, documents)
    return tokens, decoded


def _refuse_unknown(tokenizer: SentencePieceProcessor, documents: Iterable[str]) -> NoReturn:
    unknown = next(
        piece
        for text in documents
        for token, piece in zip(
            tokenizer.encode(text), tokenizer.encode(text, out_type=str), strict=True
        )
        if token == tokenizer.unk_id()
    )
    raise UserError(
        f"the tokenizer has no piece for {unknown[:20]!r} and no byte fallback: it makes <unk> of "
        "it, which stands for no bytes, so bits per byte would be wrong; name a data.tokenizer "
        "that was trained with byte_fallback, or null to train one"
    )


def _check_bytes(manifest: Mapping[str, Any], tokenizer_path: Path) -> None:
    """Require that tokens stand for exactly the bytes they decode to, in every split made here."""
    for name, splits in (("training", TRAINING_SPLITS), ("validation", ("val",))):
        counted = sum(manifest["splits"][split]["bytes"] for split in splits)
        original = manifest["original"][name]
        decoded = original["bytes"] - original["lost_bytes"] + original["added_bytes"]
        if counted != decoded:
            raise UserError(
                f"the {name} tokens of {tokenizer_path} count {counted} bytes but decode to "
                f"{decoded}, expected the same, or bits per byte would be wrong: name another "
                "data.tokenizer"
            )


def _metrics(manifest: Mapping[str, Any]) -> dict[str, Any]:
    units = ("tokens", "bytes", "documents")
    splits = {
        name: {unit: split[unit] for unit in units} for name, split in manifest["splits"].items()
    }
    totals = {unit: sum(split[unit] for split in splits.values()) for unit in units}
    texts, overlap = manifest["original"], manifest["overlap"]
    return {
        **totals,
        "original_bytes": texts and sum(text["bytes"] for text in texts.values()),
        "bytes_per_token": totals["bytes"] / totals["tokens"],
        "overlap_documents": overlap and overlap["exact"] + overlap["near"],
        "splits": splits,
    }
