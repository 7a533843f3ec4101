"""Quantize the adapted weights and write the artifact: one file, at most the size limit.

    python workflow/scripts/gptq.py --config config.yaml --variant leaky --seed 42 \\
        --tokenize results/data/embedded --ttt results/quickstart/seed-42/leaky/ttt \\
        --output results/quickstart/seed-42/leaky/gptq
"""

from pathlib import Path

from fairway.data.dataset import load_dataset
from fairway.evaluation.plain import val_metrics
from fairway.files import write_table
from fairway.model.runtime import prepare
from fairway.model.weights import load_model
from fairway.quantization.artifact import load_artifact
from fairway.quantization.quantize import quantize_to_file
from fairway.stage import StageRun, run_stage

EVALUATION_SCRIPT = Path(__file__).with_name("slot_eval.py")
"""The artifact needs this program, and what it imports, to be scored: its bytes count as well."""


def quantize(stage: StageRun) -> None:
    ...


if __name__ == "__main__":
    run_stage("gptq", quantize, __doc__)
