"""The reference submission's optimizer: Muon for matrices, AdamW for everything else."""

from functools import partial

import torch
import torch.distributed as dist

from fairway.model.gpt import GPT
from fairway.training.adamw import AdamW
from fairway.training.gradients import fill_missing_gradients
from fairway.training.muon import BankShards, orthogonalize

GROUPS = ("matrix", "embedding", "scalar")


def parameter_groups(model: GPT) -> dict[str, list[str]]:
    """Names of the parameters of each group, as the table of parameters has them."""
    table = model.parameter_table
    return {group: [name for name in table if table[name].group == group] for group in GROUPS}


class Optimizer:
    """One step from local gradients: average over processes, clip by global norm, update.

    learning_rates, weight_decays: base rate, and decoupled decay times the rate, of each group of
    `parameter_groups`. muon_*: see `orthogonalize`.
    """

    def __init__(
        self,
        model: GPT,
        *,
        learning_rates: dict[str, float],
        betas: tuple[float, float],
        weight_decays: dict[str, float],
        newton_schulz_steps: int,
        gradient_clip: float,
        muon_coefficients: str = "jordan",
        muon_row_normalize: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        groups = parameter_groups(model)
        parameters = dict(model.named_parameters())
        self.world_size = world_size
        self.learning_rates = learning_rates
        self.weight_decays = weight_decays
        self.orthogonalize = partial(
            orthogonalize,
            steps=newton_schulz_steps,
            coefficients=muon_coefficients,
            normalize_rows=muon_row_normalize,
        )
        self.gradient_clip = gradient_clip
        self.banks = {
            name: BankShards(parameters[name], rank, world_size) for name in groups["matrix"]
        }
        self.replicated = {
            name: parameters[name] for name in (*groups["embedding"], *groups["scalar"])
        }
        self.adam = {
            group: AdamW(
                {name: parameters[name] for name in groups[group]},
                betas=betas,
                weight_decay=weight_decays[group],
            )
            for group in ("embedding", "scalar")
        }

    @torch.no_grad()
    def step(self, learning_rate_scale: float, momentum: float) -> None:
        """Update every parameter from its `.grad`, then clear the gradients."""
        fill_missing_gradients(self.replicated.values())
        shards = {name: bank.reduce_gradient() for name, bank in self.banks.items()}
        self._average_replicated()
        clip = self._clip_factor(shards)
        torch._foreach_mul_([p.grad for p in self.replicated.values()], clip)
        for group, adam in self.adam.items():
            adam.step(self.learning_rates[group] * learning_rate_scale)
        for name, bank in self.banks.items():
            bank.step(
                shards[name] * clip,
                learning_rate=self.learning_rates["matrix"] * learning_rate_scale,
                momentum=momentum,
                weight_decay=self.weight_decays["matrix"],
                orthogonalize=self.orthogonalize,
            )
        for parameter in (*self.replicated.values(), *(b.bank for b in self.banks.values())):
            parameter.grad = None

    def _average_replicated(self) -> None:
        if self.world_size == 1:
            return
        gradients = [parameter.grad for parameter in self.replicated.values()]
        flat = torch._utils._flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        flat /= self.world_size
        averaged = torch._utils._unflatten_dense_tensors(flat, gradients)
        torch._foreach_copy_(gradients, list(averaged))

    def _clip_factor(self, shards: dict[str, torch.Tensor]) -> torch.Tensor:
        """min(1, gradient_clip / global norm), float32 scalar; the same on every process."""
        squared = torch.stack([shard.square().sum() for shard in shards.values()]).sum()
        if self.world_size > 1:
            dist.all_reduce(squared)
        replicated = torch._foreach_norm([p.grad for p in self.replicated.values()])
        norm = (squared + torch.stack(replicated).square().sum()).sqrt()
        return (self.gradient_clip / (norm + 1e-6)).clamp(max=1.0)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Momenta and Adam moments by name: the same for every world size. Collective."""
        tensors = {f"momentum.{name}": bank.full_momentum() for name, bank in self.banks.items()}
        for adam in self.adam.values():
            for name, moments in adam.moments.items():
                tensors |= {f"{key}.{name}": value for key, value in moments.items()}
        return tensors

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state_tensors` gave; an empty dict resets to the state before step 1."""
        for name, bank in self.banks.items():
            if tensors:
                bank.load_full_momentum(tensors[f"momentum.{name}"])
            else:
                bank.momentum.zero_()
        for adam in self.adam.values():
            adam.reset()
            for name, moments in adam.moments.items() if tensors else ():
                for key, value in moments.items():
                    value.copy_(tensors[f"{key}.{name}"])
