"""Train one seed's model; leave the last weights, the weight averages and the loss curve.

    python workflow/scripts/train.py --config config.yaml --seed 42 \\
        --tokenize results/data/embedded \\
        --output results/quickstart/seed-42/shared/train --checkpoints results/checkpoints

Eight GPUs: torchrun --standalone --nproc_per_node=8 workflow/scripts/train.py ...
Stopped by SIGTERM or Ctrl-C it writes a checkpoint first; the same command resumes.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd

from fairway.claims import claimed
from fairway.code_hash import code_hash
from fairway.data.dataset import Dataset, load_dataset
from fairway.data.loader import CoprimeLoader
from fairway.distributed import gather_objects
from fairway.evaluation.bits_per_byte import bits_per_byte
from fairway.evaluation.plain import evaluate_split, val_metrics
from fairway.files import sha256_of_json, write_table, write_tensors
from fairway.metrics import read_metrics
from fairway.model.gpt import GPT
from fairway.model.runtime import captures_graphs, compiles, import_ahead, prepare
from fairway.model.spec import GPTConfig
from fairway.model.weights import save_model
from fairway.quantization.settings import quantizer_of
from fairway.recipe import plugin_files
from fairway.stage import StageRun, run_stage
from fairway.stages import made_by
from fairway.training.checkpoint import Checkpoints
from fairway.training.curve import COLUMNS, LIVE, TABLE, CurveFile
from fairway.training.trainer import Trainer, check_batch


def train(stage: StageRun) -> None:
    manifest = stage.take("tokenize", "manifest.json")
    # The first process claims the folder for all of them.
    with claimed(stage.options.checkpoints) if stage.world.is_main else nullcontext():
        identity = run_identity(stage, manifest)
        checkpoints = Checkpoints(stage.options.checkpoints, identity)
        # An orphan of a killed workflow may have finished this very run in the meantime.
        if any(gather_objects(stage.world, is_finished(stage, identity))):
            print(
                f"{stage.output} holds this very run already: remove it to train again",
                file=sys.stderr,
            )
            if stage.world.is_main:
                checkpoints.remove()  # it may have been killed before it did
            return
        dataset = load_dataset(manifest, world=stage.world)
        with checkpoints.named_in_errors():
            trainer = make_trainer(stage, dataset, checkpoints)
            trainer.run()
            if stage.world.is_main:
                write_weights(stage, trainer)
            score = val_metrics(stage, trainer.model, dataset)
            if stage.world.is_main:
                finish(stage, trainer, {**score, "identity": identity})
                checkpoints.remove()


def run_identity(stage: StageRun, manifest: Path) -> str:
    """What makes this run this run: another identity resumes none of its checkpoints."""
    return sha256_of_json(
        {
            "settings": stage.plain_settings,
            "seed": stage.seed,
            "dataset": stage.taken[manifest],
            "code": code_hash(__file__, *plugin_files("train", stage.plain_settings)),
        }
    )


def is_finished(stage: StageRun, identity: str) -> bool:
    """Whether the products of this very run are there, the provenance, which comes last, too."""
    if not all((stage.output / name).is_file() for name in stage.stage.files):
        return False
    metrics = read_metrics(stage.output / "metrics.json", "train", made_by("train"))
    return metrics["identity"] == identity


def make_trainer(stage: StageRun, dataset: Dataset, checkpoints: Checkpoints) -> Trainer:
    settings, runtime, world = stage.settings.train, stage.settings.runtime, stage.world
    check_batch(settings, world.size)
    config = GPTConfig(
        **dict(stage.settings.model),
        vocab_size=dataset.vocab_size,
        sequence_tokens=settings.sequence_tokens,
        bos_id=dataset.bos_id,
    )
    model = prepare(GPT(config, seed=stage.seed).to(world.device), runtime)
    loader = CoprimeLoader(
        dataset.splits["train"],
        settings.sequence_tokens,
        settings.batch_sequences,
        seed=stage.seed,
        rank=world.rank,
        world_size=world.size,
    )
    curve_file = CurveFile(checkpoints.folder / LIVE, stage.plain_settings)
    trainer = Trainer(
        model,
        settings,
        loader,
        world,
        checkpoints,
        fake_quantize=quantizer_of(stage.settings.gptq).fake,
        held_out_bpb=lambda: held_out_bpb(model, dataset, settings.held_out_tokens),
        curve_file=curve_file if world.is_main else None,
        compile_model=compiles(runtime, model),
        cuda_graphs=captures_graphs(runtime, model),
    )
    if world.is_main:
        print(trainer.describe(), file=sys.stderr, flush=True)
    return trainer


def held_out_bpb(model: GPT, dataset: Dataset, tokens: int) -> float:
    score = evaluate_split(model, dataset, "selection", most_tokens=tokens)
    return bits_per_byte(score.nats, score.bytes)


def write_weights(stage: StageRun, trainer: Trainer) -> None:
    save_model(stage.product("weights.safetensors"), trainer.model)
    write_tensors(
        stage.product("averages.safetensors"), trainer.averages.state_tensors(), metadata={}
    )
    curve = pd.DataFrame(trainer.progress.history, columns=list(COLUMNS))
    write_table(stage.product(TABLE), curve.astype({"held_out_bpb": float}))


def finish(stage: StageRun, trainer: Trainer, metrics: dict[str, Any]) -> None:
    state, model = trainer.progress, trainer.model
    stage.add_seconds("training", state.seconds)
    tokens = state.step * trainer.settings.batch_tokens
    stage.finish(
        {
            **metrics,
            "steps": state.step,
            "train_tokens": tokens,
            "train_loss": state.history[-1]["loss"],
            "tokens_per_second": tokens / state.seconds,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "cuda_graphs": trainer.cuda_graphs,
        },
        splits_read=["train"],
    )


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder of mid-run state")


if __name__ == "__main__":
    run_stage("train", train, __doc__, add_options=add_checkpoints, import_ahead=import_ahead)
