"""The audit stage over a real, tiny chain: the causal variant passes, the leaky one fails."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from fairway.files import sha256_of
from fairway.stages import STAGES
from malformed_products import kept
from provenance_chain import edit
from tiny import run_script
from trainings import run_here

pytestmark = pytest.mark.slow

AUDIT = {"flips": 14, "stream_tokens": 280, "null_tokens": 300, "noise_repeats": 1}


class Chain:
    """Stage folders of one seed under `folder`, made and audited with one configuration."""

    def __init__(self, folder: Path, config: Path, dataset: Path):
        self.folder, self.dataset, self.config = folder, dataset, config

    def products(self, variant: str, stage: str) -> Path:
        """The folder of a stage."""
        if stage == "tokenize":
            return self.dataset.parent
        return self.folder / ("shared" if stage in ("train", "ema") else variant) / stage

    def run(self, variant: str, name: str, *more, processes: int = 1) -> None:
        """Run one stage's script on the products of those that it needs."""
        arguments = ["--config", self.config, "--seed", 7, "--variant", variant, *more]
        for need in STAGES[name].needs:
            arguments += [f"--{need}", self.products(variant, need)]
        arguments += ["--output", self.products(variant, name)]
        script = STAGES[name].script
        if processes == 1:
            run_here(script, *arguments)
        else:
            run_script(script, *arguments, processes=processes)

    def audit(self, variant: str) -> dict:
        self.run(variant, "audit")
        return self.read(variant, "audit.json")

    def audit_again(self) -> dict:
        """The causal variant's audit, with as little of the evaluator's part as may be."""
        short = self.folder / "short.json"
        short.write_text(
            json.dumps({"audit": {"flips": 2, "stream_tokens": 64, "null_tokens": 64}})
        )
        self.run("causal", "audit", "--config", self.config, short)
        return self.read("causal", "audit.json")

    def read(self, variant: str, name: str) -> dict:
        return json.loads((self.products(variant, "audit") / name).read_text())


@pytest.fixture(scope="module")
def chain(tiny_config, tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    config = folder / "config.json"
    leaky = tiny_config["variants"]["leaky"]
    leaky = leaky | {"evaluation": leaky["evaluation"] | {"lanes": 1}}
    variants = {"causal": {}, "leaky": leaky}
    config.write_text(json.dumps({**tiny_config, "variants": variants, "audit": AUDIT}))
    chain = Chain(folder, config, tiny_dataset)
    chain.run("causal", "train", "--checkpoints", folder / "checkpoints")
    chain.run("causal", "ema")
    for variant, processes in (("causal", 2), ("leaky", 1)):
        chain.run(variant, "ttt")
        chain.run(variant, "gptq")
        chain.run(variant, "slot_eval", processes=processes)
    return chain


@pytest.fixture(scope="module")
def causal(chain):
    return chain.audit("causal")


@pytest.fixture(scope="module")
def leaky(chain):
    return chain.audit("leaky")


def verdicts(content: dict) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in content["checks"]}


def evidence(content: dict, name: str) -> dict:
    return next(check["evidence"] for check in content["checks"] if check["name"] == name)


def sentence(content: dict, name: str) -> str:
    return next(check["sentence"] for check in content["checks"] if check["name"] == name)


def test_the_causal_variant_passes_every_check(causal):
    assert len(causal["checks"]) == 10
    assert set(verdicts(causal).values()) == {"PASS"}, causal["checks"]
    assert causal["verdict"] == "PASS" and causal["track"] == "adaptive"
    assert evidence(causal, "flip")["comparison"] == "bitwise"


def test_the_excerpt_is_scored_by_as_many_ranks_as_the_evaluation_was(causal, leaky):
    assert causal["parameters"]["ranks"] == 2
    assert leaky["parameters"]["ranks"] == 1


def test_the_excerpt_and_the_whole_evaluation_are_checked(causal):
    for name in ("coverage", "reported_score"):
        assert set(evidence(causal, name)) == {"excerpt", "whole evaluation"}
    assert evidence(causal, "coverage")["excerpt"]["scores"] == AUDIT["stream_tokens"]


def test_overlap_and_original_bytes_are_told(chain, causal):
    assert "0 of 4 validation documents occur in the training text" in sentence(causal, "lineage")
    found = evidence(causal, "reported_score")["whole evaluation"]
    evaluated = json.loads((chain.products("causal", "slot_eval") / "metrics.json").read_text())
    assert found["original_bytes"] == evaluated["original_bytes"] == found["split_bytes"]
    assert found["reported_val_bpb_original"] == evaluated["val_bpb_original"]
    assert "per original byte the score is" in sentence(causal, "reported_score")


