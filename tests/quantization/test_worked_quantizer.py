"""The worked example of a quantizer, docs/examples/group_int4.py, as a user has it: a file of their
own that the config names. It is stored, read back, held against the limit, evaluated, and late
quantization-aware training rounds as it does."""

import sys
from pathlib import Path

import pytest
import torch

from fairway.data.dataset import Dataset
from fairway.errors import UserError
from fairway.model.spec import BANKS
from fairway.plugins import search_beside
from fairway.quantization.artifact import (
    encode_artifact,
    load_artifact,
    restored,
    stream_table,
)
from fairway.quantization.pruning import fit_to_limit
from fairway.quantization.quantize import (
    prepared_model,
    quantize_to_file,
    with_code_columns,
)
from fairway.quantization.settings import QuantizationSettings, quantizer_of
from fairway.settings import validated
from producers import write_artifact
from scattered import SMALL, scattered_model

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
NAME = "group_int4:GroupInt4"
TEXT = Dataset(48, 1, None, {})
"""No training text: this quantizer must not ask for any, nor for text of the model itself."""


@pytest.fixture(scope="module", autouse=True)
def _beside_the_config():
    before = list(sys.path)
    search_beside([EXAMPLES])
    yield
    sys.path[:] = before
    sys.modules.pop("group_int4", None)


@pytest.fixture(scope="module")
def settings(_beside_the_config):
    return QuantizationSettings(quantizer={NAME: {"group_columns": 20}}, calibration="train")


@pytest.fixture(scope="module")
def model():
    return scattered_model()


@pytest.fixture(scope="module")
def stored(model, settings):
    return prepared_model(model, quantizer_of(settings), settings, TEXT, seed=0)(1.0)


@pytest.fixture
def batch():
    tokens = torch.randint(48, (4, 25), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def test_it_is_configured_and_checked_like_the_librarys_own(settings):
    assert settings.as_read() == {"quantizer": {NAME: {"group_columns": 20}}}
    with pytest.raises(UserError, match=r"GroupInt4\.group_columns: found 0, expected at least 1"):
        validated(QuantizationSettings, {"quantizer": {NAME: {"group_columns": 0}}}, "gptq")


def test_the_artifact_is_read_back_bit_for_bit(stored, tmp_path):
    tensors, layers = stored
    size = write_artifact(tmp_path / "artifact.bin", SMALL, tensors)
    assert size == (tmp_path / "artifact.bin").stat().st_size
    loaded = load_artifact(tmp_path / "artifact.bin").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in restored(tensors).items())
    table = stream_table((tmp_path / "artifact.bin").read_bytes())
    assert list(table) == ["int4", "int8", "scales", "float16", "float32"]
    counts = {name: len(tensors[name].codes) for name in BANKS}
    assert layers.groupby("bank", sort=False).size().to_dict() == counts
    assert (layers.error > 0).all() and (with_code_columns(layers, tensors).zeros > 0).all()


def test_the_stage_says_what_it_wrote(model, stored, settings, tmp_path):
    path, limit = tmp_path / "artifact.bin", 10**6
    layers, metrics = quantize_to_file(path, model, settings, TEXT, seed=0, limit_bytes=limit)
    assert path.read_bytes() == encode_artifact(SMALL, stored[0])
    assert layers.drop(columns=["zeros", "bits_per_code"]).equals(stored[1])
    assert metrics["quantizer"] == NAME and metrics["calibration"] is None
    assert metrics["artifact_bytes"] == path.stat().st_size and metrics["zeros"] == 0
    assert metrics["mean_error"] == layers.error.mean()
    assert "mean_error_round_to_nearest" not in metrics
    limit = metrics["artifact_bytes"] - 200
    layers, metrics = quantize_to_file(path, model, settings, TEXT, seed=0, limit_bytes=limit)
    assert metrics["artifact_bytes"] == path.stat().st_size <= limit and metrics["zeros"] > 0


def test_the_artifact_fits_a_budget(stored, settings, tmp_path):
    tensors, _ = stored
    size, quantizer = len(encode_artifact(SMALL, tensors)), quantizer_of(settings)
    _, fitted, zeroed = fit_to_limit(SMALL, tensors, size - 200, quantizer)
    assert zeroed > 0
    assert write_artifact(tmp_path / "artifact.bin", SMALL, fitted) <= size - 200
    loaded = load_artifact(tmp_path / "artifact.bin").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in restored(fitted).items())
    with pytest.raises(UserError, match=r"budgets\.artifact_bytes") as raised:
        fit_to_limit(SMALL, tensors, 1000, quantizer)
    assert "gptq." not in str(raised.value)


def test_the_reloaded_model_is_evaluated(model, stored, batch, tmp_path):
    tensors, _ = stored
    write_artifact(tmp_path / "artifact.bin", SMALL, tensors)
    in_memory = scattered_model()
    in_memory.load_state_dict(restored(tensors))
    with torch.no_grad():
        loss = load_artifact(tmp_path / "artifact.bin").loss(*batch)
        assert loss == in_memory.loss(*batch)
        assert loss != model.loss(*batch)


def test_late_quantization_aware_training_sees_what_is_stored(stored, settings, batch):
    tensors, _ = stored
    trained, rounded = scattered_model(), scattered_model()
    trained.fake_quantize = quantizer_of(settings).fake
    with torch.no_grad():
        for name in BANKS:
            getattr(rounded, name).copy_(tensors[name].dequantize())
    loss = trained.loss(*batch)
    assert torch.equal(loss, rounded.loss(*batch))
    loss.backward()
    assert all(getattr(trained, name).grad.abs().max() > 0 for name in BANKS)
