"""A finished run made of seeded numbers: every file that the report reads, no model in sight.

`make_run` writes it for a layout of variants, `load_results` reads it as the report does, and
`make_report` makes its report.
"""

import json
import math
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd

from fairway.files import sha256_of, sha256_of_json, write_json
from fairway.metrics import checked_metrics
from fairway.provenance import write_provenance
from fairway.report.captions import captions
from fairway.report.page import write_report
from fairway.report.results import Results, read_results
from fairway.report.settings import ReportSettings
from fairway.report.tables import RunTables, make_tables
from fairway.stages import STAGES as TABLE
from provenance_chain import edit

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
    **{f"causal-dampening_fraction_{value}": STAGES[3:] for value in range(1, 6)}, leaky=FROM_TTT
)
OTHER_TEXT = layout(causal=(), german=STAGES, leaky=FROM_TTT)

ADAPTERS = {"causal": {"lora": "LoRA", "slot": "SLOT"}, "leaky": {"slot": "SLOT"}}
SHIFTS = {"fast": -0.03} | {variant: 0.004 * index for index, variant in enumerate(SWEEP)}
"""Nats per token by which a variant's loss differs."""
BASELINE = {"name": "best submission", "losses": [2.5512, 2.5498, 2.5520]}
SETTINGS = {"baseline": BASELINE, "minimum_gain_nats": 0.005, "significance": 0.01}
BUDGETS = {"artifact_bytes": 16_000_000, "training_seconds": 600.0, "evaluation_seconds": 600.0}
TRAIN = {"max_steps": 298, "max_seconds": None, "batch_tokens": 4096, "held_out_seconds": 10.0}
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
            manifest = write_manifest(root / f"results/data/{dataset_of(variant)}")
            paths = {
                stage: root / f"results/quickstart/seed-{seed}" / name / stage
                for stage, name in sorted(stages.items(), key=lambda one: [*TABLE].index(one[0]))
            }
            for stage, folder in paths.items():
                if not folder.exists():
                    folder.mkdir(parents=True)
                    inputs = [paths[need] / "provenance.json" for need in TABLE[stage].needs[1:]]
                    if stage == "prune":
                        inputs = [paths["gptq"] / "provenance.json"]
                    if stage == "audit":
                        read = ("metrics.json", "artifact.bin", "tokens.parquet")
                        beside = [path.with_name(name) for path in inputs for name in read]
                        inputs += [path for path in beside if path.exists()]
                    write_stage(folder, variant, seed, generator, [manifest, *inputs])
    return root


def dataset_of(variant: str) -> str:
    return "german" if variant == "german" else "embedded"


def write_manifest(folder: Path) -> Path:
    """The manifest.json of a dataset, and its record: all that is read of it here."""
    path = folder / "manifest.json"
    span = {"path": "val_000000.bin", "start": 0, "stop": 12_001}
    split = {"spans": [], "tokens": 0, "bytes": 0, "documents": 0}
    val = split | {"spans": [span], "tokens": 12_001, "bytes": 36_000, "documents": 24}
    train = split | {"spans": [span | {"path": "train_000000.bin"}], "tokens": 12_001}
    shard = {"tokens": 12_001, "sha256": "0" * 64}
    overlap = {"documents": 24, "exact": 0, "near": 0, "examples": [], "ngrams": 11_000}
    overlap |= {"ngrams_found": 12, "ngram_tokens": 16, "near_share": 0.5}
    validation = {"bytes": 36_090, "lost_bytes": 120, "added_bytes": 30, "changed_documents": 9}
    training = dict.fromkeys(validation, 0)
    manifest = {
        "format": 1, "name": folder.name, "source": "synthetic", "vocab_size": 1024, "bos_id": 1,
        "tokenizer": {"path": "tokenizer.model", "sha256": "0" * 64},
        "shards": {"train_000000.bin": shard, "val_000000.bin": shard},
        "splits": {"train": train, "selection": split, "adaptation": split, "val": val},
        "original": {"training": training, "validation": validation}, "overlap": overlap,
        "warnings": [],
    }  # fmt: skip
    write_json(path, manifest)
    settings = {"data": {"name": folder.name, "val_docs": 24}}
    write_provenance(
        folder, stage="tokenize", settings=settings, inputs={}, outputs=[path], splits_read=[]
    )
    return path


