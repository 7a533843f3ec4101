"""What jobs ask a cluster for grows with their work."""

from pathlib import Path

import pytest

from fairway import cluster
from fairway.data.manifest_fields import Manifest, read_manifest
from fairway.data.settings import DataSettings
from fairway.recipe import complete
from fairway.settings import validated
from tiny import ROOT


@pytest.fixture
def fineweb(tiny_dataset) -> Manifest:
    """The tiny dataset, were its validation text FineWeb's."""
    manifest = read_manifest(tiny_dataset)
    val = manifest.splits.val.model_copy(update={"tokens": 62_021_846})
    splits = manifest.splits.model_copy(update={"val": val})
    return manifest.model_copy(update={"splits": splits, "vocab_size": 1024})


def sections(**changes):
    config = {"recipe": "pr1350", "seeds": [1], "variants": "causal", **changes}
    return complete(config, home=ROOT).sections("causal")


def test_time_follows_the_clock_the_text_and_the_gpus(fineweb):
    def minutes(stage, gpus=8, **changes):
        return cluster.minutes(stage, sections(**changes), fineweb, gpus)

    start = cluster.START_MINUTES
    assert minutes("ema", 1) == start
    assert minutes("train") == pytest.approx(start + 550 / 60)
    assert minutes("train", train={"max_seconds": 5500}) == pytest.approx(start + 5500 / 60)
    steps = {"max_seconds": None, "max_steps": 100}
    assert start < minutes("train", train=steps) < start + 550 / 60
    assert minutes("slot_eval", 1) - start == pytest.approx(8 * (minutes("slot_eval") - start))
    assert minutes("slot_eval", evaluation={"stride_tokens": 32}) > minutes("slot_eval") + 10
    val = {"data": "val", "epochs": 6}
    assert minutes("ttt", 1, ttt=val) > minutes("ttt", 1) + 40
    assert minutes("audit", 1, audit={"flips": 128}) > minutes("audit", 1) + 15


def test_memory_follows_the_processes_the_model_and_the_text(fineweb):
    def megabytes(stage, gpus, **changes):
        return cluster.megabytes(stage, sections(**changes), fineweb, gpus)

    one = megabytes("train", 1)
    assert megabytes("train", 8) == pytest.approx(one + 7 * cluster.GPU_PROCESS_MB)
    on_cpu = one - cluster.GPU_PROCESS_MB + cluster.CPU_PROCESS_MB
    assert megabytes("train", 0) == pytest.approx(on_cpu)
    assert megabytes("train", 1, model={"mlp_width": 3072}) > one + 500
    assert megabytes("slot_eval", 1) == pytest.approx(one + 62_022, abs=1)
    assert megabytes("export", 1) == one


def test_tokenize_follows_its_text(tmp_path):
    def asked(**source):
        data = {"data": validated(DataSettings, {"name": "text", **source}, "data")}
        return tuple(
            amount("tokenize", data, None, 0) for amount in (cluster.megabytes, cluster.minutes)
        )

    text, packed = tmp_path / "text.jsonl", tmp_path / "text.jsonl.xz"
    text.write_bytes(bytes(3_000_000))
    packed.write_bytes(bytes(600_000))
    start = cluster.CPU_PROCESS_MB, cluster.START_MINUTES
    plain = asked(source="jsonl", paths=[str(text)])
    assert plain == pytest.approx((start[0] + 90, start[1] + 0.5))
    assert asked(source="jsonl", paths=[str(packed)]) == pytest.approx(plain)
    memory, minutes = asked(source="huggingface", form="shards")
    assert memory == start[0] and minutes == start[1] + cluster.FETCH_MINUTES
    assert asked(source="huggingface")[0] == 64_000
    with pytest.raises(FileNotFoundError):
        asked(source="jsonl", paths=[str(Path(tmp_path, "absent.jsonl"))])
