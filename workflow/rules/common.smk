"""Helpers of the rules: paths, and what each stage is told. No rule lives here.

A stage's rule is `run_<stage>`; the rule of the stage's own name is its target, for every seed and
variant.
"""

import errno
import gc
import hashlib
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

gc.disable()  # until PyTorch is loaded, too, whose modules it would search many times

HOME = Path(str(workflow.current_basedir)).resolve().parents[1]
if not (HOME / "src/fairway").is_dir():
    raise WorkflowError(
        "Fairway's rules run the library and scripts beside them: clone it, and name the path of "
        "its workflow/Snakefile"
    )
sys.path.insert(0, str(HOME / "src"))

from fairway.allot import installed_gpus, visible_gpus
from fairway.cluster import megabytes, minutes
from fairway.code_hash import code_hash
from fairway.data.manifest_fields import read_manifest
from fairway.errors import UserError
from fairway.plugins import search_beside
from fairway.recipe import (
    canonical,
    complete,
    is_recipe_file,
    plugin_files,
    read_files,
    typed_values,
)
from fairway.settings import merge
from fairway.stages import STAGES, stages_of_a_run, stages_per
from fairway.stages import (
    chain as stage_chain,
)  # Snakemake has a `chain` of its own here


def get_config():
    """What the config's files and `--config` say, each over the ones before, as it was typed.

    Snakemake's own `config` has 202311 for `run=2023_11`, and where a mapping should change an
    entry of a list it replaces the list. To a module it is all that there is.
    """
    if workflow.modifier.skip_configfile:
        return config
    settings = workflow.config_settings
    own = workflow.configfiles[len(settings.configfiles) :]
    own += [name for name in ["config.yaml"] if os.path.exists(name)]
    files = [*([] if settings.replace_workflow_config else own), *settings.configfiles]
    return merge(read_files(files), typed_values(settings.config_args or []))


def get_plugin_folders(*more_files):
    """Where modules of the user's own lie: the working directory, and beside the config's files."""
    files = [*workflow.configfiles, *more_files]
    folders = [Path.cwd(), *(Path(file).resolve().parent for file in files)]
    return list(dict.fromkeys(map(str, folders)))


try:
    VALUES = get_config()
except UserError as error:
    raise WorkflowError(str(error)) from None


# Only now, for Snakemake does not say what is wrong with a file that it cannot read.
configfile: "config.yaml"


try:
    search_beside(get_plugin_folders())
    CONFIG = complete(VALUES, home=HOME)
    FOLDERS = CONFIG.folders
except UserError as error:
    raise WorkflowError(str(error)) from None

gc.freeze()  # modules stay to the end
gc.enable()

PLUGIN_FOLDERS = get_plugin_folders(*filter(is_recipe_file, [VALUES.get("recipe")]))
RESULTS = Path(CONFIG.results)
if any(map(os.path.isfile, (RESULTS, *RESULTS.parents))):
    raise WorkflowError(f"results: {RESULTS} is or lies in a file, expected a folder")
RUN = str(RESULTS / CONFIG.run)
LOGS = f"{RUN}/logs"
BENCHMARKS = f"{RUN}/benchmarks"
DATASET = str(RESULTS / "data/{dataset}")
SEED = f"{RUN}/seed-{{seed}}"

# A variant that uses what lies in a stage's folder, or a dataset: its settings made it.
USERS = {
    (stage, folder): variant
    for variant, folders in reversed(FOLDERS.items())
    for stage, folder in folders.items()
}
DATASETS = {CONFIG.dataset(variant): variant for variant in reversed(CONFIG.variants)}
COMMON = CONFIG.sections(next(iter(CONFIG.variants)))  # where variants agree
GPUS = COMMON["gpus"]
CLUSTER = COMMON["cluster"]
# Of one machine, for jobs side by side.
MACHINE_GPUS = GPUS.machine or len(visible_gpus(installed_gpus()))
THREADS_PER_GPU = 4
# A stage's target → the rule of its jobs, as a workflow that uses this one as a module names them.
JOB_RULES = {
    workflow.modifier.modify_rulename(stage): workflow.modifier.modify_rulename(
        f"run_{stage}"
    )
    for stage in STAGES
}


