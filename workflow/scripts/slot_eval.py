"""Score the validation split with an artifact: sliding windows, and adapters that learn from them.

    python workflow/scripts/slot_eval.py --config config.yaml --variant leaky --seed 42 \\
        --tokenize results/data/embedded --gptq results/quickstart/seed-42/leaky/gptq \\
        --output results/quickstart/seed-42/leaky/slot_eval

Several processes: torchrun --standalone --nproc_per_node=8 workflow/scripts/slot_eval.py ...
Writes tokens.parquet: one row per scored target.
"""

import sys
import time

import torch

from fairway.data.dataset import Dataset, load_dataset, read_split
from fairway.data.token_bytes import byte_counts
from fairway.data.tokenizer import load_tokenizer
from fairway.errors import UserError
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.token_table import (
    gather_scores,
    mean_fit_iterations,
    table_metrics,
    token_table,
)
from fairway.files import write_table
from fairway.model.gpt import GPT
from fairway.model.runtime import captures_graphs, import_ahead, prepare, runtime_metrics
from fairway.progress import progress
from fairway.quantization.artifact import load_artifact
from fairway.stage import StageRun, run_stage


def evaluate(stage: StageRun) -> None:
    settings, runtime, world = stage.settings.evaluation, stage.settings.runtime, stage.world
    with stage.charge("evaluation"):
        started = time.perf_counter()
        dataset = load_dataset(stage.take("tokenize", "manifest.json"), ("val",), world=world)
        model = prepare(load_artifact(stage.take("gptq", "artifact.bin"), world.device), runtime)
        check_vocabulary(stage, model, dataset)
        evaluator = Evaluator(
            model, settings, bos_id=dataset.bos_id, seed=stage.seed, runtime=runtime
        )
        tokens = read_split(dataset, "val")
        share, windows = evaluator.window_counts(len(tokens) - 1, world.rank, world.size)
        warn_if_idle(stage, share)
        text = torch.from_numpy(tokens.astype("int64")).to(world.device)
        with progress(share, "slot_eval", "window", show=world.is_main) as bar:
            own = evaluator.score_rank(text, world.rank, world.size, bar.update)
        scoring_seconds = time.perf_counter() - started
        sliding_seconds = evaluator.forward.seconds()
        parts = gather_scores(world, own)
        if not world.is_main:
            return
        counts = byte_counts(load_tokenizer(dataset.tokenizer_path))
        table = token_table(parts, tokens, counts, dataset.bos_id)
        write_table(stage.product("tokens.parquet"), table)
    stage.finish(
        {
            **table_metrics(table, dataset.original_bytes),
            "adapters": evaluator.adapters,
            "global_updates": evaluator.num_updates(windows),
            "shares_batches": settings.windows_scored_together is not None,
            "windows": windows,
            "mean_iterations": mean_fit_iterations(parts),
            "sliding_seconds": sliding_seconds,
            "adapter_seconds": scoring_seconds - sliding_seconds,
            **runtime_metrics(model),
            "cuda_graphs": captures_graphs(runtime, model),
        }
    )


def check_vocabulary(stage: StageRun, model: GPT, dataset: Dataset) -> None:
    if model.config.vocab_size != dataset.vocab_size:
        raise UserError(
            f"{stage.inputs['gptq']} has a vocabulary of {model.config.vocab_size} tokens, "
            f"{stage.inputs['tokenize']} one of {dataset.vocab_size}: use the dataset it was "
            "trained on"
        )


def warn_if_idle(stage: StageRun, windows: int) -> None:
    if windows == 0:
        cut = stage.settings.evaluation
        print(
            f"rank {stage.world.rank} has nothing to score: {cut.lanes} lanes (evaluation.lanes) "
            f"in groups of {cut.forward_windows} (evaluation.forward_windows) do not reach "
            f"{stage.world.size} processes",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_stage("slot_eval", evaluate, __doc__, import_ahead=import_ahead)