def write_stage(
    folder: Path, variant: str, seed: int, generator: np.random.Generator, inputs: list[Path]
) -> None:
    """One stage's files, as `variant` makes them of `inputs`."""
    leaks, stage = variant == "leaky", folder.name
    shift = SHIFTS.get(variant, 0.0) - 0.13 * leaks + generator.normal(0, 0.003)
    losses = {"train": 2.72, "ema": 2.66, "ttt": 2.60, "gptq": 2.63}
    seconds = {"train": 34.0, "slot_eval": 21.0, "audit": 14.0}
    metrics = common_metrics(
        stage, seed, folder.parent.name, losses.get(stage, 2.6) + shift, seconds.get(stage, 9.0)
    )
    settings = {stage: {"epochs": 2} if stage != "train" else TRAIN}
    splits = ["train", "val"] if leaks and stage in FROM_TTT else ["train"]
    if "weights.safetensors" in TABLE[stage].products:
        (folder / "weights.safetensors").write_text(f"{variant} {seed}")  # only its hash is read
    if stage == "train":
        write_curve(folder, shift, generator)
    if stage == "gptq":
        metrics["artifact_bytes"] = 512_345 + int(generator.integers(0, 4000))
        metrics["code_bytes"] = 123_456
        metrics["total_bytes"] = metrics["artifact_bytes"] + metrics["code_bytes"]
        (folder / "artifact.bin").write_bytes(generator.bytes(100))
        write_layers(folder, shift)
    if stage == "slot_eval":
        settings = {"evaluation": evaluation_settings(variant)}
        metrics |= write_tokens(folder, variant, seed)
    if stage == "audit":
        settings = {"budgets": BUDGETS}
        for name in ("val_loss", "val_bpb", "tokens", "bytes"):
            del metrics[name]
        write_audit(folder, seed, leaks)
        metrics["verdict"] = "FAIL" if leaks else "PASS"
    write_json(folder / "metrics.json", checked_metrics(metrics | OWN_METRICS.get(stage, {})))
    record = {
        "stage": stage, "seed": seed, "settings": settings, "splits": splits, "splits_read": [],
        "inputs": {str(path): sha256_of(path) for path in inputs},
        "outputs": {path.name: sha256_of(path) for path in folder.iterdir()},
        "parents": [], "git_commit": "a" * 40,
        "versions": {"python": "3.11.9", "torch": "2.11.0", "numpy": "2.1.0"},
    }  # fmt: skip
    write_json(folder / "provenance.json", {**record, "sha256": sha256_of_json(record)})


def reseal(*changed: Path) -> None:
    """Let a run's records say of files that were changed, and of each other, what now lies there.

    What a forger would do; tests do it to come to what is checked besides the hashes.
    """
    for path in changed:
        record = path.parent / "provenance.json"
        outputs = {one.name: sha256_of(one) for one in path.parent.iterdir() if one != record}
        edit(record, outputs=outputs)
    for stage in TABLE:
        for record in changed[0].parents[2].glob(f"*/{stage}/provenance.json"):
            listed = json.loads(record.read_text())["inputs"]
            edit(record, inputs={path: sha256_of(path) for path in listed})


MODEL_METRICS = {"kernels": "plain", "attention_backend": "sdpa", "precision": "float32"}
OWN_METRICS = {
    "train": MODEL_METRICS | {
        "identity": "0" * 64, "steps": 300, "train_tokens": 1_228_800, "train_loss": 2.7,
        "tokens_per_second": 36_000.0, "parameters": 1_000_000,
    },
    "ema": MODEL_METRICS | {"average": "ema_0.9", "selection_losses": {}},
    "ttt": MODEL_METRICS | {"data": "train", "epoch_losses": [2.6]},
    "gptq": MODEL_METRICS | {
        "quantizer": "gptq", "calibration": "train", "limit_bytes": 16_000_000, "streams": {},
        "codecs": {}, "zeros": 0, "mean_error": 0.1,
    },
    "slot_eval": MODEL_METRICS | {
        "val_loss_before": 2.7, "val_bpb_before": 1.3, "gain_nats": 0.1, "shares_batches": False,
        "windows": 375, "mean_iterations": 4.0, "sliding_seconds": 9.0, "adapter_seconds": 9.0,
    },
    "audit": MODEL_METRICS | {"check_seconds": {"flip": 9.0}},
}  # fmt: skip


def common_metrics(stage: str, seed: int, folder: str, loss: float, seconds: float) -> dict:
    return {
        "stage": stage,
        "seed": seed,
        "folder": folder,
        "val_loss": loss,
        "val_bpb": loss / math.log(2) / 3.0,
        "tokens": 12_000,
        "bytes": 36_000,
        "seconds": seconds,
        "phase_seconds": {"start": 2.0, "work": seconds},
        "training_seconds": seconds * 0.8 if stage in ("train", "ttt") else 0.0,
        "evaluation_seconds": seconds * 0.9 if stage == "slot_eval" else 1.0,
        "device": "cpu (x86_64, 2 threads)",
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
        "held_out_bpb": np.where(step % 100 == 0, loss / 2, np.nan),
    }
    pd.DataFrame(curve).to_parquet(folder / "metrics.parquet")


