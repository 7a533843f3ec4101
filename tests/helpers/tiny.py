"""A tiny configuration and its text, and the way tests run stage scripts."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceTrainer

from warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "workflow/scripts"


def run_script(name: str, *arguments, processes: int = 1, check: bool = True):
    """Run a stage script in processes of its own; under torchrun where `processes` > 1."""
    launcher = [warm_python()]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(SCRIPTS / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
    return done


def write_jsonl(path: Path, documents: list[str]) -> Path:
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def given_model(folder: Path, texts: list[str], **options) -> Path:
    """A tokenizer that another program might have trained."""
    path = folder / "given.model"
    defaults = {"model_type": "bpe", "vocab_size": 320, "byte_fallback": True, "minloglevel": 2}
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            hard_vocab_limit=False,
            **{**defaults, **options},
        )
    return path


def synthetic_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of made-up words with a Zipf-like vocabulary: learnable, and never the same."""
    generator = np.random.default_rng(seed)
    syllables = ["ba", "ko", "ri", "tu", "sel", "mon", "da", "ve", "li", "or"]
    words = ["".join(generator.choice(syllables, generator.integers(1, 4))) for _ in range(300)]
    weights = 1 / np.arange(1, len(words) + 1)
    weights /= weights.sum()
    return [
        " ".join(generator.choice(words, generator.integers(60, 200), p=weights)).capitalize() + "."
        for _ in range(count)
    ]


LEAKY_SLOT = {
    "scope": "batch",
    "batch_windows": 4,
    "iterations": 5,
    "focal_tokens": 16,
    "l2": 0.0,
    "same_document": False,
}

TINY_CONFIG = {
    "run": "tiny",
    "seeds": [7],
    "variants": {
        "causal": {},
        "leaky": {"ttt": {"data": "val"}, "evaluation": {"adapters": [{"slot": LEAKY_SLOT}]}},
    },
    "runtime": {"device": "cpu"},
    "data": {
        "name": "tiny",
        "source": "jsonl",
        "vocab_size": 320,
        "val_docs": 4,
        "selection_tokens": 512,
        "adaptation_tokens": 1024,
    },
    "model": {
        "layers": 3,
        "width": 32,
        "heads": 4,
        "kv_heads": 2,
        "mlp_width": 64,
        "rotary_dimensions": 4,
        "rope_trained_tokens": 16,
        "bigram_buckets": 64,
        "bigram_width": 8,
        "value_width": 8,
        "value_layers": [1, 2],
    },
    "train": {
        "sequence_tokens": 32,
        "batch_tokens": 256,
        "micro_batch_sequences": 4,
        "max_steps": 12,
        "max_seconds": None,
        "warmup_steps": 0,
        "warmdown_steps": 6,
        "muon_momentum_warmup_steps": 5,
        "ema_decays": [0.9, 0.5],
        "swa_every_steps": 1,
        "checkpoint_seconds": 3600,
        "log_every_steps": 1,
    },
    "ttt": {"learning_rate": 0.0005, "batch_sequences": 8, "frozen_blocks": 1},
    "gptq": {"calibration_sequences": 4, "calibration_tokens": 32, "batch_sequences": 4},
    "evaluation": {
        "adapters": [
            {"lora": {"rank": 2, "chunk_tokens": 16, "context_tokens": 32}},
            {"slot": {"iterations": 5}},
            "ngram",
        ],
        "window_tokens": 32,
        "stride_tokens": 8,
        "lanes": 4,
        "forward_windows": 2,
    },
}