wildcard_constraints:
    seed=r"\d+",
    folder="|".join(sorted({re.escape(folder) for _, folder in USERS})),
    dataset="|".join(sorted(map(re.escape, DATASETS))),


def get_environment_variables():
    """What the stages' commands find in the environment.

    A path in a command or its params would rerun every stage of a checkout that was moved, and a
    shell prefix would be that of all rules of a workflow that uses this one as a module.
    """
    python_path = [str(HOME / "src"), *PLUGIN_FOLDERS]
    variables = {
        "FAIRWAY_HOME": str(HOME),
        # Or glibc hands every large tensor's memory back to the kernel: a tenth of train's time.
        "MALLOC_MMAP_THRESHOLD_": "1073741824",
        "MALLOC_TRIM_THRESHOLD_": "1073741824",
    }
    if DeploymentMethod.CONDA not in workflow.deployment_settings.deployment_method:
        path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        variables["PATH"] = os.pathsep.join(path)
        python_path += filter(None, [os.environ.get("PYTHONPATH")])
    # As PYTHONPATH, Snakemake would take it away from a job in a conda environment.
    return {**variables, "FAIRWAY_PYTHONPATH": os.pathsep.join(python_path)}


USERS_PATH = os.environ.get("PATH", os.defpath)
os.environ.update(get_environment_variables())


def get_gpus(stage):
    """A resources function: the GPUs of a stage's job, 0 where it computes on the CPU.

    A resource, and not a param, for a score may not depend on it: nothing reruns for another.
    """

    def count(wildcards):
        device = CONFIG.sections(get_user(stage, wildcards))["runtime"].device
        if device == "cpu" or (device == "auto" and not MACHINE_GPUS):
            return 0
        try:
            return GPUS.of(stage, MACHINE_GPUS)
        except UserError as error:
            raise WorkflowError(str(error)) from None

    return count


def get_threads(stage):
    """A threads function: one on a CPU, whose sums then have one order; a few for each GPU."""
    return lambda wildcards: max(1, THREADS_PER_GPU * get_gpus(stage)(wildcards))


def get_priority(stage):
    """How many stages build on this one: of jobs that wait for a GPU, the longest way goes first."""
    return sum(STAGES[stage] in stage_chain(other) for other in STAGES)


def get_memory(stage):
    """A resources function: the megabytes of a stage's job."""
    return get_limit(stage, megabytes, CLUSTER.memory_factor)


def get_runtime(stage):
    """A resources function: the minutes of a stage's job."""
    return get_limit(stage, minutes, CLUSTER.runtime_factor)


def get_resources(stage):
    """The resources of the jobs of a stage that computes."""
    return {
        "gpu": get_gpus(stage),
        "runtime": get_runtime(stage),
        "mem_mb": get_memory(stage),
    }


def get_limit(stage, amount, factor):
    """A resources function: more at each further attempt. Not known before the dataset is."""

    def limit(wildcards, attempt):
        sections = CONFIG.sections(get_user(stage, wildcards))
        manifest = get_manifest(sections["data"].name) if STAGES[stage].needs else None
        gpus = get_gpus(stage)(wildcards) if STAGES[stage].uses_gpu else 0
        return math.ceil(amount(stage, sections, manifest, gpus) * factor * attempt)

    return limit


def get_manifest(dataset):
    """Of a dataset.

    Where it cannot be read, Snakemake asks again once tokenize has made it; else the stage tells
    what is wrong with it.
    """
    path = f"{DATASET.format(dataset=dataset)}.manifest.json"
    try:
        return read_manifest(Path(path))
    except UserError as error:
        raise FileNotFoundError(errno.ENOENT, str(error), path) from None


# A cluster has as many as it has; `--resources gpu=2` says it otherwise. One more than there are,
# so that a job can load its libraries while it waits for its GPU.
if (
    workflow.is_main_process
    and workflow.resource_settings.nodes is None
    and "gpu" not in workflow.global_resources
):
    workflow.register_resource("gpu", MACHINE_GPUS + 1)


def get_user(stage, wildcards):
    """A variant whose settings are those of the stage with these wildcards."""
    if STAGES[stage].per == "dataset":
        return DATASETS[wildcards.dataset]
    if STAGES[stage].per == "run":
        return next(iter(CONFIG.variants))
    if (stage, wildcards.folder) not in USERS:
        folders = sorted({folder for one, folder in USERS if one == stage})
        raise WorkflowError(
            f"{wildcards.folder}/{stage}: no variant has a {stage} of its own there; it lies in "
            f"{', '.join(folders)}"
        )
    return USERS[stage, wildcards.folder]


