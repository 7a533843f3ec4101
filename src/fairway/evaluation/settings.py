"""The config section `evaluation`."""

from typing import Self

from pydantic import Field, model_validator

from fairway.errors import UserError
from fairway.evaluation.adapters.base import Adapter
from fairway.evaluation.global_updates import GlobalUpdateSettings
from fairway.evaluation.windows import WindowSettings
from fairway.settings import Choice


class AdapterChoice(Choice):
    """An adapter by name with its settings; `module:Name` is a class of your own."""

    package = "fairway.evaluation.adapters"


class EvaluationSettings(WindowSettings):
    """How the artifact's loss on the validation text is computed.

        EvaluationSettings(adapters=["lora", {"my_cache:Cache": {"weight": 0.1}}], lanes=8)

    Raises (as UserError through `fairway.settings.validated`) where adapters do not fit the windows
    or one another.
    """

    adapters: tuple[AdapterChoice, ...] = Field(("lora", "slot", "ngram"))
    """What changes the distributions as it learns from scored text, in this order; [] is the plain
    sliding window."""
    global_updates: GlobalUpdateSettings = GlobalUpdateSettings()
    """Training of the model itself on scored text."""

    @property
    def labels(self) -> list[str]:
        """The adapters' names in columns and figures."""
        return [choice.label for choice in self.adapters]

    @property
    def windows_scored_together(self) -> int | None:
        """As of `Adapter.windows_scored_together`, of the one adapter that says a number."""
        found = (choice.type.windows_scored_together(choice.settings) for choice in self.adapters)
        return next((count for count in found if count is not None), None)

    @model_validator(mode="after")
    def _adapters_fit(self) -> Self:
        found = f"found evaluation.adapters [{', '.join(self.labels)}]"
        for number, choice in enumerate(self.adapters):
            if not issubclass(choice.type, Adapter):
                raise UserError(f"evaluation.adapters: {choice.name} is no subclass of Adapter")
            if choice.label in self.labels[:number]:
                raise UserError(
                    f"evaluation.adapters names {choice.label} twice, expected each once: {found}"
                )
            if choice.type.replaces_logits and number > 0:
                raise UserError(
                    f"evaluation.adapters.{choice.name} computes logits anew and would drop what "
                    f"others made of them, so it must come first: {found}"
                )
            if not choice.type.is_mixture and any(
                before.type.is_mixture for before in self.adapters[:number]
            ):
                raise UserError(
                    f"evaluation.adapters.{choice.name} changes logits, so it must come before "
                    f"those that mix probabilities: {found}"
                )
            choice.settings.check_fits(self)
        if self.windows_scored_together is not None and len(self.adapters) > 1:
            raise UserError(
                f"evaluation.adapters: found [{', '.join(self.labels)}], one of which scores "
                "several windows together, so no other goes with it: use it alone"
            )
        return self
