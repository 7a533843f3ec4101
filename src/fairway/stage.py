"""What every stage script shares: its command line and settings, its clock, and its records.

A script is a function of a `StageRun` and one call:

    def work(stage: StageRun) -> None:
        model = load_model(stage.take("ema", "weights.safetensors"), stage.world.device)
        with stage.charge("training"):
            ...
        save_model(stage.product("weights.safetensors"), model)
        stage.finish({"average": "swa"})

    if __name__ == "__main__":
        run_stage("ttt", work, __doc__)
"""

import argparse
import ctypes
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fairway.allot import WANTED, installed_gpus, take_wanted, visible_gpus
from fairway.claims import claimed
from fairway.distributed import (
    World,
    barrier,
    device_name,
    distributed_world,
    is_lost_process,
    peak_memory_bytes,
)
from fairway.errors import UserError, in_short, out_of_disk, out_of_memory
from fairway.files import parse_json, require_file, sha256_of, write_json
from fairway.metrics import checked_metrics
from fairway.phases import CLOCK, phase
from fairway.plain import check_plain, shown
from fairway.plugins import search_beside
from fairway.provenance import PROVENANCE, check_product, read_provenance, write_provenance
from fairway.recipe import SEED_LIMIT, load_config, sections_of
from fairway.stages import STAGES, Stage, made_by


class StageRun:
    """One run of one stage, handed to its script.

    stage: its row of the table. settings: the sections that it may read, as objects
    (`settings.train.max_steps`). plain_settings: the same as JSON values. inputs: stage → folder of
    its products. output: folder for its own. seed: None for a stage that runs once a run.
    taken: SHA-256 of the inputs noted so far.
    """

    def __init__(
        self, stage: Stage, options: argparse.Namespace, settings: dict[str, Any], world: World
    ) -> None:
        self.stage, self.options, self.plain_settings, self.world = stage, options, settings, world
        self.settings = SimpleNamespace(**sections_of(settings))
        self.seed: int | None = getattr(options, "seed", None)
        self.output: Path = options.output
        self.inputs: dict[str, Path] = {
            name: getattr(options, name) for name in stage.needs if hasattr(options, name)
        }
        self._started = time.perf_counter()
        self._seconds = {"training": 0.0, "evaluation": 0.0}
        self.taken: dict[Path, str] = {}
        CLOCK.begin_work()

    @property
    def folder(self) -> str | None:
        """`shared` or a variant's name, from where the output lies; None for one of a run."""
        return self.output.parent.name if self.stage.per == "variant" else None

    @phase("read")
    def take(self, stage: str, name: str, *, check: bool = True) -> Path:
        """A product of an earlier stage, noted as an input.

        check: whether its SHA-256 must be the one in its stage's provenance.json. Only the audit,
        which has a verdict for other files, does without.
        Raises UserError where the file is missing, unfinished or another, or of another seed or
        dataset.
        """
        path = require_file(self.inputs[stage] / name, made_by(stage))
        if path not in self.taken:
            self.taken[path] = self._checked(stage, path) if check else sha256_of(path)
        return path

    def _checked(self, stage: str, path: Path) -> str:
        """SHA-256 of a product that is as it was made: with this stage's seed, of its dataset."""
        again = made_by(stage, again=True)
        record = read_provenance(path.parent / PROVENANCE, again)
        if record.seed not in (None, self.seed):
            raise UserError(
                f"{path.parent} is of seed {record.seed}: expected seed {self.seed} of {again}"
            )
        manifest = self.inputs.get("tokenize", Path()) / "manifest.json"
        for name, listed in record.inputs.items():
            if Path(name).name == manifest.name and listed != self.taken.get(manifest, listed):
                raise UserError(
                    f"{path.parent} was made from another dataset than {manifest.parent}: its "
                    f"{PROVENANCE} lists a {manifest.name} with SHA-256 {listed[:12]}, found "
                    f"{self.taken[manifest][:12]}; give its dataset, or expect another of {again}"
                )
        return check_product(path, again, record)

    @phase("read")
    def note_inputs(self, paths: Iterable[Path]) -> None:
        """Note files from outside the workflow as inputs."""
        self.taken |= {path: sha256_of(path) for path in paths}

    def product(self, name: str) -> Path:
        """Where the first process writes a product, with `atomic_path` or what builds on it."""
        return self.output / name

    @contextmanager
    def charge(self, budget: str) -> Iterator[None]:
        """Count the block's seconds as `training` or `evaluation`."""
        started = time.perf_counter()
        yield
        self.add_seconds(budget, time.perf_counter() - started)

    def add_seconds(self, budget: str, seconds: float) -> None:
        """Count seconds that a clock of its own measured."""
        self._seconds[budget] += seconds

    def finish(
        self,
        metrics: Mapping[str, Any],
        *,
        splits_read: Iterable[str] = (),
        products: Iterable[str] = (),
    ) -> None:
        """Write metrics.json, then provenance.json, for which all products must be there.

        metrics: what the stage adds to what all have; a key of these overrides it.
        splits_read: data splits whose tokens made the product; scoring a finished one counts not.
        products: files besides those of the table, relative to the output.
        """
        values = {
            "stage": self.stage.name,
            "seed": self.seed,
            "folder": self.folder,
            "device": device_name(self.world.device),
            "processes": self.world.size,
            "peak_memory_bytes": peak_memory_bytes(self.world.device),
            **{f"{budget}_seconds": spent for budget, spent in self._seconds.items()},
            **metrics,
        }
        values["seconds"] = time.perf_counter() - self._started
        values["phase_seconds"] = CLOCK.seconds()
        write_json(self.product("metrics.json"), checked_metrics(values))
        names = (*self.stage.products, *products, "metrics.json")
        write_provenance(
            self.output,
            stage=self.stage.name,
            settings=self.plain_settings,
            seed=self.seed,
            inputs=self.taken,
            outputs=[self.output / name for name in names],
            splits_read=splits_read,
            parents=[folder / PROVENANCE for folder in self.inputs.values()],
        )


