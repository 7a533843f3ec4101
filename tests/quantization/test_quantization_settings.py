"""The section `gptq`: its checks, which keys count, and the quantizer that it names."""

import pytest

from fairway.errors import UserError
from fairway.quantization.quantizers.base import Quantizer
from fairway.quantization.quantizers.gptq import Gptq
from fairway.quantization.settings import QuantizationSettings, quantizer_of
from fairway.settings import Settings, validated


class Ternary(Quantizer):
    """Enough of a quantizer to be named."""

    class Settings(Settings):
        threshold: float = 0.7

        def check_with(self, sections):
            raise UserError(f"threshold {self.threshold} with {sorted(sections)}")

    title = "ternary"

    def quantize(self, matrices, hessians):
        return {}, None

    def fake(self, name, weight):
        return weight


OTHER = f"{__name__}:Ternary"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": "val"}, "gptq.calibration: found 'val'"),
        ({"calibration_tokens": 0}, "gptq.calibration_tokens: found 0"),
        ({"calibration_tokens": 1}, "gptq.calibration_tokens: found 1"),
        ({"calibration_sequences": 0}, "gptq.calibration_sequences: found 0"),
        ({"batch_sequences": 0}, "gptq.batch_sequences: found 0"),
        ({"block_columns": 0}, "gptq.block_columns: found 0"),
        ({"dampening_fraction": 0.0}, "gptq.dampening_fraction: found 0.0"),
        ({"temperature": -1.0}, "gptq.temperature: found -1.0"),
        ({"clip_percentiles": ()}, "gptq.clip_percentiles"),
        ({"clip_percentiles": (1.5,)}, "gptq.clip_percentiles"),
        ({"scale_factor": 0.0}, "gptq.scale_factor: found 0.0"),
        ({"quantizer": "gtpq"}, "gptq.quantizer.*did you mean gptq"),
        ({"quantizer": {OTHER: {"treshold": 1}}}, "did you mean threshold"),
        ({"quantizer": {"gptq": {"scale_factor": 2.0}}}, "as gptq.scale_factor"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        validated(QuantizationSettings, change, "gptq")


def test_the_sections_flat_keys_are_those_of_the_built_in_quantizer():
    quantizer = quantizer_of(QuantizationSettings(dampening_fraction=0.01, scale_factor=1.2))
    assert isinstance(quantizer, Gptq) and quantizer.needs_hessians
    assert quantizer.settings == Gptq.Settings(dampening_fraction=0.01, scale_factor=1.2)


def test_another_quantizer_has_its_own_settings():
    quantizer = quantizer_of(QuantizationSettings(quantizer={OTHER: {"threshold": 0.5}}))
    assert type(quantizer).__name__ == "Ternary" and quantizer.settings.threshold == 0.5
    assert quantizer.remedy(1.0) is None and not quantizer.needs_hessians


def test_keys_that_are_not_read_change_nothing():
    read = QuantizationSettings(scale_factor=1.1).as_read()
    assert read["quantizer"] == "gptq" and read["scale_factor"] == 1.1
    assert set(read) == set(QuantizationSettings.model_fields) - {"sigmas"}
    by_sigmas = QuantizationSettings(steps="sigmas").as_read()
    assert "sigmas" in by_sigmas and "clip_percentiles" not in by_sigmas
    assert "temperature" not in QuantizationSettings(calibration="train").as_read()
    other = {"quantizer": {OTHER: {"threshold": 0.5}}}
    changed = {**other, "dampening_fraction": 0.01, "calibration": "train"}
    assert QuantizationSettings(**changed).as_read() == other
    assert QuantizationSettings(**other).as_read() == other


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"steps": "sensitivity"},
        {"dampening_fraction": 0.01, "clip_percentiles": [1.0]},
        {"quantizer": {OTHER: {}}},
    ],
)
def test_what_is_read_gives_the_settings_again(values):
    settings = QuantizationSettings(**values)
    again = QuantizationSettings(**settings.as_read())
    assert again == settings and again.as_read() == settings.as_read()


def test_a_quantizer_is_checked_against_the_other_sections():
    settings = QuantizationSettings(quantizer=OTHER)
    with pytest.raises(UserError, match="threshold 0.7 with .'gptq'."):
        settings.check_with({"gptq": settings})
    QuantizationSettings().check_with({})
