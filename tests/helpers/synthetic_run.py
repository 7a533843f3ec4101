"""A finished run made of seeded numbers: every file that the report reads, no model in sight.

`make_run` writes it for a layout of variants, `load_results` reads it as the report does, and
`make_report` makes its report.
"""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from fairway.report.page import write_report
from fairway.report.results import Results, read_results
from fairway.report.settings import ReportSettings

SEEDS = (1337, 42, 2025)
STAGES = ("train", "ema", "ttt", "gptq", "slot_eval", "audit")
FROM_TTT = STAGES[2:]


def layout(**own_stages: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Each variant's folders: its own for the stages named, `shared` for the others."""
    return {
        variant: {stage: variant if stage in own else "shared" for stage in STAGES}
        for variant, own in own_stages.items()
    }


QUICKSTART = layout(causal=(), leaky=FROM_TTT)
TWO_TRAININGS = layout(slow=STAGES, fast=STAGES)
SWEEP = layout(
    **{f"causal-dampening_fraction_{value}": STAGES[3:] for value in range(1, 9)}, leaky=FROM_TTT
)
OTHER_TEXT = layout(causal=(), german=STAGES, leaky=FROM_TTT)

ADAPTERS = {"causal": {"lora": "LoRA", "slot": "SLOT"}, "leaky": {"slot": "SLOT"}}
SHIFTS = {"fast": -0.03} | {variant: 0.004 * index for index, variant in enumerate(SWEEP)}
"""Nats per token by which a variant's loss differs."""
BASELINE = {"name": "best submission", "losses": [2.5512, 2.5498, 2.5520]}
SETTINGS = {"baseline": BASELINE, "minimum_gain_nats": 0.005, "significance": 0.01}
BUDGETS = {"artifact_bytes": 16_000_000, "training_seconds": 600.0, "evaluation_seconds": 600.0}
PASSING = {
    "flip": "12 tokens were replaced one at a time, and no earlier distribution changed.",
    "lineage": "The artifact's ancestry holds training text only.",
    "coverage": "Every target was scored exactly once, in order: 12,000 (whole evaluation).",
}
FAILING = {
    "flip": "9 of 12 tokens, when replaced, changed the distribution of an earlier target.",
    "lineage": "The artifact's ancestry holds validation text: ttt trained on val.",
}


def adapters_of(variant: str) -> dict[str, str]:
    return ADAPTERS.get(variant, ADAPTERS["causal"])


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_tokens(variant: str, seed: int, rows: int = 12_000, documents: int = 24) -> pd.DataFrame:
    """A token table. `leaky` gains by SLOT, on the targets in their own loss; the others by LoRA,
    more the longer the document, and a little by SLOT. `german` has scored another text."""
    generator = np.random.default_rng([seed, zlib.crc32(variant.encode())])
    position = np.arange(1, rows + 1)
    # The same text and difficulty for every seed and variant.
    text = np.random.default_rng(8 if variant == "german" else 7)
    document = np.searchsorted(
        np.sort(text.choice(np.arange(2, rows), documents - 1, replace=False)), position, "right"
    )
    difficulty = text.gamma(2.0, 1.3, rows) + SHIFTS.get(variant, 0.0)
    before = difficulty + generator.normal(0, 0.3, rows) + 0.002 * generator.normal()
    own = np.zeros(rows, dtype=bool)
    begin = np.maximum.accumulate(np.where(np.diff(document, prepend=0) > 0, position, 0))
    gains = {
        "lora": generator.normal(0.012 * np.log2(1 + (position - begin) / 64), 0.1, rows),
        "slot": generator.normal(0.002, 0.05, rows),
    }
    if variant == "leaky":
        own = (position // 32) % 32 != 0
        means = np.where(own, 0.22, -0.33)
        gains = {"slot": generator.normal(means, 0.3)}
        before = before - 0.05
    byte_counts = text.integers(1, 6, rows)
    return pd.DataFrame(
        {
            "position": position.astype(np.int64),
            "document": document.astype(np.int32),
            "token": text.integers(4, 1024, rows).astype(np.int32),
            "window": (position // 32).astype(np.int32),
            "lane": np.zeros(rows, np.int16),
            "nll_before": before,
            "nll_after": before - sum(gains.values()),
            "bytes": byte_counts.astype(np.int16),
            "in_own_loss": own,
            **{f"gain_{name}": gain for name, gain in gains.items()},
        }
    )


def make_run(
    root: Path, seeds=SEEDS, folders: Mapping[str, Mapping[str, str]] = QUICKSTART
) -> Path:
    """A finished run under `root`/results/quickstart; a shared folder is its first variant's."""
    for seed in seeds:
        for variant, stages in folders.items():
            generator = np.random.default_rng([seed, zlib.crc32(variant.encode())])
            for stage, name in stages.items():
                folder = root / "results" / "quickstart" / f"seed-{seed}" / name / stage
                if not folder.exists():
                    write_stage(folder, variant, seed, generator)
    return root


def write_stage(folder: Path, variant: str, seed: int, generator: np.random.Generator) -> None:
    """One stage's files, as `variant` makes them."""
    leaks, stage = variant == "leaky", folder.name
    shift = SHIFTS.get(variant, 0.0) - 0.13 * leaks + generator.normal(0, 0.003)
    losses = {"train": 2.72, "ema": 2.66, "ttt": 2.60, "gptq": 2.63}
    seconds = {"train": 34.0, "slot_eval": 21.0, "audit": 14.0}
    metrics = common_metrics(
        stage, seed, variant, losses.get(stage, 2.6) + shift, seconds.get(stage, 9.0)
    )
    settings = {stage: {"epochs": 2}}
    splits = ["train", "val"] if leaks and stage in FROM_TTT else ["train"]
    if stage == "train":
        write_curve(folder, shift, generator)
    if stage == "gptq":
        metrics["artifact_bytes"] = 512_345 + int(generator.integers(0, 4000))
        metrics["code_bytes"] = 123_456
        metrics["total_bytes"] = metrics["artifact_bytes"] + metrics["code_bytes"]
    if stage == "slot_eval":
        settings = {"evaluation": evaluation_settings(variant)}
        metrics |= write_tokens(folder, variant, seed)
    if stage == "audit":
        settings = {"budgets": BUDGETS}
        for name in ("val_loss", "val_bpb", "tokens", "bytes"):
            del metrics[name]
        write_audit(folder, leaks)
    write_json(folder / "metrics.json", metrics)
    versions = {"python": "3.11.9", "torch": "2.11.0", "numpy": "2.1.0"}
    provenance = {"settings": settings, "splits": splits, "git_commit": "a" * 40}
    write_json(folder / "provenance.json", provenance | {"versions": versions})


def common_metrics(stage: str, seed: int, variant: str, loss: float, seconds: float) -> dict:
    return {
        "stage": stage,
        "seed": seed,
        "variant": variant,
        "val_loss": loss,
        "val_bpb": loss / math.log(2) / 3.0,
        "tokens": 12_000,
        "bytes": 36_000,
        "seconds": seconds,
        "training_seconds": seconds * 0.8 if stage in ("train", "ttt") else 0.0,
        "evaluation_seconds": seconds * 0.9 if stage == "slot_eval" else 1.0,
        "device": "cpu (x86_64, 2 threads)",
        "attention_backend": "sdpa",
        "peak_memory_bytes": 900_000_000,
        "processes": 1,
    }


def write_curve(folder: Path, shift: float, generator: np.random.Generator) -> None:
    step = np.arange(0, 300, 2)
    loss = 2.7 + shift + 4.2 * np.exp(-step / 40) + generator.normal(0, 0.05, len(step))
    curve = {
        "step": step,
        "loss": loss,
        "lr_scale": np.clip((300 - step) / 150, 0, 1),
        "seconds": step * 0.1,
        "tokens": step * 4096,
    }
    folder.mkdir(parents=True)
    pd.DataFrame(curve).to_parquet(folder / "metrics.parquet")


def evaluation_settings(variant: str) -> dict:
    scope = {"scope": "batch" if variant == "leaky" else "window", "batch_windows": 32}
    adapters = [{name: scope if name == "slot" else {}} for name in adapters_of(variant)]
    return {"adapters": adapters, "window_tokens": 128, "stride_tokens": 32}


def write_tokens(folder: Path, variant: str, seed: int) -> dict:
    """tokens.parquet, and what metrics.json says of it."""
    tokens = make_tokens(variant, seed)
    folder.mkdir(parents=True)
    tokens.to_parquet(folder / "tokens.parquet", row_group_size=5000)
    adapters = adapters_of(variant)
    return {
        "val_loss": tokens["nll_after"].mean(),
        "val_bpb": tokens["nll_after"].sum() / math.log(2) / tokens["bytes"].sum(),
        "adapters": [{"name": name, "title": title} for name, title in adapters.items()],
        **{f"gain_{name}_nats": tokens[f"gain_{name}"].mean() for name in adapters},
    }


def write_audit(folder: Path, leaks: bool) -> None:
    checks = []
    for name, sentence in PASSING.items():
        fails = leaks and name in FAILING
        sentence = FAILING[name] if fails else sentence
        verdict = "FAIL" if fails else "PASS"
        checks.append({"name": name, "verdict": verdict, "sentence": sentence, "evidence": {}})
    reason = "No model to draw text from was given."
    checks.append({"name": "null", "verdict": "NOT RUN", "sentence": reason, "evidence": {}})
    meaning = "12 replacements in an excerpt of 4,000 targets: a leak at 53.6% or more is seen."
    found = {"checks": checks, "track": "adaptive", "meaning_of_pass": meaning}
    write_json(folder / "audit.json", found | {"verdict": "FAIL" if leaks else "PASS"})
    distance = np.arange(4000)
    changed = np.where((distance < 1024) & leaks, 10 - distance // 103, 0)
    reach = {"distance_tokens": distance, "pairs": 12, "changed": changed}
    pd.DataFrame(reach | {"largest_change_nats": changed * 0.1}).to_parquet(
        folder / "reach.parquet"
    )


def load_results(
    root: Path, seeds=SEEDS, folders: Mapping[str, Mapping[str, str]] = QUICKSTART
) -> Results:
    datasets = {variant: "german" if variant == "german" else "embedded" for variant in folders}
    return read_results(root / "results" / "quickstart", folders, list(seeds), datasets)


def make_report(
    root: Path,
    seeds=SEEDS,
    folders: Mapping[str, Mapping[str, str]] = QUICKSTART,
    settings: Mapping = SETTINGS,
) -> Path:
    """Write the report of a run that `make_run` made; return its folder."""
    folder = root / "results" / "quickstart" / "report"
    write_report(folder, load_results(root, seeds, folders), ReportSettings(**settings))
    return folder