def run_stage(
    name: str,
    work: Callable[[StageRun], None],
    documentation: str | None,
    arguments: list[str] | None = None,
    add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    import_ahead: Callable[[Any], object] = lambda runtime: None,
) -> None:
    """Parse the command line, join the other processes, and do the stage's work.

    What users can mend becomes one line on stderr and exit status 1. Only the first process should
    write, and the output is its own meanwhile; all wait for it at the end. An older run's
    provenance.json goes before the first product changes.
    import_ahead: gets section `runtime` and imports what `work` needs, before there is a GPU.
    """
    stage = STAGES[name]
    parser = stage_parser(stage, documentation)
    add_options(parser)
    with user_errors(stage):
        options = parser.parse_args(arguments)
        settings = stage_settings(stage, options)
        _check_output(stage, options.output)
        runtime = sections_of(settings).get("runtime")
        import_ahead(runtime)
        if not gc.isenabled():  # by fairway.allot
            gc.freeze()  # modules stay to the end, where taking them apart would take a second
            gc.enable()
        take_gpus()
        with (
            distributed_world(runtime.device if runtime else "cpu") as world,
            claimed(options.output, PROVENANCE) if world.is_main else nullcontext(),
        ):
            work(StageRun(stage, options, settings, world))
            barrier(world)


@phase("wait")
def take_gpus() -> None:
    """Take the job's GPUs; UserError where it is too late, for CUDA has seen more than those."""
    if WANTED in os.environ and cuda_is_running():
        visible = visible_gpus(installed_gpus())
        if len(visible) > int(os.environ[WANTED]):
            raise UserError(
                "CUDA was used while modules were imported, before the job had a GPU of its own "
                f"among {', '.join(visible)}: let plugins use it in their functions only"
            )
    take_wanted()


