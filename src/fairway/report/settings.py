"""Section `report`. It loads little, for every start of the workflow reads it."""

from typing import Annotated

from pydantic import Field

from fairway.settings import Settings


class Baseline(Settings):
    """What a run must beat."""

    name: str = Field(min_length=1)
    """What the page calls it."""
    losses: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    """Nats per token, one of each seed."""


class ReportSettings(Settings):
    """What scores are held against (section `report`)."""

    against: str | None = None
    """The variant that the others are compared with; null: the first."""
    baseline: Baseline | None = None
    """A published score to beat; null: no such test."""
    minimum_gain_nats: float = Field(0.005, ge=0)
    """By how many nats per token it must be beaten."""
    significance: float = Field(0.01, gt=0, lt=1)
    """The one-sided p below which the page says that it is."""
