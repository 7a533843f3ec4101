"""How a model computes, as the section `runtime` says; needs no PyTorch."""

from typing import Literal

from fairway.settings import Settings


class RuntimeSettings(Settings):
    """How to compute; every metrics.json says which of these ran."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Auto takes CUDA where there is a GPU."""
    kernels: Literal["auto", "plain", "fused"] = "auto"
    """The model's plain formulation, or its Triton twin (CUDA). Auto takes the twin on Hopper GPUs
    and newer, where it supports the model."""
    attention: Literal["auto", "sdpa", "cudnn", "flash_attn"] = "auto"
    """On CUDA auto takes flash-attn-4 where it is installed, else cudnn on Hopper GPUs and newer,
    else any other of the flash_attn family."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; auto is bfloat16 on CUDA, float32 on CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether torch.compile takes the plain formulation; auto does so on CUDA only."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Training replays a micro-batch's kernels as one CUDA graph, slot_eval and audit those of a
    forward pass; auto does so with fused kernels."""