def cuda_is_running() -> bool:
    """Whether CUDA's driver runs in this process, which knows its GPUs for good by then.

    PyTorch may not know: the driver runs once anything has counted the GPUs.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0


def _check_output(stage: Stage, folder: Path) -> None:
    for path in (folder / name for name in stage.files):
        if path.is_dir():
            raise UserError(f"{path} is a folder, expected to write a file there: remove it")


@contextmanager
def user_errors(stage: Stage | None = None) -> Iterator[None]:
    """Tell in one line what users can mend, and exit with status 1; a bug keeps its traceback.

    That is a UserError, a lack of memory or disk, the loss of another process, and Ctrl-C.
    """
    # A reader that closes the pipe early (`script | head`) is no fault of the script.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        line = _one_line(error, stage)
        if line is None:
            raise
        rank = os.environ.get("RANK")
        where = f" (rank {rank})" if rank not in (None, "0") else ""
        with suppress(OSError):  # the log's disk may be the full one
            sys.stdout.flush()
            print(f"error{where}: {line}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _one_line(error: BaseException, stage: Stage | None) -> str | None:
    """What went wrong and what to change; None for a bug."""
    lower = f"lower {' or '.join(stage.memory)}, or " if stage and stage.memory else ""
    if reason := out_of_memory(error):
        traceback.clear_frames(error.__traceback__)  # frees what they hold
        sys.unraisablehook = lambda fault: None  # libraries may lack memory at the exit as well
        line = (
            f"there is too little memory or no thread to be had ({reason}): {lower}run less beside "
            "this stage or raise its limits"
        )
    elif isinstance(error, UserError):
        line = str(error)
    elif reason := out_of_disk(error):
        line = f"a file could not be written ({reason}): free disk space"
    elif is_lost_process(error):
        line = (
            f"another process of this stage is gone ({in_short(error)}): its own line says why; if "
            f"it has none, the system may have killed it for its memory: {lower}run less beside "
            "this stage"
        )
    elif isinstance(error, KeyboardInterrupt):
        line = "interrupted: the same command starts the stage again"
    else:
        return None
    return "; ".join((line, *getattr(error, "__notes__", ())))


def stage_parser(stage: Stage, documentation: str | None) -> argparse.ArgumentParser:
    """The options of a stage: where its settings come from, its inputs' folders, and its own."""
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--config", nargs="+", type=Path, metavar="FILE", help="YAML files, later ones over earlier"
    )
    source.add_argument(
        "--settings", metavar="JSON", help="the stage's sections, as the workflow passes them"
    )
    parser.add_argument("--variant", help="whose sections count (with --config)")
    if stage.per == "variant":
        parser.add_argument("--seed", type=int, required=True)
    for name in stage.needs if stage.per != "run" else ():
        parser.add_argument(
            f"--{name}", type=Path, required=True, metavar="FOLDER", help=f"products of {name}"
        )
    parser.add_argument("--output", type=Path, required=True, help="folder for the products")
    return parser


def stage_settings(stage: Stage, options: argparse.Namespace) -> dict[str, Any]:
    """The stage's sections as plain values: from `--settings`, or cut from `--config` files."""
    search_beside([Path.cwd()])
    seed = getattr(options, "seed", 0)
    if not 0 <= seed < SEED_LIMIT:
        raise UserError(f"--seed: found {shown(seed)}, expected 0 to {SEED_LIMIT - 1}")
    if options.settings is None:
        return load_config(options.config).stage_settings(stage.name, options.variant)
    try:
        settings = parse_json(options.settings)
    except ValueError as error:
        raise UserError(f"--settings is not JSON: {error}") from error
    check_plain(settings, "--settings")
    expected = {name.partition(".")[0] for name in stage.sections}
    if not isinstance(settings, dict) or set(settings) != expected:
        found = sorted(settings) if isinstance(settings, dict) else settings
        raise UserError(
            f"--settings: found {shown(found)}, expected the sections {sorted(expected)}"
        )
    return settings
