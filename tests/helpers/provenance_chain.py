"""A chain of stage folders with their provenance files, and a way to edit them by hand."""

import json
from pathlib import Path

from fairway.files import sha256_of, sha256_of_json
from fairway.provenance import write_provenance

STAGES = ("tokenize", "train", "ttt", "gptq", "slot_eval")
NO_OVERLAP = {"documents": 50, "exact": 0, "near": 0, "examples": []}


def make_chain(folder: Path, ttt_data: str = "train", overlap: dict | None = NO_OVERLAP) -> Path:
    """Each stage reads the product of the one before it and the manifest; the last provenance.

    overlap: as the manifest has it.
    """
    manifest = folder / "tokenize" / "manifest.json"
    for stage, before in zip(STAGES, (None, *STAGES), strict=False):
        output = folder / stage
        output.mkdir()
        product = output / "product"
        product.write_text(f"made by {stage}")
        if stage == "tokenize":
            tokenizer = {"path": product.name, "sha256": sha256_of(product)}
            content = {"shards": {}, "tokenizer": tokenizer, "overlap": overlap}
            manifest.write_text(json.dumps(content))
        inputs = [] if before is None else [folder / before / "product", manifest]
        read = {"train": ["train"], "ttt": [ttt_data]}.get(stage, [])
        write_provenance(
            output,
            stage=stage,
            settings={stage: {"data": ttt_data}} if stage == "ttt" else {},
            inputs={path: sha256_of(path) for path in inputs},
            outputs=[product, *([manifest] if stage == "tokenize" else [])],
            splits_read=read,
            seed=1,
            parents=[] if before is None else [folder / before / "provenance.json"],
        )
    return folder / "slot_eval" / "provenance.json"


def edit(path: Path, **changes: object) -> None:
    """Change keys of a provenance file, and its checksum with them."""
    values = json.loads(path.read_text()) | changes
    values.pop("sha256", None)
    path.write_text(json.dumps({**values, "sha256": sha256_of_json(values)}))