def test_the_leaky_variant_fails_and_its_batches_are_visible(chain, leaky):
    failed = {name for name, verdict in verdicts(leaky).items() if verdict == "FAIL"}
    assert {"flip", "self_influence", "attribution", "lineage"} <= failed
    assert failed.isdisjoint({"normalization", "coverage", "reported_score", "budgets"})
    reach = pd.read_parquet(chain.products("leaky", "audit") / "reach.parquet")
    furthest = reach.loc[reach["changed"] > 0, "distance_tokens"].max()
    # Four windows share a delta; the first one scores 32 targets, the others 8 each. Beyond one
    # slice a leak needs windows that share, beyond all slices there is nothing to share.
    assert 8 < furthest < 32 + 3 * 8


def test_a_pass_says_what_it_means(causal):
    assert causal["detectable_leak_rate_99"] == pytest.approx(1 - 0.01 ** (1 / 7))
    assert "14 replacements in an excerpt of 280 targets, 7 of them" in causal["meaning_of_pass"]


def test_metrics_tell_what_each_part_costs(chain, causal):
    metrics = chain.read("causal", "metrics.json")
    assert set(metrics["check_seconds"]) == {"noise", "flip", "null", "track", "whole_text"}
    assert 0 < sum(metrics["check_seconds"].values()) < metrics["seconds"]
    assert metrics["verdict"] == "PASS"


@pytest.mark.parametrize(
    "damaged",
    [
        "shard",
        "validation shard",
        "tokenizer",
        "artifact",
        "table",
        "ancestor's provenance",
        "own provenance",
    ],
)
def test_a_byte_that_the_score_depends_on_cannot_change_unseen(chain, causal, damaged):
    path = {
        "shard": chain.dataset.parent / "train_000000.bin",
        "validation shard": chain.dataset.parent / "val_000000.bin",
        "tokenizer": chain.dataset.parent / "tokenizer.model",
        "artifact": chain.products("causal", "gptq") / "layers.parquet",
        "table": chain.products("causal", "slot_eval") / "metrics.json",
        "ancestor's provenance": chain.products("causal", "ttt") / "provenance.json",
        "own provenance": chain.products("causal", "slot_eval") / "provenance.json",
    }[damaged]
    original = path.read_bytes()
    try:
        if path.name == "provenance.json":
            entry = json.loads(original)
            entry["seed" if "ancestor" in damaged else "splits"] = []
            path.write_text(json.dumps(entry))
        else:
            changed = original[:-2] + bytes([original[-2] ^ 1, original[-1]])
            path.write_bytes(changed if "shard" in damaged else original + b" ")
        content = chain.audit_again()
    finally:
        path.write_bytes(original)
    assert verdicts(content)["lineage"] == "FAIL"
    assert evidence(content, "lineage")["faults"]


def test_an_ancestor_without_a_record_is_audited_and_may_have_read_anything(chain, causal):
    path = chain.products("causal", "ttt") / "provenance.json"
    with kept(path):
        path.unlink()
        os.mkfifo(path)
        content = chain.audit_again()
    assert verdicts(content)["lineage"] == "FAIL"
    assert "ttt/provenance.json is no file" in evidence(content, "lineage")["faults"][0]
    assert chain.read("causal", "provenance.json")["splits"] == ["train", "val"]


def test_a_shard_edited_with_all_that_vouches_for_it_is_another_dataset(chain, causal, capsys):
    """Which the evaluation refuses, and the audit of the old one fails."""
    shard, record = (chain.dataset.parent / name for name in ("val_000000.bin", "provenance.json"))
    with kept(shard), kept(chain.dataset), kept(record):
        contents = shard.read_bytes()
        shard.write_bytes(contents[:-2] + bytes([contents[-2] ^ 1, contents[-1]]))
        manifest = json.loads(chain.dataset.read_text())
        manifest["shards"][shard.name]["sha256"] = sha256_of(shard)
        chain.dataset.write_text(json.dumps(manifest))
        outputs = json.loads(record.read_text())["outputs"]
        edit(record, outputs={name: sha256_of(record.parent / name) for name in outputs})
        with pytest.raises(SystemExit):
            chain.run("causal", "slot_eval")
        assert "was made from another dataset than" in capsys.readouterr().err
        content = chain.audit_again()
    assert verdicts(content)["lineage"] == "FAIL"
    assert f"{chain.dataset} is not the file listed in" in sentence(content, "lineage")
