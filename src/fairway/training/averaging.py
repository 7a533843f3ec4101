"""Running averages of the weights during training: EMA at several decays, and SWA."""

from collections.abc import Sequence

import torch

from fairway.model.gpt import GPT
from fairway.training.checkpoint import with_prefix


def tracker_name(decay: float) -> str:
    """The key under which an EMA's weights are stored, such as `ema_0.997`."""
    return f"ema_{decay:g}"


class WeightAverages:
    """EMA trackers for each decay and one SWA mean, float32, on the model's device.

    EMA: a ← decay·a + (1−decay)·w after every step, starting from the initial weights.
    SWA: the mean of the weights every `swa_every_steps` steps while the learning-rate scale is
    under `swa_scale` (Izmailov et al., 2018); empty where that never happened.
    """

    def __init__(
        self, model: GPT, decays: Sequence[float], swa_every_steps: int, swa_scale: float
    ) -> None:
        self.parameters = dict(model.named_parameters())
        self.decays = decays
        self.swa_every_steps = swa_every_steps
        self.swa_scale = swa_scale
        self.reset()

    def reset(self) -> None:
        """Start over from the model's present weights."""
        self.ema = {tracker_name(decay): self._copy() for decay in self.decays}
        self.swa: dict[str, torch.Tensor] = {}
        self.swa_count = 0

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int, learning_rate_scale: float) -> None:
        """Take in the weights after `step` (counted from 0)."""
        weights = [parameter.detach() for parameter in self.parameters.values()]
        for decay in self.decays:
            average = list(self.ema[tracker_name(decay)].values())
            torch._foreach_lerp_(average, weights, 1 - decay)
        if learning_rate_scale < self.swa_scale and (step + 1) % self.swa_every_steps == 0:
            self.swa_count += 1
            if self.swa_count == 1:
                self.swa = self._copy()
            else:
                torch._foreach_lerp_(list(self.swa.values()), weights, 1 / self.swa_count)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """`<tracker>.<parameter>` → average, for every tracker that holds one."""
        trackers = {**self.ema, **({"swa": self.swa} if self.swa else {})}
        return {
            name: tensor
            for tracker, average in trackers.items()
            for name, tensor in with_prefix(tracker, average).items()
        }

    def load_state_tensors(self, tensors: dict[str, torch.Tensor], swa_count: int) -> None:
        """Restore what `state_tensors` gave."""
        self.swa_count = swa_count
        self.swa = self._copy() if swa_count else {}
        trackers = {**self.ema, **({"swa": self.swa} if self.swa else {})}
        for tracker, average in trackers.items():
            for name, tensor in average.items():
                tensor.copy_(tensors[f"{tracker}.{name}"])
