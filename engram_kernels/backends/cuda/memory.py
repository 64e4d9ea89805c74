"""Episodic memory on NVIDIA GPUs, in CUDA C++: the streaming write.

`memory_accumulate_` has no kernel here: a few rows into a large state are bound by its bytes, which Triton's
kernel moves once; many rows are GEMMs, which are cuBLAS's.
"""

import functools
import warnings

import torch
from torch import Tensor

from ... import _cuda
from ..native import DTYPE_CODES, stream
from ..torch import memory as reference
from .device import implements


def _shape(precision_inverse: Tensor, latents: Tensor) -> tuple[int, ...]:
    """Type code, B, K, C and N."""
    batch, slots, _ = precision_inverse.shape
    return DTYPE_CODES[precision_inverse.dtype], batch, slots, latents.shape[-1], latents.shape[1]


def _workspace(precision_inverse: Tensor, latents: Tensor) -> int:
    with torch.cuda.device(precision_inverse.device):
        return _cuda.memory_stream_workspace(*_shape(precision_inverse, latents))


def _declines_stream(
    precision_inverse: Tensor, memory: Tensor, weights: Tensor, latents: Tensor
) -> str | None:
    if _workspace(precision_inverse, latents) < 0:
        return (
            "needs cooperative launches, and more shared memory than the device has for latents of "
            f"{memory.shape[-1]} entries"
        )
    return None


@functools.cache
def _warn_of_a_part_of_a_gpu() -> None:
    warnings.warn(
        "memory_stream: this part of the GPU (a green context or a MIG instance) has not room for all blocks "
        "at once; the torch reference serves there.",
        RuntimeWarning,
        stacklevel=3,
    )


@implements("memory_stream", "cuda", _declines_stream)
def memory_stream(
    precision_inverse: Tensor, memory: Tensor, weights: Tensor, latents: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = [tensor.contiguous() for tensor in (precision_inverse, memory, weights, latents)]
    outputs = (
        torch.empty_like(inputs[0]),
        torch.empty_like(inputs[1]),
        torch.empty_like(inputs[3]),
        inputs[2].new_empty(weights.shape[:-1]),
    )
    size = _workspace(precision_inverse, latents)
    workspace = torch.empty(size, dtype=torch.uint8, device=memory.device)
    with torch.cuda.device(memory.device):
        launched = _cuda.memory_stream(
            *(tensor.data_ptr() for tensor in inputs),
            *_shape(precision_inverse, latents),
            *(tensor.data_ptr() for tensor in outputs),
            workspace.data_ptr(),
            stream(memory),
        )
    if not launched:
        _warn_of_a_part_of_a_gpu()
        return reference.memory_stream(*inputs)
    return outputs
