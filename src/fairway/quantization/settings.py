"""The config section `gptq`: calibration text, and which quantizer makes codes of the matrices."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fairway.errors import UserError
from fairway.quantization.integers import EMBEDDING
from fairway.quantization.quantizers.base import Quantizer
from fairway.settings import Choice, Settings

READ_BY = {"percentiles": {"clip_percentiles"}, "sigmas": {"sigmas"}}
"""Rules for steps, and the keys that only they read."""
BUILT_IN = "gptq"
"""The quantizer whose keys stand in the section itself."""


class Sigmas(Settings):
    """How many standard deviations of its row a largest code stands for, by a matrix's role."""

    attention: float = Field(13.0, gt=0)
    """Query, key, value and output matrices, to int6."""
    mlp: float = Field(11.5, gt=0)
    """Both matrices of an MLP, to int6."""
    embedding: float = Field(14.0, gt=0)
    """The token embedding, to int7."""

    def of(self, name: str) -> float:
        """That of the parameter `name`."""
        if name == EMBEDDING:
            return self.embedding
        return self.mlp if name.startswith("mlp") else self.attention


class GptqSettings(Settings):
    """Keys of the built-in quantizer `gptq`, which stand in the section itself."""

    steps: Literal["percentiles", "sigmas", "sensitivity"] = "percentiles"
    """What sets the step between neighboring codes. `percentiles`: the best of `clip_percentiles`,
    row by row. `sigmas`: a row's standard deviation. `sensitivity`: how much the loss depends on
    the row's output and on the column's input, measured on the calibration text."""
    sigmas: Sigmas = Sigmas()
    """For `steps: sigmas`: standard deviations that the largest code stands for."""
    embedding: Literal["int8", "gptq"] = "int8"
    """Whether the token embedding is rounded to the nearest int8, or quantized as matrices are."""

    block_columns: int = Field(128, ge=1)
    """Columns quantized between two updates of the rest of the matrix; changes the speed only."""
    dampening_fraction: float = Field(0.005, gt=0)
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    clip_percentiles: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.999, 0.9995, 0.9999, 0.99999, 1.0), min_length=1
    )
    """Candidates for where a row is clipped, as percentiles (0 to 1) of its absolute weights."""
    scale_factor: Annotated[float, Field(gt=0)] | Literal["budget"] = 1.0
    """Widens every step. A factor f above 1 saves log2(f) bits a code and increases the error.
    `budget`: the factor with which the artifact fills budgets.artifact_bytes; no code is zeroed."""


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
            unread.update({"clip_percentiles", "sigmas"} - READ_BY.get(self.steps, set()))
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
