"""Gradients of a micro-batch: launched kernel by kernel, or replayed as one CUDA graph.

A graph spares the processor the launches and the GPU the waits between kernels, which count where
a micro-batch is small. It is recorded once for each shape, and once more for late QAT.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fairway.model.gpt import GPT
from fairway.model.runtime import record_graph

Backward = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""inputs, targets int64 [B, T] and a factor: adds the gradients of factor · loss to `.grad`, and
returns factor · loss, a float32 scalar on the device."""


WARM_UP_RUNS = 2
"""Before a recording."""


def fill_missing_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give zeros to those that the loss does not depend on, as without any value layers."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def launched(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Backward:
    """The plain way, for any `loss` of inputs and targets."""

    def backward(inputs: torch.Tensor, targets: torch.Tensor, factor: float) -> torch.Tensor:
        value = loss(inputs, targets) * factor
        value.backward()
        return value.detach()

    return backward


@dataclass(frozen=True)
class Recording:
    """A graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    targets: torch.Tensor
    loss: torch.Tensor


def replayed(model: GPT) -> Backward:
    """The same for `model.loss` on CUDA, recorded when a kind of micro-batch is first met."""
    recordings: dict[tuple, Recording] = {}
    parameters = list(model.parameters())
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    pool = torch.cuda.graph_pool_handle()

    def backward(inputs: torch.Tensor, targets: torch.Tensor, factor: float) -> torch.Tensor:
        if parameters[0].grad is not gradients[0]:  # the first micro-batch of a step
            torch._foreach_zero_(gradients)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        kind = (*inputs.shape, factor, model.matrix_transform)
        if kind not in recordings:
            recordings[kind] = _record(model, inputs, targets, factor, gradients, pool)
        recording = recordings[kind]
        recording.inputs.copy_(inputs)
        recording.targets.copy_(targets)
        recording.graph.replay()
        return recording.loss.clone()

    return backward


def _record(model, inputs, targets, factor, gradients, pool) -> Recording:
    backward, before = launched(model.loss), [gradient.clone() for gradient in gradients]
    inputs, targets = inputs.clone(), targets.clone()
    main, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(main)
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP_RUNS):
            backward(inputs, targets, factor)
    main.wait_stream(aside)
    graph, loss = record_graph(lambda: backward(inputs, targets, factor), pool)
    torch._foreach_copy_(gradients, before)
    return Recording(graph, inputs, targets, loss)
