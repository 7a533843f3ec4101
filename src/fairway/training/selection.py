"""Which averaged weights go on: EMA, SWA or the last ones, chosen without looking at validation."""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from fairway.errors import UserError
from fairway.model.gpt import GPT
from fairway.model.losses import target_losses
from fairway.model.weights import check_state
from fairway.settings import Settings
from fairway.training.averaging import tracker_name
from fairway.training.checkpoint import tensors_under


class EMASettings(Settings):
    """Which averaged weights go on to the next stage."""

    kind: Literal["ema", "swa", "none"] = "ema"
    """An exponential moving average, the plain mean of the last part (SWA), or the last weights."""
    decay: Literal["auto"] | Annotated[float, Field(gt=0, lt=1)] = "auto"
    """For kind ema: one of train.ema_decays, or auto, the lowest loss on held-out training text."""

    def check_with(self, sections: Mapping[str, Settings]) -> None:
        """Raise UserError where `decay` is none of train.ema_decays."""
        decays = sections["train"].ema_decays
        if self.kind == "ema" and self.decay != "auto" and self.decay not in decays:
            raise UserError(
                f"ema.decay {self.decay} is not tracked: choose auto or one of train.ema_decays "
                f"{list(decays)}"
            )


def select_average(
    model: GPT,
    averages: dict[str, torch.Tensor],
    settings: EMASettings,
    read_selection_tokens: Callable[[], np.ndarray],
) -> tuple[str, dict[str, float]]:
    """Load the chosen average into `model`; returns its name and the losses it was chosen by.

    averages: `WeightAverages.state_tensors()`; `model` holds the last weights.
    read_selection_tokens: called only for `decay: auto`; held-out *training* tokens [n+1].
    The losses (nats per token, by tracker) are empty where nothing had to be chosen.
    Raises UserError where the wanted tracker does not exist.
    """
    if settings.kind == "none":
        return "last", {}
    if settings.kind == "swa":
        _load(model, averages, "swa")
        return "swa", {}
    if settings.decay != "auto":
        name = tracker_name(settings.decay)
        _load(model, averages, name)
        return name, {}
    trackers = sorted({name.rsplit(".", 1)[0] for name in averages if name.startswith("ema_")})
    tokens = read_selection_tokens()
    losses = {name: _loss_of(model, averages, name, tokens) for name in trackers}
    best = min(losses, key=losses.__getitem__)
    _load(model, averages, best)
    return best, losses


def _loss_of(model: GPT, averages: dict[str, torch.Tensor], name: str, tokens: np.ndarray) -> float:
    _load(model, averages, name)
    return float(target_losses(model, tokens).mean())


def _load(model: GPT, averages: dict[str, torch.Tensor], name: str) -> None:
    weights = tensors_under(averages, name)
    if not weights:
        kept = sorted({key.rsplit(".", 1)[0] for key in averages})
        raise UserError(
            f"no average {name!r} was tracked; train kept {', '.join(kept)}: change ema.kind or "
            "ema.decay, or (for swa) train.swa_every_steps or train.swa_scale"
        )
    check_state(model.config, weights)
    model.load_state_dict(weights)