def get_settings(stage):
    """A params function: the sections that `stage` may read, as canonical JSON."""
    return lambda wildcards: canonical(
        CONFIG.stage_settings(stage, get_user(stage, wildcards))
    )


def get_code(stage):
    """A params function that changes when the meaning of the stage's own source files does."""

    def code(wildcards):
        settings = CONFIG.stage_settings(stage, get_user(stage, wildcards))
        return code_hash(
            HOME / "workflow/scripts" / STAGES[stage].script,
            *plugin_files(stage, settings),
        )

    return code


def get_hash(name):
    """A params value that changes with any byte of a file of the checkout that is no Python code."""
    return hashlib.sha256((HOME / name).read_bytes()).hexdigest()


def get_environment():
    """The conda environment of the stages that compute: with CUDA and flash-attn, or without."""
    devices = {
        CONFIG.sections(variant)["runtime"].device for variant in CONFIG.variants
    }
    return str(HOME / f"envs/{'gpu' if 'cuda' in devices else 'cpu'}.yaml")


def get_folder(stage, seed, variant):
    """The folder of a stage's products for one seed and variant."""
    if STAGES[stage].per == "dataset":
        return DATASET.format(dataset=CONFIG.dataset(variant))
    return f"{SEED.format(seed=seed)}/{FOLDERS[variant][stage]}/{stage}"


def get_needed_folders(stage):
    """A function: needed stage → folder of its products, for a job's wildcards."""
    return lambda wildcards: {
        name: get_folder(name, wildcards.seed, get_user(stage, wildcards))
        for name in STAGES[stage].needs
    }


def get_records(stage):
    """An input function: what stands for changes of the products that a stage takes.

    A provenance.json holds the hashes of the bulky files beside it, so that touching or copying
    gigabytes reruns nothing; the copy of a manifest stands for its dataset's folder.
    """
    return lambda wildcards: [
        (
            f"{folder}.manifest.json"
            if STAGES[name].per == "dataset"
            else f"{folder}/provenance.json"
        )
        for name, folder in get_needed_folders(stage)(wildcards).items()
    ]


def get_measured_seeds(wildcards):
    """What stands for changes of the scores of all seeds, for the table of an exported folder."""
    return [
        f"{get_folder(stage, seed, get_user('export', wildcards))}/provenance.json"
        for seed in sorted(CONFIG.seeds)
        for stage in ("gptq", "slot_eval", "audit")
    ]


def get_products(stage):
    """An input function, for `ancient`: every other file of the stages that a stage takes."""
    return lambda wildcards: [
        path
        for name, folder in get_needed_folders(stage)(wildcards).items()
        for path in get_product_files(name, folder)
    ]


def get_product_files(stage, folder):
    if STAGES[stage].per == "dataset":
        return [folder]
    files = [name for name in STAGES[stage].files if name != "provenance.json"]
    return [f"{folder}/{name}" for name in files]


def get_outputs(stage, but=()):
    """All files of a stage, by names such as `weights_safetensors`."""
    folder = RUN if STAGES[stage].per == "run" else f"{SEED}/{{folder}}"
    return {
        name.replace(".", "_"): f"{folder}/{stage}/{name}"
        for name in STAGES[stage].files
        if name not in but
    }


def get_log(stage):
    return f"{LOGS}/seed-{{seed}}/{{folder}}/{stage}.log"


def get_logs(stage):
    """A params function: the logs of a stage and of all that it builds on, for one seed."""

    def logs(wildcards):
        folders = FOLDERS[get_user(stage, wildcards)]
        names = [one.name for one in stage_chain(stage) if one.per == "variant"]
        return [
            get_log(name).format(seed=wildcards.seed, folder=folders[name])
            for name in names
        ]

    return logs


def get_benchmark(stage):
    return f"{BENCHMARKS}/seed-{{seed}}/{{folder}}/{stage}.tsv"


