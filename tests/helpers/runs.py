"""A whole tiny run, from text to report, in this process."""

from pathlib import Path

from fairway.recipe import load_config
from fairway.stages import STAGES, stages_per
from trainings import run_here


def tokenize(config_file: Path, folder: Path) -> Path:
    """Run tokenize; the manifest."""
    run_here("tokenize_text.py", "--config", config_file, "--output", folder)
    return folder / "manifest.json"


def run_stages(config_file: Path, manifest: Path, run: Path) -> Path:
    """Run every stage after tokenize, once for each folder that variants do not share; `run`."""
    config = load_config([config_file])
    for seed in config.seeds:
        for stage in stages_per("variant"):
            users = {folders[stage.name]: name for name, folders in config.folders.items()}
            for folder, variant in users.items():
                options = ["--config", config_file, "--variant", variant, "--seed", seed]
                for name in stage.needs:
                    beside = run / f"seed-{seed}" / config.folders[variant].get(name, "") / name
                    is_dataset = STAGES[name].per == "dataset"
                    options += [f"--{name}", manifest.parent if is_dataset else beside]
                if stage.name == "train":
                    options += ["--checkpoints", run / "checkpoints"]
                output = run / f"seed-{seed}" / folder / stage.name
                run_here(stage.script, *options, "--output", output)
    run_here("report.py", "--config", config_file, "--run", run, "--output", run / "report")
    return run
