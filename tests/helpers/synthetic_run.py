"""A finished run made of seeded numbers: every file that the report reads, no model in sight.

`run_script` makes its report, `load_results` reads it as the report does.
"""

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pandas as pd

from fairway.report.results import read_results

SEEDS = (1337, 42, 2025)
VARIANTS = ("causal", "published")
ADAPTERS = {"causal": ["lora", "slot"], "published": ["slot"]}
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "workflow/scripts/report.py"))
SETTINGS = {
    "report": {
        "baseline": {"name": "last record", "losses": [2.5512, 2.5498, 2.5520]},
        "minimum_gain_nats": 0.005,
        "significance": 0.01,
    },
    "budgets": {"artifact_bytes": 16_000_000, "training_seconds": 600, "evaluation_seconds": 600},
}
PASSING = {
    "flip": "12 tokens were replaced one at a time, and no earlier distribution changed.",
    "lineage": "The artifact's ancestry holds training text only.",
    "coverage": "Every target was scored exactly once, in order: 12,000 (whole evaluation).",
}
FAILING = {
    "flip": "9 of 12 tokens, when replaced, changed the distribution of an earlier target.",
    "lineage": "The artifact's ancestry holds validation text: ttt trained on val.",
}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_tokens(variant, seed, rows=12_000, documents=24):
    """A token table: `causal` gains by LoRA, more the longer the document, and a little by SLOT;
    `published` by SLOT, on the targets in their own loss."""
    generator = np.random.default_rng(seed)
    position = np.arange(1, rows + 1)
    text = np.random.default_rng(7)  # the same text and difficulty for every seed and variant
    document = np.searchsorted(
        np.sort(text.choice(np.arange(2, rows), documents - 1, replace=False)), position, "right"
    )
    difficulty = text.gamma(2.0, 1.3, rows)
    before = difficulty + generator.normal(0, 0.3, rows) + 0.002 * generator.normal()
    own = np.zeros(rows, dtype=bool)
    begin = np.maximum.accumulate(np.where(np.diff(document, prepend=0) > 0, position, 0))
    gains = {
        "lora": generator.normal(0.012 * np.log2(1 + (position - begin) / 64), 0.1, rows),
        "slot": generator.normal(0.002, 0.05, rows),
    }
    if variant == "published":
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


def common_metrics(stage, seed, variant, loss, seconds, bytes_per_token=3.0):
    return {
        "stage": stage,
        "seed": seed,
        "variant": variant,
        "val_loss": loss,
        "val_bpb": loss / math.log(2) / bytes_per_token,
        "tokens": 12_000,
        "bytes": 36_000,
        "seconds": seconds,
        "training_seconds": seconds * 0.8 if stage in ("train", "ttt") else 0.0,
        "evaluation_seconds": seconds * 0.9 if stage == "slot" else 1.0,
        "device": "cpu (x86_64, 2 threads)",
        "attention_backend": "sdpa",
        "peak_memory_bytes": 900_000_000,
        "processes": 1,
    }


def write_stage(folder, metrics, splits, settings):
    write_json(folder / "metrics.json", metrics)
    versions = {"python": "3.11.9", "torch": "2.11.0", "numpy": "2.1.0"}
    provenance = {"settings": settings, "splits": splits, "git_commit": "a" * 40}
    write_json(folder / "provenance.json", provenance | {"versions": versions})


def write_shared(base, seed, generator):
    for stage, loss, seconds in (("train", 2.72, 34.0), ("ema", 2.66, 4.0)):
        metrics = common_metrics(stage, seed, None, loss + generator.normal(0, 0.004), seconds)
        write_stage(base / stage, metrics, ["train"], {"train": {"steps": 300}})
    step = np.arange(0, 300, 2)
    loss = 2.7 + 4.2 * np.exp(-step / 40) + generator.normal(0, 0.05, len(step))
    curve = {
        "step": step,
        "loss": loss,
        "lr_scale": np.clip((300 - step) / 150, 0, 1),
        "seconds": step * 0.1,
        "tokens": step * 4096,
    }
    pd.DataFrame(curve).to_parquet(base / "train" / "metrics.parquet")


