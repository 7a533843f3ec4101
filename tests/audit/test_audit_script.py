"""The audit stage over a real, tiny chain: the causal variant passes, the record's code fails."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest

from tiny import SCRIPTS, run_script

AUDIT = {"flips": 14, "stream_tokens": 280, "null_tokens": 300, "noise_repeats": 1}
STAGES = ("train", "ema", "ttt", "gptq", "slot")


def call_script(name: str, *arguments) -> None:
    """A stage script's `main` in this process, which saves the start of another."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), SCRIPTS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


class Chain:
    """Stage folders of one seed under `folder`, made and audited with one configuration."""

    def __init__(self, folder: Path, config: Path, dataset: Path):
        self.folder, self.dataset = folder, dataset
        self.common = ("--config", config, "--seed", 7)

    def place(self, variant: str, stage: str) -> Path:
        return self.folder / stage if stage in STAGES[:2] else self.folder / variant / stage

    def stage(self, script: str, variant: str | None, stage: str, *arguments, processes=1) -> None:
        options = [*self.common, "--dataset", self.dataset, *arguments]
        options += ["--variant", variant] if variant else []
        options += ["--output", self.place(variant, stage)]
        if processes == 1:
            call_script(script, *options)
        else:
            run_script(script, *options, processes=processes)

    def shared(self) -> None:
        self.stage("train.py", None, "train", "--checkpoints", self.folder / "checkpoints")
        self.stage("ema.py", None, "ema", "--train", self.folder / "train")

    def variant(self, variant: str, slot_processes: int) -> None:
        self.stage("ttt.py", variant, "ttt", "--ema", self.folder / "ema")
        self.stage("gptq.py", variant, "gptq", "--weights", self.place(variant, "ttt"))
        artifact = ("--artifact", self.place(variant, "gptq"))
        self.stage("slot_eval.py", variant, "slot", *artifact, processes=slot_processes)

    def audit(self, variant: str) -> dict:
        folders = [word for one in STAGES for word in (f"--{one}", self.place(variant, one))]
        self.stage("audit.py", variant, "audit", *folders)
        return self.read(variant, "audit.json")

    def read(self, variant: str, name: str) -> dict:
        return json.loads((self.place(variant, "audit") / name).read_text())


@pytest.fixture(scope="module")
def chain(tiny_config, tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    config = folder / "config.json"
    published = tiny_config["variants"]["published"]
    published = published | {"evaluation": published["evaluation"] | {"lanes": 1}}
    variants = {"causal": {}, "published": published}
    config.write_text(json.dumps({**tiny_config, "variants": variants, "audit": AUDIT}))
    chain = Chain(folder, config, tiny_dataset)
    chain.shared()
    chain.variant("causal", slot_processes=2)
    chain.variant("published", slot_processes=1)
    return chain


@pytest.fixture(scope="module")
def causal(chain):
    return chain.audit("causal")


@pytest.fixture(scope="module")
def published(chain):
    return chain.audit("published")


def verdicts(record: dict) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in record["checks"]}


def evidence(record: dict, name: str) -> dict:
    return next(check["evidence"] for check in record["checks"] if check["name"] == name)


def test_the_causal_variant_passes_every_check(causal):
    assert set(verdicts(causal).values()) == {"PASS"}, causal["checks"]
    assert causal["verdict"] == "PASS" and causal["track"] == "adaptive"
    assert evidence(causal, "flip")["comparison"] == "bitwise"


def test_the_excerpt_is_scored_by_as_many_ranks_as_the_evaluation_was(causal, published):
    assert causal["parameters"]["ranks"] == 2
    assert published["parameters"]["ranks"] == 1


def test_the_account_covers_the_excerpt_and_the_whole_evaluation(causal):
    for name in ("coverage", "claimed_score"):
        assert set(evidence(causal, name)) == {"excerpt", "whole evaluation"}
    assert evidence(causal, "coverage")["excerpt"]["scores"] == AUDIT["stream_tokens"]


def test_the_record_s_code_fails_and_its_batches_are_visible(chain, published):
    failed = {name for name, verdict in verdicts(published).items() if verdict == "FAIL"}
    assert {"flip", "self_influence", "attribution", "lineage"} <= failed
    assert failed.isdisjoint({"normalisation", "coverage", "claimed_score", "budgets"})
    reach = pd.read_parquet(chain.place("published", "audit") / "reach.parquet")
    furthest = reach.loc[reach["changed"] > 0, "distance_tokens"].max()
    # Four windows share a delta; the first one scores 32 targets, the others 8 each. Beyond one
    # slice a leak needs windows that share, beyond all slices there is nothing to share.
    assert 8 < furthest < 32 + 3 * 8


def test_a_pass_says_what_it_means(causal):
    assert causal["detectable_leak_rate_99"] == pytest.approx(1 - 0.01 ** (1 / 7))
    assert "14 replacements in an excerpt of 280 targets, 7 of them" in causal["meaning_of_pass"]


def test_metrics_tell_what_each_part_costs(chain, causal):
    metrics = chain.read("causal", "metrics.json")
    parts = sum(metrics[f"{part}_seconds"] for part in ("noise", "flip", "null", "track"))
    assert 0 < parts < metrics["seconds"]
    assert metrics["verdict"] == "PASS"


@pytest.mark.parametrize(
    "damaged", ["shard", "tokenizer", "artifact", "table", "ancestor's record", "own record"]
)
def test_a_byte_that_the_score_depends_on_cannot_change_unseen(chain, causal, damaged):
    place = {
        "shard": chain.dataset.parent / "train_000000.bin",
        "tokenizer": chain.dataset.parent / "tokenizer.model",
        "artifact": chain.place("causal", "gptq") / "layers.parquet",
        "table": chain.place("causal", "slot") / "metrics.json",
        "ancestor's record": chain.place("causal", "ttt") / "provenance.json",
        "own record": chain.place("causal", "slot") / "provenance.json",
    }[damaged]
    original = place.read_bytes()
    try:
        if place.name == "provenance.json":
            record = json.loads(original)
            record["seed" if "ancestor" in damaged else "splits"] = []
            place.write_text(json.dumps(record))
        else:
            changed = original[:-2] + bytes([original[-2] ^ 1, original[-1]])
            place.write_bytes(changed if damaged == "shard" else original + b" ")
        record = chain.audit("causal")
    finally:
        place.write_bytes(original)
    assert verdicts(record)["lineage"] == "FAIL"
    assert evidence(record, "lineage")["faults"]
