"""Gradients of a micro-batch: kernel by kernel, or all kernels as one CUDA graph.

A graph is captured for each shape of micro-batch, with and without late QAT and recurrence.
"""

from collections.abc import Callable, Iterable

import torch

from fairway.model.gpt import GPT
from fairway.model.graphs import CapturedGraph, capture

Backward = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""inputs, targets int64 [B, T] and a factor: adds the gradients of factor · loss to `.grad`, and
returns factor · loss, a float32 scalar on the device."""

WARM_UP_RUNS = 2
"""A backward pass runs this often before it is captured."""


def fill_missing_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give zeros to those that the loss does not depend on, as without any value layers."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def eager_backward(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Backward:
    """The plain way, for any `loss` of inputs and targets."""

    def backward(inputs: torch.Tensor, targets: torch.Tensor, factor: float) -> torch.Tensor:
        value = loss(inputs, targets) * factor
        value.backward()
        return value.detach()

    return backward


def graphed_backward(model: GPT) -> Backward:
    """The same for `model.loss` on CUDA, captured when a shape of micro-batch is first met."""
    graphs: dict[tuple, CapturedGraph] = {}
    eager = eager_backward(model.loss)
    parameters = list(model.parameters())
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    pool = torch.cuda.graph_pool_handle()

    def backward(inputs: torch.Tensor, targets: torch.Tensor, factor: float) -> torch.Tensor:
        if parameters[0].grad is not gradients[0]:  # the first micro-batch of a step
            torch._foreach_zero_(gradients)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        key = (*inputs.shape, factor, model.fake_quantize, model.recurs)
        if key not in graphs:
            graphs[key] = capture(
                lambda x, y: eager(x, y, factor),
                (inputs, targets),
                pool=pool,
                warm_up_runs=WARM_UP_RUNS,
                changes=gradients,
            )
        return graphs[key](inputs, targets).clone()

    return backward