def write_variant(base, variant, seed, generator):
    leaks = variant == "published"
    splits = ["train", "val"] if leaks else ["train"]
    noise = generator.normal(0, 0.003, 2)
    losses = {"ttt": 2.60 - 0.1 * leaks + noise[0], "gptq": 2.63 - 0.1 * leaks + noise[1]}
    for stage, loss in losses.items():
        metrics = common_metrics(stage, seed, variant, loss, 9.0 + generator.random())
        if stage == "gptq":
            metrics["artifact_bytes"] = 512_345 + int(generator.integers(0, 4000))
            metrics["code_bytes"] = 123_456
            metrics["total_bytes"] = metrics["artifact_bytes"] + metrics["code_bytes"]
        write_stage(base / stage, metrics, splits, {stage: {"epochs": 2}})
    tokens = make_tokens(variant, seed)
    (base / "slot").mkdir(parents=True)
    tokens.to_parquet(base / "slot" / "tokens.parquet", row_group_size=5000)
    loss = tokens["nll_after"].mean()
    metrics = common_metrics("slot", seed, variant, loss, 21.0)
    metrics["val_bpb"] = tokens["nll_after"].sum() / math.log(2) / tokens["bytes"].sum()
    metrics["adapters"] = ADAPTERS[variant]
    metrics |= {f"gain_{name}_nats": tokens[f"gain_{name}"].mean() for name in ADAPTERS[variant]}
    slot = {"scope": "batch" if leaks else "window", "batch_windows": 32}
    evaluation = {"adapters": ADAPTERS[variant], "window_tokens": 128, "stride_tokens": 32}
    write_stage(base / "slot", metrics, splits, {"slot": slot, "evaluation": evaluation})
    write_audit(base / "audit", variant, seed, leaks, splits)


def write_audit(folder, variant, seed, leaks, splits):
    checks = []
    for name, sentence in PASSING.items():
        fails = leaks and name in FAILING
        sentence = FAILING[name] if fails else sentence
        verdict = "FAIL" if fails else "PASS"
        checks.append({"name": name, "verdict": verdict, "sentence": sentence, "evidence": {}})
    reason = "No model to draw text from was given."
    checks.append({"name": "null", "verdict": "NOT RUN", "sentence": reason, "evidence": {}})
    meaning = "12 replacements in an excerpt of 4,000 targets: a leak at 53.6% or more is seen."
    record = {"checks": checks, "track": "adaptive", "meaning_of_pass": meaning}
    write_json(folder / "audit.json", record | {"verdict": "FAIL" if leaks else "PASS"})
    distance = np.arange(4000)
    changed = np.where((distance < 1024) & leaks, 10 - distance // 103, 0)
    reach = {"distance_tokens": distance, "pairs": 12, "changed": changed}
    pd.DataFrame(reach | {"largest_change_nats": changed * 0.1}).to_parquet(
        folder / "reach.parquet"
    )
    metrics = {"stage": "audit", "seed": seed, "variant": variant, "seconds": 14.0}
    write_stage(folder, metrics | {"device": "cpu (x86_64, 2 threads)"}, splits, {})


def make_run(root, seeds=SEEDS):
    """A finished run of `seeds` and both variants under `root`/results."""
    for seed in seeds:
        generator = np.random.default_rng(seed)
        base = root / "results" / "quickstart" / f"seed-{seed}"
        write_shared(base, seed, generator)
        for variant in VARIANTS:
            write_variant(base / variant, variant, seed, generator)
    write_json(root / "results/data/embedded/metrics.json", {"stage": "tokenize", "seconds": 3.0})
    return root


def run_script(root, seeds=SEEDS, settings=SETTINGS, output="report"):
    """Write the report of a run that `make_run` made; return its folder."""
    folder = root / "results" / "quickstart"
    arguments = ["--settings", json.dumps(settings), "--run-folder", str(folder)]
    arguments += ["--data-folder", str(root / "results/data/embedded")]
    arguments += ["--seeds", *map(str, seeds), "--variants", *VARIANTS]
    SCRIPT["main"]([*arguments, "--output", str(folder / output)])
    return folder / output


def load_results(root, seeds=SEEDS):
    folder = root / "results"
    return read_results(
        folder / "quickstart", folder / "data/embedded", list(seeds), list(VARIANTS)
    )
