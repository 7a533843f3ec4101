"""Audit the evaluation of one seed and variant: is its score causal, complete and within budget?

    python workflow/scripts/audit.py --config config.yaml --variant causal --seed 42 \\
        --dataset results/data/embedded/manifest.json \\
        --train results/quickstart/seed-42/train --ema results/quickstart/seed-42/ema \\
        --ttt results/quickstart/seed-42/causal/ttt --gptq results/quickstart/seed-42/causal/gptq \\
        --slot results/quickstart/seed-42/causal/slot \\
        --output results/quickstart/seed-42/causal/audit
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairway.audit.bookkeeping import Evaluation, read_evaluation
from fairway.audit.checks import check_budgets
from fairway.audit.flip_plan import Geometry, choose_excerpt
from fairway.audit.lineage import check_lineage
from fairway.audit.runner import (
    AuditSettings,
    Subject,
    audit_evaluator,
    audit_record,
    verdict_lines,
)
from fairway.code_hash import import_closure
from fairway.command import run, seed_stage_parser, stage_settings
from fairway.data.dataset import Dataset, load_dataset, read_split
from fairway.distributed import World, resolve_device
from fairway.evaluation.evaluator import evaluator_settings
from fairway.evaluation.forward import forward_pass
from fairway.evaluation.slot_evaluator import document_source, make_evaluator
from fairway.evaluation.stream import ModelLogits
from fairway.files import read_json, require_file, write_json, write_table
from fairway.model.gpt import GPT
from fairway.model.runtime import RuntimeSettings, prepare
from fairway.provenance import runtime_metrics, write_provenance
from fairway.quantization.artifact import load_artifact
from fairway.quantization.pruning import code_bytes

EVALUATION_SCRIPT = Path(__file__).with_name("slot_eval.py")
STAGES = ("train", "ema", "ttt", "gptq", "slot")


def main(arguments: list[str] | None = None) -> None:
    parser = seed_stage_parser("audit", __doc__)
    for stage in STAGES:
        parser.add_argument(f"--{stage}", type=Path, required=True, help=f"folder of {stage}")
    options = parser.parse_args(arguments)
    audit(options, stage_settings(options))


def audit(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Run every check and write audit.json, reach.parquet, metrics.json, provenance.json."""
    started = time.perf_counter()
    runtime = RuntimeSettings(**settings["runtime"])
    world = World(rank=0, size=1, device=resolve_device(runtime.device))
    model = prepare(load_artifact(options.gptq / "artifact.bin", world.device), runtime)
    metrics = {stage: read_json(getattr(options, stage) / "metrics.json") for stage in STAGES}
    dataset = load_dataset(options.dataset)
    logits = forward_pass(model, runtime)
    subject = audit_subject(options, settings, model, logits, dataset, metrics["slot"])
    audit_settings = AuditSettings(**settings["audit"])
    findings = audit_evaluator(subject, audit_settings, options.seed)
    checks = [
        *findings.checks,
        check_lineage(options.slot / "provenance.json", files_read(options)),
        check_budgets(used_budgets(options, metrics), settings["budgets"]),
    ]
    record = audit_record(
        checks,
        findings,
        variant=options.variant,
        seed=options.seed,
        parameters={
            **asdict(audit_settings),
            "geometry": asdict(subject.geometry),
            "ranks": metrics["slot"]["processes"],
            "excerpt_targets": len(subject.tokens) - 1,
        },
    )
    print("\n".join(verdict_lines(record)), flush=True)
    write_json(options.output / "audit.json", record)
    write_table(options.output / "reach.parquet", findings.reach)
    write_json(
        options.output / "metrics.json",
        {
            "stage": "audit",
            "seed": options.seed,
            "variant": options.variant,
            "verdict": record["verdict"],
            "training_seconds": 0.0,
            "evaluation_seconds": 0.0,
            "seconds": time.perf_counter() - started,
            **{f"{part}_seconds": spent for part, spent in findings.seconds.items()},
            **runtime_metrics(model, world),
        },
    )
    record_provenance(options, settings)


def audit_subject(
    options: argparse.Namespace,
    settings: dict[str, Any],
    model: GPT,
    logits: ModelLogits,
    dataset: Dataset,
    slot_metrics: dict[str, Any],
) -> Subject:
    """The slot stage's evaluator, an excerpt of the text it scored, and the account it left.

    logits: the model's, as the slot stage computed them.
    """
    evaluator = evaluator_settings(settings)
    cut = evaluator.evaluation
    stream = read_split(dataset, "val").astype(np.int64)
    tokens = torch.from_numpy(stream)
    num_targets = min(settings["audit"]["stream_tokens"], len(tokens) - 1)
    start = choose_excerpt(tokens, num_targets, dataset.bos_id)
    geometry = Geometry(
        window_tokens=cut.window_tokens,
        stride_tokens=cut.stride_tokens,
        lanes=cut.lanes,
        batch_windows=evaluator.slot.batch_windows if evaluator.shares_batches else 1,
    )
    ranks = slot_metrics["processes"]
    plain = replace(evaluator, evaluation=replace(cut, adapters=[]))
    return Subject(
        evaluator=make_evaluator(
            logits,
            evaluator,
            dataset.bos_id,
            ranks,
            kernels=model.kernels,
            model=model,
            seed=options.seed,
        ),
        tokens=tokens[start : start + num_targets + 1].to(model.token_embedding.device),
        vocab_size=dataset.vocab_size,
        bos_id=dataset.bos_id,
        geometry=geometry,
        draw=document_source(model, cut.window_tokens, dataset.bos_id),
        base=make_evaluator(logits, plain, dataset.bos_id),
        evaluation=whole_evaluation(options, stream, slot_metrics),
    )


def whole_evaluation(
    options: argparse.Namespace, stream: np.ndarray, slot_metrics: dict[str, Any]
) -> Evaluation:
    table = require_file(options.slot / "tokens.parquet", "the slot_eval stage")
    split_bytes = read_json(options.dataset)["splits"]["val"]["bytes"]
    return read_evaluation(table, stream, split_bytes=split_bytes, metrics=slot_metrics)


def used_budgets(
    options: argparse.Namespace, metrics: dict[str, dict[str, Any]]
) -> dict[str, float]:
    """What the run used of each budget; file and code are measured anew, not taken on trust."""
    made_by = ("train", "ema", "ttt", "gptq")
    file_bytes = (options.gptq / "artifact.bin").stat().st_size
    return {
        "artifact_bytes": file_bytes + code_bytes(import_closure(EVALUATION_SCRIPT)),
        "training_seconds": sum(metrics[stage]["training_seconds"] for stage in made_by),
        "evaluation_seconds": metrics["slot"]["evaluation_seconds"],
    }


def files_read(options: argparse.Namespace) -> list[Path]:
    return [
        options.dataset,
        options.gptq / "artifact.bin",
        options.slot / "tokens.parquet",
        *(getattr(options, stage) / "metrics.json" for stage in STAGES),
    ]


def record_provenance(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    folders = [getattr(options, stage) for stage in STAGES]
    write_provenance(
        options.output,
        stage="audit",
        settings=settings,
        seed=options.seed,
        inputs=files_read(options),
        outputs=[options.output / name for name in ("audit.json", "reach.parquet", "metrics.json")],
        splits_read=[],
        parents=[folder / "provenance.json" for folder in folders],
    )


if __name__ == "__main__":
    run(main)
