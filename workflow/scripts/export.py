"""Make a folder that evaluates a run's artifact without Fairway, to be handed over.

    python workflow/scripts/export.py --config config.yaml --variant causal --seed 42 \\
        --tokenize results/data/embedded --gptq results/quickstart/seed-42/shared/gptq \\
        --slot_eval results/quickstart/seed-42/shared/slot_eval \\
        --audit results/quickstart/seed-42/shared/audit \\
        --output results/quickstart/seed-42/shared/export
"""

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Not called here: this stage runs again where the program that it packs has changed.
import fairway.evaluation.standalone  # noqa: F401
from fairway.data.manifest_fields import read_manifest
from fairway.export import readme, requirements, submission
from fairway.files import atomic_path, read_json, sha256_of, write_bytes, write_json
from fairway.metrics import read_metrics
from fairway.packing import evaluation_program, packages
from fairway.stage import StageRun, run_stage
from fairway.stages import made_by

MEASURED = ("gptq", "slot_eval", "audit")


def export(stage: StageRun) -> None:
    seeds = {seed: records(stage, seed) for seed in sorted({*stage.options.seeds, stage.seed})}
    artifact = stage.take("gptq", "artifact.bin")
    own = seeds[stage.seed]
    program = evaluation_program(stage.plain_settings, stage.seed, own)
    submitted = submission(stage.settings.export, seeds, stage.seed, len(program))
    audit = read_json(stage.take("audit", "audit.json"), made_by("audit"))
    manifest = read_manifest(stage.take("tokenize", "manifest.json"))
    shards = [Path(span.path).name for span in manifest.split("val").spans]
    texts = {
        "README.md": readme(submitted, seeds, audit, shards),
        "requirements.txt": requirements(packages(own["gptq"]["codecs"].values())),
        "log.txt": joined_logs(stage.options.logs),
    }
    write_bytes(stage.product("evaluate.pyz"), program)
    for name, text in texts.items():
        write_bytes(stage.product(name), text.encode())
    for source in (artifact, stage.take("tokenize", "tokenizer.model")):
        with atomic_path(stage.product(source.name)) as path:
            shutil.copyfile(source, path)
    write_json(stage.product("submission.json"), submitted)
    stage.finish({"code_bytes": len(program), "total_bytes": submitted["bytes_total"]})


def records(stage: StageRun, seed: int) -> dict[str, dict[str, Any]]:
    """Stage → metrics.json of another seed, or of this one, which lie side by side."""
    found = {}
    for name in MEASURED:
        folder = stage.inputs[name]
        if seed == stage.seed:
            path = stage.take(name, "metrics.json")
        else:
            own = Path(*folder.absolute().parts[-2:])
            path = folder.absolute().parents[1].with_name(f"seed-{seed}") / own / "metrics.json"
        found[name] = read_metrics(path, name, made_by(name))
        stage.taken.setdefault(path, sha256_of(path))
    return found


def joined_logs(paths: Iterable[Path]) -> str:
    """The logs, one after the other, of those stages that have left one."""
    return "\n".join(
        f"== {path.stem} ==\n{path.read_text('utf-8')}" for path in paths if path.is_file()
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="of the table of seeds")
    parser.add_argument("--logs", type=Path, nargs="+", default=[], help="to be joined in log.txt")


if __name__ == "__main__":
    run_stage("export", export, __doc__, add_options=add_options)
