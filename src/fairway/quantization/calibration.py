"""What GPTQ knows of the inputs: calibration tokens, and each matrix's Hessian over them."""

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import torch

from fairway.data.dataset import Dataset
from fairway.errors import UserError
from fairway.model.gpt import GPT, Cache
from fairway.progress import progress
from fairway.quantization.gptq import GptqSettings

GRAPH_WARMUP_STEPS = 3
"""Steps before a CUDA graph is captured, so that libraries have allocated their workspaces."""


class HessianSums:
    """An observer for `GPT.observer`: sums x·xᵀ of every matrix's inputs.

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
        rows = inputs.detach().flatten(0, -2).float()
        product = (rows.T @ rows).double()
        self._sums[key] = self._sums[key] + product if key in self._sums else product
        self._counts[key] = self._counts.get(key, 0) + len(rows)


@torch.no_grad()
def collect_hessians(
    model: GPT, tokens: torch.Tensor, batch_sequences: int
) -> dict[tuple[str, int], torch.Tensor]:
    """Run int64 `tokens` [S, T] through the model; (bank, matrix) → Hessian float64 [C, C]."""
    device = model.token_embedding.device
    sums = HessianSums()
    model.observer = sums
    try:
        with progress(len(tokens), "calibration", "sequence") as bar:
            for batch in tokens.split(batch_sequences):
                model.hidden(batch.to(device))
                bar.update(len(batch))
    finally:
        model.observer = None
    return sums.hessians()


def calibration_tokens(
    model: GPT, dataset: Dataset, settings: GptqSettings, seed: int
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


@torch.no_grad()
def self_generated_tokens(
    model: GPT,
    sequences: int,
    tokens: int,
    temperature: float,
    batch_sequences: int,
    seed: int,
    bos_id: int,
) -> torch.Tensor:
    """Sample from the model itself: int64 [sequences, tokens] on the CPU, BOS first in each.

    Each token comes from its own uniform number, drawn on the CPU before the first step, so a
    sample depends neither on `batch_sequences` nor on the device's random generator.
    """
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(sequences, tokens, dtype=torch.float64, generator=generator)
    samples = []
    with progress(sequences * (tokens - 1), "sampling", "token") as bar:
        for batch_uniforms in uniforms.split(batch_sequences):
            sample = _sample_batch(model, batch_uniforms, temperature, bos_id, bar.update)
            samples.append(sample.cpu())
    return torch.cat(samples)


def sample_tokens(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """Draw int64 [B] from softmax(logits / temperature) [B, V] by inverting its distribution.

    uniforms: float64 [B] in [0, 1).
    """
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    thresholds = uniforms.unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, thresholds, right=True).squeeze(1)
    # u · total can round up to the total itself.
    return drawn.clamp(max=logits.shape[1] - 1)


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


def _sample_batch(
    model: GPT,
    uniforms: torch.Tensor,
    temperature: float,
    bos_id: int,
    on_tokens: Callable[[int], object],
) -> torch.Tensor:
    """Sample [B, T] with a key/value cache, one uniform number per token."""
    batch, length = uniforms.shape
    device = model.token_embedding.device
    uniforms = uniforms.to(device)
    cache = model.new_cache(batch, length)
    current = torch.full((batch,), bos_id, dtype=torch.int64, device=device)

    def step() -> None:
        logits = model.decode_step(current, cache)
        threshold = uniforms.gather(1, cache.length.expand(batch, 1)).squeeze(1)
        current.copy_(sample_tokens(logits, threshold, temperature))

    advance = _captured(step, cache, current) if device.type == "cuda" else step
    sampled = [current.clone()]
    for _ in range(length - 1):
        advance()
        sampled.append(current.clone())
        on_tokens(batch)
    return torch.stack(sampled, dim=1)


def _captured(step: Callable[[], None], cache: Cache, current: torch.Tensor) -> Callable[[], None]:
    """`step` as one CUDA graph: its hundreds of small kernels are launched at once.

    Warm-up runs `step` for real, so what it changes is restored afterwards.
    """
    parts = [getattr(cache, field.name) for field in fields(cache)]
    changed = [current, *(part for part in parts if isinstance(part, torch.Tensor))]
    originals = [tensor.clone() for tensor in changed]

    def restore() -> None:
        for tensor, original in zip(changed, originals, strict=True):
            tensor.copy_(original)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(GRAPH_WARMUP_STEPS):
            restore()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    restore()
    return graph.replay