def write_layers(folder: Path, shift: float) -> None:
    """layers.parquet of two banks, as GPTQ has it; another run of it differs by its shift."""
    banks = {"attention_bank": 8, "mlp_up_bank": 4}
    rows = [(bank, matrix) for bank, number in banks.items() for matrix in range(number)]
    error = np.array([0.1 * 0.8**matrix for _, matrix in rows]) * (1 + abs(shift))
    layers = pd.DataFrame(rows, columns=["bank", "matrix"]).assign(
        error=error, error_round_to_nearest=3 * error, zeros=200, bits_per_code=5.5 + shift
    )
    layers.to_parquet(folder / "layers.parquet")


def evaluation_settings(variant: str) -> dict:
    scope = {"scope": "batch" if variant == "leaky" else "window", "batch_windows": 32}
    adapters = [{name: scope if name == "slot" else {}} for name in adapters_of(variant)]
    return {"adapters": adapters, "window_tokens": 128, "stride_tokens": 32}


def write_tokens(folder: Path, variant: str, seed: int) -> dict:
    """tokens.parquet, and what metrics.json says of it."""
    tokens = make_tokens(variant, seed)
    tokens.to_parquet(folder / "tokens.parquet", row_group_size=5000)
    adapters = adapters_of(variant)
    return {
        "val_loss": tokens["nll_after"].mean(),
        "val_bpb": tokens["nll_after"].sum() / math.log(2) / tokens["bytes"].sum(),
        "adapters": [
            {"name": name, "title": title, "kernels": "plain"} for name, title in adapters.items()
        ],
        **{f"gain_{name}_nats": tokens[f"gain_{name}"].mean() for name in adapters},
    }


def write_audit(folder: Path, seed: int, leaks: bool) -> None:
    checks = []
    for name, sentence in PASSING.items():
        fails = leaks and name in FAILING
        sentence = FAILING[name] if fails else sentence
        verdict = "FAIL" if fails else "PASS"
        checks.append({"name": name, "verdict": verdict, "sentence": sentence, "evidence": {}})
    null = ("NOT RUN", "No model to draw text from was given.") if leaks else ("PASS", "No gain.")
    checks.append({"name": "null", "verdict": null[0], "sentence": null[1], "evidence": {}})
    meaning = "12 replacements in an excerpt of 4,000 targets: a leak at 53.6% or more is seen."
    audit = {
        "verdict": "FAIL" if leaks else "PASS", "variant": folder.parent.name, "seed": seed,
        "track": "adaptive", "checks": checks,
        "not_run": ["null"] if leaks else [], "not_applicable": [],
        "parameters": {}, "detectable_leak_rate_99": 0.536, "meaning_of_pass": meaning,
    }  # fmt: skip
    write_json(folder / "audit.json", audit)
    distance = np.arange(4000)
    changed = np.where((distance < 1024) & leaks, 10 - distance // 103, 0)
    reach = {"distance_tokens": distance, "pairs": 12, "changed": changed}
    pd.DataFrame(reach | {"largest_change_nats": changed * 0.1}).to_parquet(
        folder / "reach.parquet"
    )


def load_results(
    root: Path, seeds=SEEDS, folders: Mapping[str, Mapping[str, str]] = QUICKSTART
) -> Results:
    return read_results(root / "results" / "quickstart", folders, list(seeds))


def finish(root: Path, seeds=SEEDS, folders: Mapping[str, Mapping[str, str]] = QUICKSTART) -> Path:
    """The tables of a run's report, without page and figures; return the run's folder."""
    run = root / "results" / "quickstart"
    written = make_tables(load_results(root, seeds, folders), ReportSettings()).write(
        run / "report"
    )
    _vouch(run / "report", written)
    return run


def _vouch(folder: Path, written: list[Path]) -> None:
    write_provenance(
        folder, stage="report", settings={}, inputs={}, outputs=written, splits_read=[]
    )


def _blank_figures(folder: Path, results: Results, tables: RunTables) -> dict[str, Path]:
    """In place of `write_figures`: a file without a figure for each caption."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.svg" for name in captions(results)}
    for path in paths.values():
        path.touch()
    return paths


def make_report(
    root: Path,
    seeds=SEEDS,
    folders: Mapping[str, Mapping[str, str]] = QUICKSTART,
    settings: Mapping = SETTINGS,
    *,
    figures: bool = True,
    **more: object,
) -> Path:
    """Write the report of a run that `make_run` made; return its folder. more: `write_report`'s.

    figures: or else they are empty, for most of the seconds go into drawing them.
    """
    folder = root / "results" / "quickstart" / "report"
    results, chosen = load_results(root, seeds, folders), ReportSettings(**settings)
    drawn = nullcontext() if figures else patch("fairway.report.page.write_figures", _blank_figures)
    with drawn:
        written = write_report(folder, results, make_tables(results, chosen), chosen, **more)
    _vouch(folder, written)
    return folder
