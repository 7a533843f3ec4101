"""The challenge's published data, fetched through the Hugging Face hub's own client.

The client resumes broken downloads, shows their progress and keeps the files in its cache
(`HF_HOME`), so a second run fetches nothing. The repository's layout:

    datasets/docs_selected.jsonl                               the documents, validation first
    datasets/datasets/fineweb10B_sp<V>/fineweb_{train,val}_*.bin    their tokens
    datasets/tokenizers/fineweb_<V>_bpe.model                       the tokenizer that made them
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from fairway.data.corpora.base import Corpus, FinishedShards, finished_shards
from fairway.data.corpora.jsonl import read_jsonl
from fairway.errors import UserError

DOCUMENTS = "datasets/docs_selected.jsonl"
SHARD_FOLDER = "datasets/datasets/fineweb10B_sp{vocab_size}"
TOKENIZER = "datasets/tokenizers/fineweb_{vocab_size}_bpe.model"

# 8 billion tokens, as many as the challenge's own downloader takes. The reference submission trains
# on 5.4 billion.
TRAIN_SHARDS = 80


class Huggingface(Corpus):
    """`data.repository` at `data.revision`: its documents, or (`data.form`) its shards."""

    title = "Hugging Face dataset"
    reads = ("repository", "revision", "form")
    downloads = True

    @property
    def brings_shards(self) -> bool:
        return self.data.form == "shards"

    def check(self) -> None:
        """Raise UserError where published shards would meet another tokenizer."""
        if self.brings_shards and self.data.tokenizer:
            raise UserError(
                "data.tokenizer is set but data.form is 'shards', which brings its own tokenizer: "
                "remove data.tokenizer or set data.form to 'documents'"
            )

    def fetch(self) -> tuple[Path, ...]:
        return (self._documents,)

    def documents(self) -> Iterator[str]:
        return read_jsonl(self._documents)

    def shards(self) -> FinishedShards:
        folder = SHARD_FOLDER.format(vocab_size=self.data.vocab_size)
        tokenizer = TOKENIZER.format(vocab_size=self.data.vocab_size)
        training = [f"{folder}/fineweb_train_{index:06d}.bin" for index in range(TRAIN_SHARDS)]
        snapshot = self._snapshot([*training, f"{folder}/fineweb_val_*.bin", tokenizer])
        if not (snapshot / tokenizer).is_file() or not (snapshot / folder).is_dir():
            raise UserError(
                f"{self.data.repository} holds no published shards for a vocabulary of "
                f"{self.data.vocab_size}: set data.vocab_size to a published one, such as 1024, or "
                "data.form to 'documents'"
            )
        return finished_shards(snapshot / folder, snapshot / tokenizer)

    @cached_property
    def _documents(self) -> Path:
        path = self._snapshot([DOCUMENTS]) / DOCUMENTS
        if not path.is_file():
            raise UserError(
                f"{self.data.repository} holds no {DOCUMENTS}: check data.repository and "
                "data.revision"
            )
        return path

    def _snapshot(self, patterns: Sequence[str]) -> Path:
        """The folder that holds the repository's files of these patterns, fetched."""
        # Imported here: the client takes a third of a second that no other source should pay.
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError, HTTPError  # of any transport

        repository, revision = self.data.repository, self.data.revision
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    repository, repo_type="dataset", revision=revision, allow_patterns=[*patterns]
                )
            )
        except (HTTPError, HFValidationError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{repository} could not be fetched from the Hugging Face hub ({reason}): check "
                "the network, data.repository and data.revision, and run again; what arrived is "
                "kept"
            ) from error
