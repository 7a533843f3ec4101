"""Make a dataset: documents or finished shards → tokenizer, shards, splits and their manifest."""

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from fairway.data.corpus import read_documents, source_files
from fairway.data.dataset import FORMAT
from fairway.data.hub import fetch_shards
from fairway.data.manifest import TRAINING_SPLITS, describe_dataset
from fairway.data.settings import DataSettings
from fairway.data.shards import TOKEN_TYPE, ShardWriter
from fairway.data.tokenizer import load_tokenizer, train_tokenizer
from fairway.errors import UserError
from fairway.files import atomic_path, read_json, write_json
from fairway.progress import progress
from fairway.provenance import device_name, peak_memory_bytes, write_provenance

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"

# Text that is encoded at once, enough to keep every thread busy.
BATCH_CHARACTERS = 4_000_000


def make_dataset(settings: DataSettings, folder: str | Path, threads: int) -> None:
    """Write tokenizer.model, shards, manifest.json, metrics.json and provenance.json to `folder`.

    The manifest is written once all the data are there. Finished shards stay where they are and are
    only described. The data and the manifest do not depend on `threads`.
    Raises UserError for whatever is wrong with the source, the tokenizer or the shards.
    """
    started = time.perf_counter()
    folder = Path(folder)
    tokenizer_path = folder / TOKENIZER
    if settings.has_shards:
        train, val, model = _find_shards(settings, folder)
        inputs = [model]
        load_tokenizer(model, settings.vocab_size)
        _remove_previous(folder)
        _copy(model, tokenizer_path)
        manifest = describe_dataset(settings, tokenizer_path, train, val, threads)
    else:
        files = source_files(settings)
        inputs = [*files, *([Path(settings.tokenizer)] if settings.tokenizer else [])]
        _remove_previous(folder)
        shards, decoded_bytes = _make_shards(settings, files, folder, threads)
        manifest = describe_dataset(
            settings, tokenizer_path, shards["train"], shards["val"], threads
        )
        _check_bytes(manifest["splits"], decoded_bytes, tokenizer_path)
    write_json(folder / MANIFEST, manifest)
    write_json(folder / "metrics.json", _metrics(settings, manifest, time.perf_counter() - started))
    write_provenance(
        folder,
        stage="tokenize",
        seed=settings.seed,
        settings={"data": asdict(settings)},
        inputs=inputs,
        outputs=[folder / MANIFEST, tokenizer_path],  # the manifest holds every shard's hash
        splits_read=(),
    )


def _remove_previous(folder: Path) -> None:
    """Remove the manifest and the shards that an earlier run made here, and no other file."""
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        return
    manifest = read_json(manifest_path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"{manifest_path} was not written by tokenize and would be lost: change data.name"
        )
    manifest_path.unlink()
    for name in manifest["shards"]:
        if Path(name).name == name:
            (folder / name).unlink(missing_ok=True)


def _find_shards(settings: DataSettings, folder: Path) -> tuple[list[Path], list[Path], Path]:
    """Finished shards: absolute paths of those to train on and to validate on, and their model."""
    if settings.source == "huggingface":
        shard_folder, model = fetch_shards(
            settings.repository, settings.revision, settings.vocab_size
        )
    else:
        assert settings.folder is not None and settings.tokenizer is not None
        shard_folder, model = Path(settings.folder), Path(settings.tokenizer)
    if shard_folder.resolve() == folder.resolve():
        raise UserError(
            f"data.folder {shard_folder} is where the dataset would be written: change data.name "
            "or move the shards"
        )
    return _list_shards(shard_folder, "train"), _list_shards(shard_folder, "val"), model


def _list_shards(folder: Path, split: str) -> list[Path]:
    patterns = (f"fineweb_{split}_*.bin", f"{split}_*.bin")
    paths = [path.absolute() for pattern in patterns for path in sorted(folder.glob(pattern))]
    if not paths:
        raise UserError(
            f"{folder} holds no {split} shards: expected {' or '.join(patterns)}; check data.folder"
        )
    return paths


def _copy(source: Path, destination: Path) -> None:
    with atomic_path(destination) as temporary:
        shutil.copyfile(source, temporary)


