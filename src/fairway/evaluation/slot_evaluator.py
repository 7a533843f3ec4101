"""The slot stage's model and scores as the audit wants them; scoring.py must not need that."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fairway.audit.interface import Scores
from fairway.audit.null import Draw
from fairway.evaluation.evaluator import EvaluatorSettings, score_stream, target_nll
from fairway.evaluation.stream import ModelLogits
from fairway.model.gpt import GPT
from fairway.progress import progress


def make_evaluator(
    model_logits: ModelLogits,
    settings: EvaluatorSettings,
    bos_id: int,
    world_size: int = 1,
    *,
    kernels: str = "plain",
    model: GPT | None = None,
    seed: int = 0,
) -> Callable[[Tensor], Scores]:
    """What `score_stream` scores with, in the form that the audit examines.

    The evaluator takes tokens int64 [n + 1] and returns log-probabilities float32 [n, V] on their
    device, row i being the distribution that scored tokens[i + 1], with the account of each score:
    its target, its nats and the lane that it was scored in. world_size > 1 plays the ranks one
    after another; a lane belongs to one rank. Other arguments as in `score_stream`.
    """

    def evaluate(tokens: Tensor) -> Scores:
        log_probs, account = None, []
        for rank in range(world_size):
            for scored in score_stream(
                model_logits, tokens, settings, bos_id, rank, world_size,
                kernels=kernels, model=model, seed=seed,
            ):  # fmt: skip
                after = scored.logits_after
                if log_probs is None:
                    log_probs = after.new_full((len(tokens) - 1, after.shape[1]), torch.nan)
                log_probs[scored.positions - 1] = torch.log_softmax(after, dim=1)
                claimed = target_nll(after, scored.targets)
                account.append((scored.positions, claimed, scored.lanes))
        return Scores(log_probs, *(torch.cat(part) for part in zip(*account, strict=True)))

    return evaluate


def document_source(model: GPT, window_tokens: int, bos_id: int) -> Draw:
    """Draws for the null test: documents of `window_tokens`, side by side, joined into one stream.

    Side by side because a step of the model takes as long for many documents as for one.
    """

    @torch.no_grad()
    def draw(num_targets: int, seed: int) -> tuple[Tensor, np.ndarray]:
        length = min(window_tokens, num_targets + 1)
        count = -(-(num_targets + 1) // length)
        device = model.token_embedding.device
        generator = torch.Generator().manual_seed(seed)
        documents = torch.full((count, length), bos_id)
        log_probs = torch.full((count, length), torch.nan, dtype=torch.float64)
        cache = model.new_cache(count, length)
        with progress(length - 1, "null stream", "step") as bar:
            for place in range(1, length):
                logits = model.decode_step(documents[:, place - 1].to(device), cache)
                distributions = torch.log_softmax(logits.double().cpu(), dim=1)
                drawn = torch.multinomial(distributions.exp(), 1, generator=generator)
                documents[:, place] = drawn[:, 0]
                log_probs[:, place] = distributions.gather(1, drawn)[:, 0]
                bar.update(1)
        stream = documents.flatten()[: num_targets + 1].to(device)
        return stream, log_probs.flatten()[1 : num_targets + 1].numpy()

    return draw
