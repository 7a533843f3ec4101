"""Audit the evaluation of one seed and variant: is its score causal, complete and within budget?

    python workflow/scripts/audit.py --config config.yaml --variant leaky --seed 42 \\
        --tokenize results/data/embedded \\
        --train results/quickstart/seed-42/shared/train \\
        --ema results/quickstart/seed-42/shared/ema \\
        --ttt results/quickstart/seed-42/leaky/ttt --gptq results/quickstart/seed-42/leaky/gptq \\
        --slot_eval results/quickstart/seed-42/leaky/slot_eval \\
        --output results/quickstart/seed-42/leaky/audit
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairway.audit.bookkeeping import read_evaluation
from fairway.audit.checks import check_budgets
from fairway.audit.flip_plan import Geometry, TokenClasses, choose_excerpt
from fairway.audit.interface import Scores
from fairway.audit.lineage import check_lineage
from fairway.audit.runner import AuditTarget, audit_evaluator
from fairway.data.dataset import load_dataset, read_split
from fairway.data.manifest_fields import read_manifest
from fairway.data.token_classes import token_classes
from fairway.data.tokenizer import load_tokenizer
from fairway.evaluation.evaluator import Evaluator
from fairway.files import sha256_of, write_json, write_table
from fairway.metrics import read_metrics
from fairway.model.runtime import import_ahead, prepare, runtime_metrics
from fairway.model.sampling import sample_documents
from fairway.packing import evaluation_program
from fairway.quantization.artifact import load_artifact
from fairway.stage import StageRun, run_stage
from fairway.stages import STAGES, charged_seconds, made_by


def audit(stage: StageRun) -> None:
    # A file that was changed is no error here: the lineage check fails it.
    take = partial(stage.take, check=False)
    manifest, artifact = take("tokenize", "manifest.json"), take("gptq", "artifact.bin")
    table = take("slot_eval", "tokens.parquet")
    stages = [name for name in STAGES["audit"].needs if STAGES[name].per == "variant"]
    paths = {name: take(name, "metrics.json") for name in stages}
    metrics = {name: read_metrics(path, name, made_by(name)) for name, path in paths.items()}
    ranks = metrics["slot_eval"]["processes"]

    runtime = stage.settings.runtime
    model = prepare(load_artifact(artifact, stage.world.device), runtime)
    dataset = load_dataset(manifest, ("val",), check_hashes=False)
    evaluator = Evaluator(
        model, stage.settings.evaluation, bos_id=dataset.bos_id, seed=stage.seed, runtime=runtime
    )
    tokens = read_split(dataset, "val").astype(np.int64)
    split_bytes = read_manifest(manifest).splits.val.bytes
    unadapted = stage.settings.evaluation.changed(adapters=(), global_updates={})
    target = AuditTarget(
        evaluator=as_audited(evaluator, ranks),
        tokens=choose_excerpt(
            torch.from_numpy(tokens), stage.settings.audit.stream_tokens, dataset.bos_id
        ).to(stage.world.device),
        vocab_size=dataset.vocab_size,
        bos_id=dataset.bos_id,
        geometry=geometry(stage),
        sampler=lambda num_targets, seed: sample_documents(
            model, num_targets, stage.settings.evaluation.window_tokens, dataset.bos_id, seed
        ),
        base=as_audited(evaluator.with_settings(unadapted), 1),
        evaluation=read_evaluation(
            table,
            tokens,
            split_bytes=split_bytes,
            original_bytes=dataset.original_bytes,
            metrics=metrics["slot_eval"],
        ),
        classes=known_classes(take("tokenize", "tokenizer.model"), manifest),
        bytes_per_token=split_bytes / (len(tokens) - 1),
    )
    result = audit_evaluator(target, stage.settings.audit, stage.seed).with_checks(
        check_lineage(
            stage.inputs["slot_eval"] / "provenance.json",
            [manifest, artifact, table, *paths.values()],
            stage.settings.audit.overlap_share,
        ),
        check_budgets(used_budgets(stage, artifact, metrics), dict(stage.settings.budgets)),
        ranks=ranks,
    )
    print(result, flush=True)
    write_json(stage.product("audit.json"), result.content(stage.folder))
    write_table(stage.product("reach.parquet"), result.reach)
    stage.finish(
        {"verdict": result.verdict, "check_seconds": result.seconds, **runtime_metrics(model)}
    )


def known_classes(tokenizer: Path, manifest: Path) -> TokenClasses | None:
    """Classes of the vocabulary; None for another tokenizer than the manifest's, which lineage
    fails."""
    if sha256_of(tokenizer) != read_manifest(manifest).tokenizer.sha256:
        return None
    return token_classes(load_tokenizer(tokenizer))


def as_audited(evaluator: Evaluator, ranks: int) -> Callable[[Tensor], Scores]:
    """The evaluator as the audit sees one: tokens int64 [n + 1] → Scores."""

    def evaluate(tokens: Tensor) -> Scores:
        found = evaluator.distributions(tokens, ranks)
        return Scores(found.log_probs, found.positions, found.nats, found.lanes)

    return evaluate


def geometry(stage: StageRun) -> Geometry:
    cut = stage.settings.evaluation
    together = cut.windows_scored_together or 1
    return Geometry(cut.window_tokens, cut.stride_tokens, cut.lanes, together)


def used_budgets(
    stage: StageRun, artifact: Path, metrics: dict[str, dict[str, Any]]
) -> dict[str, float]:
    """What the run used of each budget; file and code are measured anew, not taken on trust."""
    code = len(evaluation_program(stage.plain_settings, stage.seed, metrics))
    return {"artifact_bytes": artifact.stat().st_size + code, **charged_seconds(metrics)}


if __name__ == "__main__":
    run_stage("audit", audit, __doc__, import_ahead=import_ahead)
