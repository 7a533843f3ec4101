"""manifest.json as its readers see it: fields with types, which agree with one another."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from fairway.data.shards import MAX_VOCAB_SIZE
from fairway.errors import UserError
from fairway.provenance import Digest, Line
from fairway.records import read_record
from fairway.stages import made_by

FORMAT = 1
TRAINING_SPLITS = ("train", "selection", "adaptation")
SPLITS = (*TRAINING_SPLITS, "val")

MADE_BY = made_by("tokenize")

Count = Annotated[int, Field(ge=0)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SpanFields(_Fields):
    """Tokens [start, stop) of the shard `path`."""

    path: Line
    start: Count
    stop: Count


class SplitFields(_Fields):
    """Spans in reading order, and what they hold."""

    spans: list[SpanFields]
    tokens: Count
    bytes: Count
    documents: Count


class SplitsFields(_Fields):
    """All of SPLITS."""

    train: SplitFields
    selection: SplitFields
    adaptation: SplitFields
    val: SplitFields


class ShardFields(_Fields):
    """A shard as it was when the manifest was written."""

    tokens: Annotated[int, Field(ge=1)]
    sha256: Digest


class TokenizerFields(_Fields):
    """The model file beside the manifest."""

    path: Line
    sha256: Digest


class OriginalFields(_Fields):
    """Bytes of a text before the tokenizer normalized it, document by document.

    lost_bytes: of documents that decode to fewer; added_bytes: of those that decode to more.
    changed_documents: those that decode to another text.
    """

    bytes: Count
    lost_bytes: Count
    added_bytes: Count
    changed_documents: Count


class OriginalsFields(_Fields):
    """Of the training text, all of TRAINING_SPLITS together, and of the validation text."""

    training: OriginalFields
    validation: OriginalFields


class OverlapFields(_Fields):
    """What of the validation text occurs in the training text; `data/overlap.py` describes it."""

    ngram_tokens: Annotated[int, Field(ge=1, le=1024)]
    near_share: Annotated[float, Field(gt=0, le=1)]
    documents: Annotated[int, Field(ge=1)]
    exact: Count
    near: Count
    examples: list[Count]
    ngrams: Count
    ngrams_found: Count


class Manifest(_Fields):
    """A dataset.

    shards: by name beside the manifest, or by absolute path.
    original: None where only tokens are known, as of finished shards.
    overlap: None where it was not looked for.
    warnings: sentences on what its validation text is too small to tell.
    """

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    name: Line
    source: Line
    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCAB_SIZE)]
    bos_id: Count
    tokenizer: TokenizerFields
    shards: dict[Line, ShardFields]
    splits: SplitsFields
    original: OriginalsFields | None
    overlap: OverlapFields | None
    warnings: list[Line]

    def split(self, name: str) -> SplitFields:
        """One of SPLITS."""
        return getattr(self.splits, name)


def read_manifest(path: Path) -> Manifest:
    """Read manifest.json and hold it against itself.

    Raises UserError, which names the field, where one has another type or range, a span is empty or
    lies outside of its shard, spans overlap, training and validation text share a shard, or a
    split's tokens are not those of its spans.
    """
    manifest = read_record(Manifest, path, MADE_BY)
    if manifest.bos_id >= manifest.vocab_size:
        refuse(path, "bos_id", manifest.bos_id, f"an id under vocab_size {manifest.vocab_size}")
    _check_owners(path, manifest)
    for name in SPLITS:
        _check_split(path, manifest, name)
    _check_overlaps(path, manifest)
    return manifest


def refuse(path: Path, field: str, found: object, expected: str) -> NoReturn:
    """Raise the UserError of a manifest's field."""
    raise UserError(
        f"{path}.{field}: found {found!r}, expected {expected}; expected the file made by {MADE_BY}"
    )


def _check_split(path: Path, manifest: Manifest, name: str) -> None:
    split = manifest.split(name)
    if name in ("train", "val") and not split.spans:
        refuse(path, f"splits.{name}.spans", [], "at least one")
    for field, span in _spans(manifest, name):
        if span.path not in manifest.shards:
            refuse(path, f"{field}.path", span.path, "one of `shards`")
        tokens = manifest.shards[span.path].tokens
        if span.stop > tokens:
            refuse(path, f"{field}.stop", span.stop, f"at most the shard's {tokens} tokens")
        if span.start >= span.stop:
            refuse(path, f"{field}.start", span.start, f"less than its stop, {span.stop}")
    total = sum(span.stop - span.start for span in split.spans)
    if split.tokens != total:
        refuse(path, f"splits.{name}.tokens", split.tokens, f"{total}, as its spans have")


def _check_overlaps(path: Path, manifest: Manifest) -> None:
    spans = [one for name in SPLITS for one in _spans(manifest, name)]
    spans.sort(key=lambda one: (one[1].path, one[1].start))
    for (before, first), (field, second) in pairwise(spans):
        if first.path == second.path and second.start < first.stop:
            refuse(path, f"{field}.start", second.start, f"{first.stop}, the stop of {before}")


def _check_owners(path: Path, manifest: Manifest) -> None:
    """A shard is of training text or of validation text, by its use and by its name."""
    training = {span.path for name in TRAINING_SPLITS for span in manifest.split(name).spans}
    for name in SPLITS:
        kind, other = ("validation", "train_") if name == "val" else ("training", "val_")
        for field, span in _spans(manifest, name):
            is_shared = name == "val" and span.path in training
            if is_shared or Path(span.path).name.removeprefix("fineweb_").startswith(other):
                refuse(path, f"{field}.path", span.path, f"a shard of {kind} text")


def _spans(manifest: Manifest, name: str) -> Iterator[tuple[str, SpanFields]]:
    """The spans of a split, each with the path of its field."""
    for index, span in enumerate(manifest.split(name).spans):
        yield f"splits.{name}.spans.{index}", span
