"""What a quantizer may know of the inputs: calibration text, and every matrix's Hessian over it."""

import numpy as np
import torch
import torch.nn.functional as F

from fairway.data.dataset import Dataset
from fairway.errors import UserError
from fairway.model.gpt import GPT
from fairway.model.sampling import self_generated_tokens
from fairway.progress import progress
from fairway.quantization.integers import EMBEDDING
from fairway.quantization.settings import QuantizationSettings

BACKWARD_SHARE = 8
"""A backward pass takes that much fewer sequences at a time: it keeps every activation."""


class HessianSums:
    """For `GPT.activation_hook`: sums x·xᵀ of every matrix's inputs.

    Queries, keys and values of a block are given one tensor; its product is computed once and
    shared between the three.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], torch.Tensor] = {}
        self._source: dict[tuple[str, int], tuple[str, int]] = {}
        self._counts: dict[tuple[str, int], int] = {}
        # Kept alive on purpose: an identity says nothing once the tensor's memory is reused.
        self._latest_inputs: torch.Tensor | None = None
        self._latest_key: tuple[str, int] = ("", -1)

    def __call__(self, bank: str, index: int, inputs: torch.Tensor) -> None:
        """Add the inputs [..., C] of matrix `index` of `bank`."""
        key = (bank, index)
        if inputs is not self._latest_inputs:
            self._latest_inputs, self._latest_key = inputs, key
            self._add(key, inputs)
        self._source[key] = self._latest_key

    def hessians(self) -> dict[tuple[str, int], torch.Tensor]:
        """(bank, matrix) → mean of x·xᵀ, float64 [C, C]."""
        means = {key: total / self._counts[key] for key, total in self._sums.items()}
        return {key: means[source] for key, source in self._source.items()}

    def _add(self, key: tuple[str, int], inputs: torch.Tensor) -> None:
        product = sum_of_products(inputs.detach())
        self._sums[key] = self._sums[key] + product if key in self._sums else product
        self._counts[key] = self._counts.get(key, 0) + inputs.shape[:-1].numel()


def sum_of_products(inputs: torch.Tensor) -> torch.Tensor:
    """The sum of x·xᵀ over the rows x of `inputs` [..., C], float64 [C, C]."""
    if inputs.is_cuda and inputs.dtype.itemsize == 2:
        # Products of half precision are exact in float32. Each sequence has a sum of its own: its
        # rounding stays small, and all multiprocessors have work, for which one [C, C] is too few.
        sequences = inputs if inputs.dim() == 3 else inputs.flatten(0, -2)[None]
        products = torch.bmm(sequences.mT, sequences, out_dtype=torch.float32)
        return products.sum(0, dtype=torch.float64)
    rows = inputs.flatten(0, -2).float()
    return (rows.T @ rows).double()


@torch.no_grad()
def collect_hessians(
    model: GPT, tokens: torch.Tensor, batch_sequences: int
) -> dict[tuple[str, int], torch.Tensor]:
    """Run int64 `tokens` [S, T] through the model; (bank, matrix) → Hessian float64 [C, C]."""
    device = model.token_embedding.device
    sums = HessianSums()
    model.activation_hook = sums
    try:
        with progress(len(tokens), "calibration", "sequence") as bar:
            for batch in tokens.split(batch_sequences):
                sums(EMBEDDING, 0, model.hidden(batch.to(device)))
                bar.update(len(batch))
    finally:
        model.activation_hook = None
    return sums.hessians()


class GradientSums:
    """For `GPT.gradient_hook`: sums the squared gradients in every matrix's outputs."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int], torch.Tensor] = {}

    def __call__(self, bank: str, index: int, gradient: torch.Tensor) -> None:
        """Add the gradient [..., R] of matrix `index` of `bank`."""
        self.add(bank, index, gradient.float().square())

    def add(self, bank: str, index: int, squares: torch.Tensor) -> None:
        """Add squares [..., R]."""
        total = squares.flatten(0, -2).sum(0).double()
        self.sums[bank, index] = self.sums.get((bank, index), 0) + total


def collect_sensitivities(
    model: GPT, tokens: torch.Tensor, batch_sequences: int
) -> dict[tuple[str, int], torch.Tensor]:
    """(bank, matrix) → mean over int64 `tokens` [S, T] of the squared gradient of a text's loss in
    nats in each output of the matrix, float64 [R]; of a block that runs in several passes, the sum.

    Of the head, whose outputs are logits, it is the mean of p·(1−p), the expected square where
    the target is drawn from the model's distribution p.
    """
    device, gradients = model.token_embedding.device, GradientSums()
    model.gradient_hook = gradients
    try:
        with progress(len(tokens), "sensitivity", "sequence") as bar:
            for batch in tokens.split(max(1, batch_sequences // BACKWARD_SHARE)):
                batch = batch.to(device)
                logits = model(batch)[:, :-1]
                p = logits.detach().softmax(-1)
                gradients.add(EMBEDDING, 0, p * (1 - p))
                F.cross_entropy(logits.mT, batch[:, 1:], reduction="sum").backward()
                bar.update(len(batch))
    finally:
        model.gradient_hook = None
        model.zero_grad()
    return {key: total / tokens.numel() for key, total in gradients.sums.items()}


def calibration_tokens(
    model: GPT, dataset: Dataset, settings: QuantizationSettings, seed: int
) -> torch.Tensor:
    """int64 [calibration_sequences, calibration_tokens], from where `gptq.calibration` says."""
    if settings.calibration == "train":
        return training_tokens(
            dataset, settings.calibration_sequences, settings.calibration_tokens, seed
        )
    return self_generated_tokens(
        model,
        settings.calibration_sequences,
        settings.calibration_tokens,
        settings.temperature,
        settings.batch_sequences,
        seed,
        dataset.bos_id,
    )


def training_tokens(dataset: Dataset, sequences: int, tokens: int, seed: int) -> torch.Tensor:
    """Distinct rows of the training split, drawn at random: int64 [sequences, tokens].

    Raises UserError where the split holds fewer than `sequences` rows.
    """
    spans = dataset.splits["train"]
    ends = np.cumsum([len(span) // tokens for span in spans])
    available = int(ends[-1])
    if available < sequences:
        raise UserError(
            f"gptq.calibration_sequences is {sequences} but the training split holds {available} "
            f"rows of gptq.calibration_tokens = {tokens}: lower one of them"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(available, sequences, replace=False))
    rows = []
    for row in chosen:
        index = np.searchsorted(ends, row, side="right")
        row_in_span = row - ends[index] + len(spans[index]) // tokens
        rows.append(spans[index].read()[row_in_span * tokens : (row_in_span + 1) * tokens])
    return torch.from_numpy(np.stack(rows).astype(np.int64))
