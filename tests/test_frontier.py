"""A small frontier recipe through every stage on a CPU: the parts fit together, and it is legal."""

import json

import pandas as pd
import pytest

from fairway.quantization.artifact import read_artifact
from fairway.settings import merge
from fairway.yaml_text import read_yaml
from runs import run_stages, tokenize
from tiny import ROOT

SMALL = {
    "model": {
        "bigram_buckets": 0,
        "value_layers": [],
        "head_gate_dimensions": 4,
        "smear_dimensions": 4,
        "recurrent_layers": [1],
        "asymmetric_softcap": True,
        "document_masks": True,
        "activation_slope": 0.3,
    },
    "train": {"sequence_schedule": [[0.2, 16]], "late_qat_scale": 0.5, "warmdown_steps": None},
    "data": {"case": "markers"},
    "evaluation": {"global_updates": {"after": [0.5]}},
    "audit": {"flips": 4, "stream_tokens": 128, "null_tokens": 64},
}
"""What tiny sizes need otherwise, and the parts that the recipe leaves off."""


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    recipe = read_yaml(ROOT / "config/frontier.yaml")
    switched = {section: recipe[section] for section in ("model", "train", "gptq")}
    config = merge(merge(switched, tiny_config), SMALL)
    config = {**config, "variants": {"causal": {}}}
    file = folder / "frontier.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    manifest = tokenize(file, folder / "data")
    return run_stages(file, manifest, folder / "run") / "seed-7/shared"


@pytest.mark.slow
def test_the_audit_passes_it_in_the_declared_order(run):
    audit = json.loads((run / "audit/audit.json").read_text())
    assert audit["verdict"] == "PASS", audit["checks"]
    assert json.loads((run / "slot_eval/metrics.json").read_text())["order"] == "text"


@pytest.mark.slow
def test_absent_parts_take_no_bytes_and_steps_follow_sensitivity(run):
    config, tensors = read_artifact(run / "gptq/artifact.bin")
    assert not [name for name in tensors if name.startswith(("bigram", "value"))]
    assert config.recurrence_passes == 3 and "head_gate" in tensors
    layers = pd.read_parquet(run / "gptq/layers.parquet")
    assert (layers["sensitivity"] > 0).all()
    assert "token_embedding" in set(layers["bank"])
