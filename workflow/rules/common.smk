"""Helpers of the rules: paths, and what each stage is told. No rule lives here."""

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

HOME = Path(workflow.basedir)
sys.path.insert(0, str(HOME / "src"))

from fairway.config import VARIANT_STAGES, merge, stage_settings, validated
from fairway.errors import UserError
from fairway.code_hash import fingerprint


def get_typed(value):
    """`--config seeds=[42]` as in a file: Snakemake takes the entries of lists and maps for text."""
    if isinstance(value, Mapping):
        return {key: get_typed(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [get_typed(entry) for entry in value]
    return yaml.safe_load(value) if isinstance(value, str) else value


try:
    config = validated(merge(config, get_typed(workflow.config_settings.config)))
except UserError as error:
    raise WorkflowError(str(error)) from None

RUN = f"{config['results']}/{config['run']}"
DATA = f"{config['results']}/data/{config['data']['name']}"
SHARED = f"{RUN}/seed-{{seed}}"
VARIANT = f"{SHARED}/{{variant}}"
LOGS = f"{RUN}/logs"


wildcard_constraints:
    seed=r"\d+",
    variant="|".join(config["variants"]),


def get_shell_prefix():
    """Where the sources are, in the environment: a path in `params` would rerun a moved checkout."""
    exports = [
        f"FAIRWAY_HOME={shlex.quote(str(HOME))}",
        f"PYTHONPATH={shlex.quote(str(HOME / 'src'))}",
        # Or glibc hands every large tensor's memory back to the kernel: a tenth of train's time.
        "MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824",
    ]
    if DeploymentMethod.CONDA not in workflow.deployment_settings.deployment_method:
        exports.append(f'PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"')
    return f"export {' '.join(exports)}; "


shell.prefix(get_shell_prefix())


def get_settings(stage):
    """A params function: the sections that `stage` may read, as canonical JSON."""

    def settings(wildcards):
        variant = wildcards.get("variant")
        return json.dumps(stage_settings(config, stage, variant), sort_keys=True)

    return settings


def get_code(script):
    """A params value that changes when the meaning of the script's own source files does."""
    return fingerprint(HOME / "workflow/scripts" / script)


def get_hash(name):
    """A params value that changes with any byte of a file of the checkout that is no Python code."""
    return hashlib.sha256((HOME / name).read_bytes()).hexdigest()


def get_environment():
    """The conda environment of the stages that compute: with CUDA and flash-attn, or without."""
    name = "gpu" if config["runtime"]["device"] == "cuda" else "cpu"
    return str(HOME / f"envs/{name}.yaml")


def get_source_files():
    """Local files that the dataset is made from; shards used in place are not read again."""
    data = config["data"]
    paths = data["paths"] if data["source"] == "jsonl" else []
    return [*paths, *([data["tokenizer"]] if data["tokenizer"] else [])]


def get_stage_files(stage, names=("provenance.json",)):
    """Files of one stage for every seed and, where it has them, every variant."""
    variants = list(config["variants"]) if stage in VARIANT_STAGES else [""]
    return [
        f"{RUN}/seed-{seed}/{variant}/{stage}/{name}".replace("//", "/")
        for seed in config["seeds"]
        for variant in variants
        for name in names
    ]


STAGE_RULES = {
    "tokenize": "tokenize_text",
    "train": "train_model",
    "ema": "average_ema",
    "ttt": "adapt_ttt",
    "gptq": "quantise_gptq",
    "slot_eval": "evaluate_slot",
    "audit": "audit_score",
    "report": "write_report",
}


def check_forced_rules(arguments):
    """A stage's name is a target without output: forcing it would do nothing and say nothing."""
    forcing = False
    for argument in arguments:
        option, _, value = argument.partition("=")
        if argument.startswith("-"):
            forcing = option in ("-R", "--forcerun")
        name = value if argument.startswith("-") else argument
        if forcing and name in STAGE_RULES:
            raise WorkflowError(
                f"--forcerun {name}: force its rule, {STAGE_RULES[name]}, instead"
            )


check_forced_rules(sys.argv[1:])
