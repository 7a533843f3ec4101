"""Muon on banks of matrices: momentum, orthogonalized by Newton–Schulz, sharded over processes.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Use it on
matrices inside the network only, not on embeddings, heads, vectors or scalars.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

QUINTICS = {
    "jordan": (1.0, ((3.4445, -4.7750, 2.0315),)),
    "polar_express": (
        1.02,
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
    ),
}
"""Norms are enlarged by the first number; then each iteration has its coefficients, and further
iterations those of the last.

jordan, of the Muon reference, trades exactness for a steep slope at zero: singular values end
between about 0.7 and 1.2. polar_express is the best polynomial for each iteration on what the ones
before leave (Amsel et al., "The Polar Express", 2025, arXiv:2505.16932): they end between 0.86 and
1.14. It is so for singular values of at most 1, hence the margin.
"""


def orthogonalize(
    matrices: torch.Tensor,
    steps: int,
    coefficients: str = "jordan",
    normalize_rows: bool = False,
) -> torch.Tensor:
    """Approximate U·Vᵀ of each matrix by `steps` Newton–Schulz iterations.

    matrices: [n, out, in], any float dtype; returns the same shape in bfloat16 on CUDA and
    float32 on CPU, where bfloat16 products are slow and not the same on every processor.
    coefficients: a key of QUINTICS. normalize_rows: divide each row by its L2 norm before.
    """
    margin, quintics = QUINTICS[coefficients]
    if normalize_rows:
        matrices = F.normalize(matrices, dim=-1)
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * margin + 1e-7)
    for step in range(steps):
        a, b, c = quintics[min(step, len(quintics) - 1)]
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class BankShards:
    """One bank's momentum, split by matrix over the processes.

    Each process reduces, orthogonalizes and gathers only the matrices that it owns; with one
    process it owns them all. The bank is padded to a multiple of the number of processes.
    """

    def __init__(self, bank: torch.nn.Parameter, rank: int, world_size: int) -> None:
        self.bank, self.rank, self.world_size = bank, rank, world_size
        self.owned = math.ceil(bank.shape[0] / world_size)
        shape = (self.owned, *bank.shape[1:])
        self.momentum = torch.zeros(shape, dtype=bank.dtype, device=bank.device)

    def reduce_gradient(self) -> torch.Tensor:
        """The mean gradient over processes of the owned matrices, [owned, out, in]."""
        gradient = self.bank.grad
        assert gradient is not None
        if self.world_size == 1:
            return gradient
        padded = gradient.new_zeros(self.owned * self.world_size, *gradient.shape[1:])
        padded[: gradient.shape[0]] = gradient
        if dist.get_backend() == "gloo":
            dist.all_reduce(padded)
            mine = padded[self.rank * self.owned : (self.rank + 1) * self.owned]
        else:
            mine = torch.empty_like(self.momentum)
            dist.reduce_scatter_tensor(mine, padded)
        return mine / self.world_size

    def step(
        self,
        gradient: torch.Tensor,
        *,
        learning_rate: float,
        momentum: float,
        weight_decay: float,
        orthogonalize: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Nesterov momentum on `gradient` [owned, out, in], then update the whole bank."""
        self.momentum.mul_(momentum).add_(gradient)
        lookahead = gradient.add(self.momentum, alpha=momentum)
        update = orthogonalize(lookahead)
        if self.world_size > 1:
            gathered = update.new_empty(self.owned * self.world_size, *update.shape[1:])
            dist.all_gather_into_tensor(gathered, update.contiguous())
            update = gathered[: self.bank.shape[0]]
        # It keeps the update's effect alike for tall and wide matrices.
        scale = math.sqrt(max(1.0, self.bank.shape[1] / self.bank.shape[2]))
        self.bank.mul_(1 - learning_rate * weight_decay)
        self.bank.add_(update.to(self.bank.dtype), alpha=-learning_rate * scale)

    def full_momentum(self) -> torch.Tensor:
        """The whole bank's momentum [n, out, in], gathered from every process."""
        if self.world_size == 1:
            return self.momentum
        gathered = self.momentum.new_empty(self.owned * self.world_size, *self.momentum.shape[1:])
        dist.all_gather_into_tensor(gathered, self.momentum)
        return gathered[: self.bank.shape[0]]

    def load_full_momentum(self, momentum: torch.Tensor) -> None:
        """Take this process's share of a whole bank's momentum, whatever world size saved it."""
        first = self.rank * self.owned
        mine = momentum[first : first + self.owned].to(self.momentum.device)
        self.momentum.zero_()
        self.momentum[: mine.shape[0]] = mine
