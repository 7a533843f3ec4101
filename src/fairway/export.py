"""The words of an exported folder: submission.json, README.md and requirements.txt."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from pydantic import Field

from fairway.settings import Settings

Records = Mapping[str, Mapping[str, Any]]
"""Stage → its metrics.json."""


class ExportSettings(Settings):
    """What a submission says of itself (section `export`); null stands as null in the file."""

    name: str = Field("Fairway", min_length=1)
    """The submission's title."""
    author: str | None = None
    """Who hands it in."""
    github_id: str | None = None
    """Their name on GitHub."""
    blurb: str | None = None
    """What it does, in a sentence."""
    date: str | None = None
    """When it was made, such as 2026-04-30."""


def submission(
    settings: ExportSettings, seeds: Mapping[int, Records], seed: int, code_bytes: int
) -> dict[str, Any]:
    """The challenge's fields, of the seed whose artifact lies in the folder, and all seeds' scores.

    code_bytes: length of evaluate.pyz.
    """
    scored, artifact = seeds[seed]["slot_eval"], seeds[seed]["gptq"]["artifact_bytes"]
    return {
        **dict(settings),
        "seed": seed,
        "val_loss": scored["val_loss"],
        "val_bpb": scored["val_bpb"],
        "bytes_total": artifact + code_bytes,
        "bytes_code": code_bytes,
        "audit": seeds[seed]["audit"]["verdict"],
        "seed_results": {
            str(one): {name: found["slot_eval"][name] for name in ("val_loss", "val_bpb")}
            for one, found in seeds.items()
        },
    }


def requirements(names: Iterable[str]) -> str:
    """requirements.txt of packages, in the versions that the export was made with."""
    # A build's own label, as in 2.11.0+cu128, is on no package index.
    return "".join(f"{name}=={metadata.version(name).partition('+')[0]}\n" for name in names)


def readme(
    submitted: Mapping[str, Any],
    seeds: Mapping[int, Records],
    audit: Mapping[str, Any],
    shards: Sequence[str],
) -> str:
    """README.md: the scores, what the audit says of them, and how to compute the score again.

    submitted: submission.json. audit: audit.json. shards: names of the validation text's files.
    """
    verdict, device = audit["verdict"], seeds[submitted["seed"]]["slot_eval"]["device"]
    warning = "" if verdict == "PASS" else " This score has not been shown to be valid."
    scores = [found["slot_eval"]["val_bpb"] for found in seeds.values()]
    mean = f"Mean of {len(scores)} seeds: {statistics.fmean(scores):.5f} bits per byte"
    spread = f", standard deviation {statistics.stdev(scores):.5f}.\n" if len(scores) > 1 else ""
    parts = [
        f"# {submitted['name']}\n",
        *([submitted["blurb"] + "\n"] if submitted["blurb"] else []),
        f"Seed {submitted['seed']}: val_bpb {submitted['val_bpb']:.5f}. Audit: {verdict}.{warning}",
        f"The folder counts {submitted['bytes_total']:,} bytes: `artifact.bin`, and "
        f"{submitted['bytes_code']:,} of `evaluate.pyz`.\n",
        _table(
            ("seed", "val_bpb", "val_loss", "artifact, bytes", "evaluation, seconds", "audit"),
            [_seed_row(seed, found) for seed, found in seeds.items()],
        ),
        *([mean + spread] if spread else []),
        "## Compute the score again\n",
        f"    pip install -r requirements.txt\n    python evaluate.pyz {' '.join(shards)}\n",
        f"The shards are those of the validation text; the score was computed on {device}.",
        "On the same kind of machine the command prints the same `val_bpb` to the last digit.",
        "`torchrun --standalone --nproc_per_node=8 evaluate.pyz …` uses eight GPUs.",
        "`evaluate.pyz` holds a ZIP file of Python modules, compressed with xz; they come without "
        "comments.\n",
        "## Audit\n",
        audit["meaning_of_pass"] + "\n",
        _table(
            ("check", "verdict", ""),
            [(one["name"], one["verdict"], one["sentence"]) for one in audit["checks"]],
        ),
    ]
    return "\n".join(parts)


def _seed_row(seed: int, found: Records) -> tuple[str, ...]:
    scored = found["slot_eval"]
    return (
        str(seed),
        f"{scored['val_bpb']:.5f}",
        f"{scored['val_loss']:.5f}",
        f"{found['gptq']['artifact_bytes']:,}",
        f"{scored['evaluation_seconds']:.0f}",
        found["audit"]["verdict"],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
