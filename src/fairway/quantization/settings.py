"""The config section `gptq`: calibration text, and which quantizer makes codes of the matrices."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fairway.errors import UserError
from fairway.quantization.quantizers.base import Quantizer
from fairway.settings import Choice, Settings

BUILT_IN = "gptq"
"""The quantizer whose keys stand in the section itself."""


class GptqSettings(Settings):
    """Keys of the built-in quantizer `gptq`, which stand in the section itself."""

    block_columns: int = Field(128, ge=1)
    """Columns quantized between two updates of the rest of the matrix; changes the speed only."""
    dampening_fraction: float = Field(0.005, gt=0)
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    clip_percentiles: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.999, 0.9995, 0.9999, 0.99999, 1.0), min_length=1
    )
    """Candidates for where a row is clipped, as percentiles (0 to 1) of its absolute weights."""
    scale_factor: float = Field(1.0, gt=0)
    """Widens every scale. A factor f above 1 saves log2(f) bits a code and increases the error."""


class QuantizerChoice(Choice):
    """A quantizer by name, with its settings."""

    package: ClassVar[str] = "fairway.quantization.quantizers"


class QuantizationSettings(GptqSettings):
    """Section `gptq`: calibration, and the quantizer.

    With another quantizer than the built-in one, the keys of GptqSettings are not read.
    """

    quantizer: QuantizerChoice = Field(BUILT_IN)
    """`gptq`, whose keys stand in this section, or `{"module:Name": {its settings}}`. Late
    quantization-aware training rounds as this quantizer does."""
    calibration: Literal["self_generated", "train"] = "self_generated"
    """Text that Hessians are computed on: drawn from the model itself, or training text."""
    calibration_sequences: int = Field(64, ge=1)
    """Sequences of that text."""
    calibration_tokens: int = Field(2048, ge=2)
    """Length of each sequence."""
    temperature: float = Field(0.8, gt=0)
    """Of self-generated text."""
    batch_sequences: int = Field(64, ge=1)
    """Sequences drawn, or run through the model, side by side."""

    @model_validator(mode="after")
    def _built_in_keys_stand_in_the_section(self) -> Self:
        defaults = GptqSettings()
        for key, value in self.quantizer.settings if self.uses_built_in else ():
            if value != getattr(defaults, key):
                raise UserError(
                    f"gptq.quantizer.{BUILT_IN}.{key}: found {value!r}, expected it in the "
                    f"section itself, as gptq.{key}"
                )
        return self

    @property
    def uses_built_in(self) -> bool:
        """Whether the quantizer is the library's own GPTQ."""
        return self.quantizer.name == BUILT_IN

    def as_read(self) -> dict[str, Any]:
        """Plain values of the keys that the quantizer reads: a change of another reruns nothing."""
        values = super().as_read()
        unread: set[str] = set()
        if self.uses_built_in:
            values["quantizer"] = BUILT_IN
        else:
            unread.update(GptqSettings.model_fields)
        if not self.quantizer.type.needs_hessians:
            own = set(QuantizationSettings.model_fields) - set(GptqSettings.model_fields)
            unread.update(own - {"quantizer"})
        elif self.calibration == "train":
            unread.add("temperature")
        return {key: value for key, value in values.items() if key not in unread}

    def check_with(self, sections: Mapping[str, Settings]) -> None:
        """Raise UserError where the quantizer's settings do not fit the other sections."""
        self.quantizer.settings.check_with(sections)


def quantizer_of(settings: QuantizationSettings) -> Quantizer:
    """The quantizer that the section names, with its settings."""
    if settings.uses_built_in:
        own = GptqSettings(**{key: getattr(settings, key) for key in GptqSettings.model_fields})
        return settings.quantizer.type(own)
    return settings.quantizer.type(settings.quantizer.settings)