def _make_shards(
    settings: DataSettings, files: Sequence[Path], folder: Path, threads: int
) -> tuple[dict[str, list[Path]], dict[str, int]]:
    """Tokenise: for `val` and `train`, the shards and the UTF-8 bytes of their decoded text."""
    tokenizer_path = folder / TOKENIZER
    documents = _survey(settings, files, tokenizer_path)
    tokenizer = load_tokenizer(tokenizer_path, settings.vocab_size)
    source = _selected_documents(settings, files)
    shards: dict[str, list[Path]] = {}
    decoded_bytes = {"val": 0, "train": 0}
    with progress(documents, "tokenize", "document") as bar:
        for split, count in (("val", settings.val_docs), ("train", None)):
            writer = ShardWriter(folder, split, settings.shard_tokens)
            for batch in _batches(islice(source, count)):
                tokens, text_bytes = encode_documents(tokenizer, batch, threads)
                writer.write(tokens)
                decoded_bytes[split] += text_bytes
                bar.update(len(batch))
            writer.close()
            shards[split] = writer.paths
    return shards, decoded_bytes


def _selected_documents(settings: DataSettings, files: Sequence[Path]) -> Iterator[str]:
    """The source's documents, validation first, cut at `max_train_docs`."""
    limit = settings.max_train_docs
    stop = None if limit is None else settings.val_docs + limit
    return islice(read_documents(settings, files), stop)


def _survey(settings: DataSettings, files: Sequence[Path], tokenizer_path: Path) -> int:
    """Put the tokenizer in place and return the number of documents, in one pass over them.

    A tokenizer is trained on training documents only. Bad lines and a lack of documents come to
    light here, before anything is tokenised.
    """
    if settings.tokenizer:
        load_tokenizer(settings.tokenizer, settings.vocab_size)
    with progress(None, "read", "document") as bar:
        documents = _counted(_selected_documents(settings, files), bar)
        validation = sum(1 for _ in islice(documents, settings.val_docs))
        first = next(documents, None)
        if first is None:
            raise UserError(
                f"the source holds {validation} documents, expected data.val_docs "
                f"{settings.val_docs} and at least one to train on: lower data.val_docs or bring "
                "more text"
            )
        training = chain([first], documents)
        if settings.tokenizer:
            for _ in training:
                pass
            _copy(Path(settings.tokenizer), tokenizer_path)
        else:
            train_tokenizer(training, settings.vocab_size, tokenizer_path, settings.seed)
        return bar.n


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
) -> tuple[np.ndarray, int]:
    """Tokens uint16 [n], a BOS before each document, and the UTF-8 length of what they decode to.

    The decoded text, not the given one, is what the tokens stand for: normalisation folds spaces
    and compatibility characters.
    """
    encoded = tokenizer.encode(list(documents), num_threads=threads)
    decoded = tokenizer.decode(encoded, num_threads=threads)
    bos = np.array([tokenizer.bos_id()], TOKEN_TYPE)
    parts = [part for ids in encoded for part in (bos, np.array(ids, TOKEN_TYPE))]
    return np.concatenate(parts), sum(len(text.encode()) for text in decoded)


def _check_bytes(
    splits: Mapping[str, Any], decoded_bytes: Mapping[str, int], tokenizer_path: Path
) -> None:
    """Require that tokens stand for exactly the bytes they decode to, in every split made here."""
    training = sum(splits[split]["bytes"] for split in TRAINING_SPLITS)
    for split, counted in (("train", training), ("val", splits["val"]["bytes"])):
        if counted != decoded_bytes[split]:
            raise UserError(
                f"the {split} tokens of {tokenizer_path} count {counted} bytes but decode to "
                f"{decoded_bytes[split]}, expected the same, or bits per byte would be wrong: "
                "name another data.tokenizer"
            )


def _metrics(settings: DataSettings, manifest: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    splits = manifest["splits"]
    totals = {
        unit: sum(split[unit] for split in splits.values())
        for unit in ("tokens", "bytes", "documents")
    }
    cpu = torch.device("cpu")
    return {
        "stage": "tokenize",
        "seed": settings.seed,
        "variant": None,
        "val_loss": None,
        "val_bpb": None,
        **totals,
        "bytes_per_token": totals["bytes"] / totals["tokens"],
        "splits": {name: {unit: split[unit] for unit in totals} for name, split in splits.items()},
        "seconds": seconds,
        "training_seconds": 0.0,
        "evaluation_seconds": 0.0,
        "device": device_name(cpu),
        "attention_backend": None,
        "peak_memory_bytes": peak_memory_bytes(cpu),
        "processes": 1,
    }
