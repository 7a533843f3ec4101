"""The challenge's published data, fetched through the Hugging Face hub's own client.

The client resumes broken downloads, shows their progress and keeps the files in its cache
(`HF_HOME`), so a second run fetches nothing. The repository's layout:

    datasets/docs_selected.jsonl                               the documents, validation first
    datasets/datasets/fineweb10B_sp<V>/fineweb_{train,val}_*.bin    their tokens
    datasets/tokenizers/fineweb_<V>_bpe.model                       the tokenizer that made them
"""

from collections.abc import Sequence
from pathlib import Path

from fairway.errors import UserError

DOCUMENTS = "datasets/docs_selected.jsonl"
SHARD_FOLDER = "datasets/datasets/fineweb10B_sp{vocab_size}"
TOKENIZER = "datasets/tokenizers/fineweb_{vocab_size}_bpe.model"

# 8 billion tokens, what the challenge's own downloader takes; the record trains on 5.4 of them.
TRAIN_SHARDS = 80


def fetch_documents(repository: str, revision: str | None) -> Path:
    """Fetch the selected documents; returns the local path of the .jsonl file."""
    path = _fetch(repository, revision, [DOCUMENTS]) / DOCUMENTS
    if not path.is_file():
        raise UserError(
            f"{repository} holds no {DOCUMENTS}: check data.repository and its revision"
        )
    return path


def fetch_shards(repository: str, revision: str | None, vocab_size: int) -> tuple[Path, Path]:
    """Fetch the published shards; returns their folder and the path of their tokenizer."""
    folder = SHARD_FOLDER.format(vocab_size=vocab_size)
    tokenizer = TOKENIZER.format(vocab_size=vocab_size)
    training = [f"{folder}/fineweb_train_{index:06d}.bin" for index in range(TRAIN_SHARDS)]
    snapshot = _fetch(repository, revision, [*training, f"{folder}/fineweb_val_*.bin", tokenizer])
    if not (snapshot / tokenizer).is_file() or not (snapshot / folder).is_dir():
        raise UserError(
            f"{repository} holds no published shards for a vocabulary of {vocab_size}: set "
            "data.vocab_size to a published one, such as 1024, or data.form to 'documents'"
        )
    return snapshot / folder, snapshot / tokenizer


def _fetch(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    # Imported here: the client takes a third of a second that no other source should pay.
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError  # HTTPError: any transport's

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, repo_type="dataset", revision=revision, allow_patterns=list(patterns)
            )
        )
    except (HTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{repository} could not be fetched from the Hugging Face hub ({reason}): check the "
            "network, data.repository and data.revision, and run again; what arrived is kept"
        ) from error
