"""A whole tiny run, from text to report: the calls of its scripts, and a run in this process."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fairway.recipe import load_config
from fairway.stages import STAGES, Stage, stages_per
from trainings import run_here


@dataclass(frozen=True)
class Call:
    """One stage's script with its options, the folders that it reads and the one that it writes."""

    stage: Stage
    options: tuple[str, ...]
    reads: tuple[Path, ...]
    output: Path

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*self.options, "--output", str(self.output))


def tokenize(config_file: Path, folder: Path) -> Path:
    """Run tokenize; the manifest."""
    run_here("tokenize_text.py", "--config", config_file, "--output", folder)
    return folder / "manifest.json"


def run_stages(config_file: Path, manifest: Path, run: Path) -> Path:
    """Run every stage after tokenize, once for each folder that variants do not share; `run`."""
    for call in calls(config_file, manifest.parent, run):
        run_here(call.stage.script, *call.arguments)
    return run


def calls(config_file: Path, dataset: Path, run: Path) -> Iterator[Call]:
    """Every stage after tokenize, in an order in which they can run."""
    config = load_config([config_file])
    options = ("--config", str(config_file))
    outputs = []
    for seed in config.seeds:
        for stage in stages_per("variant"):
            users = {folders[stage.name]: name for name, folders in config.folders.items()}
            for folder, variant in users.items():
                beside = {
                    name: run / f"seed-{seed}" / inputs / name
                    for name, inputs in config.folders[variant].items()
                }
                needed = {name: beside.get(name, dataset) for name in stage.needs}
                given = [*options, "--variant", variant, "--seed", str(seed)]
                for name, path in needed.items():
                    given += [f"--{name}", str(path)]
                output = run / f"seed-{seed}" / folder / stage.name
                if stage.name == "train":
                    checkpoints = output.parent / ".checkpoints/train"
                    given += ["--checkpoints", str(checkpoints)]
                outputs.append(output)
                yield Call(stage, tuple(given), tuple(needed.values()), output)
    given = (*options, "--run", str(run))
    yield Call(STAGES["report"], given, (dataset, *outputs), run / "report")