def get_options(stage):
    """A params function: the script's options that name folders and the seed."""

    def options(wildcards):
        folders = get_needed_folders(stage)(wildcards)
        output = f"{SEED}/{{folder}}/{stage}".format(**dict(wildcards))
        pairs = {"seed": wildcards.seed, **folders, "output": output}
        return " ".join(
            f"--{name} {shlex.quote(str(value))}" for name, value in pairs.items()
        )

    return options


def get_params(stage):
    """The params of the jobs of a stage that `get_command` is for."""
    return {
        "settings": get_settings(stage),
        "code": get_code(stage),
        "options": get_options(stage),
    }


def get_call(stage):
    """The first words of a stage's command.

    A cluster sends SIGTERM to the shell as well, whose end would be the job's before train has
    written its checkpoint: the trap lets the shell wait.
    """
    script = f'"$FAIRWAY_HOME/workflow/scripts/{STAGES[stage].script}"'
    gpus = "{resources.gpu}" if STAGES[stage].uses_gpu else "0"
    command = (
        f'PYTHONPATH="$FAIRWAY_PYTHONPATH" python -m fairway.allot {gpus} {script}'
    )
    return f"trap : TERM; {command} --settings {{params.settings:q}}"


def get_command(stage, more_options=""):
    """The shell command of a stage that runs once a seed and folder."""
    call = get_call(stage)
    return f"{call} {{params.options}}{more_options}{get_end(stage)}"


def get_end(stage):
    """The last words of a stage's command: its log, with a line where the system kills it."""
    keys = " or ".join(STAGES[stage].memory)
    line = f"error: {stage} was killed, most likely by the system for its memory: "
    line += f"{f'lower {keys}, or ' if keys else ''}run less beside it"
    tell = f'[ $status -ne 137 ] || echo "{line}" >> {{log:q}}'
    return f" > {{log:q}} 2>&1 || {{{{ status=$?; {tell}; exit $status; }}}}"


def get_target(stage):
    """An input function of the stage's target: all of the stage's files."""

    def files(wildcards):
        extend_to_jobs()
        return get_targets(stage)

    return files


def extend_to_jobs():
    """`--forcerun train` and `--omit-from train` mean the stage's jobs.

    To Snakemake they mean the target, which has no file to make again, and no dependents.
    """
    settings = workflow.dag_settings
    for name, job in JOB_RULES.items():
        if name in settings.forcerun:
            workflow.dag.forcerules.add(workflow.get_rule(job))
        if name in settings.omit_from:
            workflow.dag.omitrules.add(job)


def get_targets(stage):
    """All files of a stage for every seed and variant, or for every dataset."""
    if STAGES[stage].per == "run":
        return list(get_outputs(stage).values())
    if STAGES[stage].per == "dataset":
        names = [DATASET.format(dataset=name) for name in sorted(DATASETS)]
        return [path for name in names for path in (name, f"{name}.manifest.json")]
    folders = sorted({folder for one, folder in USERS if one == stage})
    return [
        f"{SEED.format(seed=seed)}/{folder}/{stage}/{name}"
        for seed in sorted(CONFIG.seeds)
        for folder in folders
        for name in STAGES[stage].files
    ]


def get_all_files(wildcards):
    """Every stage's files: the report's, and those of stages that nothing builds on.

    Not of those that run on request only.
    """
    extend_to_jobs()
    return [path for stage in stages_of_a_run() for path in get_targets(stage.name)]


def get_stage_files(names):
    """The named files of all variants' stages, for the report."""
    targets = [
        path for stage in stages_per("variant") for path in get_targets(stage.name)
    ]
    return [path for path in targets if Path(path).name in names]


def get_report_files():
    """What the report reads, besides the records."""
    names = [
        "metrics.json",
        "metrics.parquet",
        "artifact.bin",
        "layers.parquet",
        "tokens.parquet",
        "audit.json",
        "reach.parquet",
    ]
    return [*get_stage_files(names), *get_targets("tokenize")]


def is_fetched():
    """Whether any dataset comes over the network, where trying again may help."""
    corpora = [
        CONFIG.sections(variant)["data"].corpus() for variant in DATASETS.values()
    ]
    return any(corpus.downloads for corpus in corpora)


def get_source_files(wildcards):
    """Local files that a dataset is made from."""
    data = CONFIG.sections(DATASETS[wildcards.dataset])["data"]
    return list(map(str, data.files()))
