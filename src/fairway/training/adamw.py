"""AdamW as PyTorch's fused function computes it, for named parameters.

`torch.optim.AdamW` calls the same function, and loads PyTorch's compiler first, which takes longer
than a small model's whole test-time training.
"""

from collections.abc import Mapping

import torch
from torch.optim.adamw import adamw


class AdamW:
    """Moments of parameters, and the step that moves both (Loshchilov & Hutter, 2019).

    weight_decay: decoupled, times the learning rate. moments: for each parameter's name the steps
    taken, a float32 scalar, and `exp_avg` and `exp_avg_sq` in its shape, as PyTorch names them.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters, self.betas, self.weight_decay = dict(parameters), betas, weight_decay
        self.reset()

    def reset(self) -> None:
        """Start over, as before the first step."""
        self.moments = {
            name: {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter from its `.grad`, which must be there."""
        parameters, moments = list(self.parameters.values()), self.moments.values()
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [one["exp_avg"] for one in moments],
            [one["exp_avg_sq"] for one in moments],
            [],
            [one["step"] for one in moments],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=learning_rate,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )
