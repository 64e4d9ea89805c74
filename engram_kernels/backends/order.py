"""Which backend is asked first: device × operator × size → backends, in order.

For GPUs the numbers are predictions for an H200 (docs/gpu-notes.md), not yet measured; 4096×14336 in bf16:

- `residual_gram`: CUDA 31 µs for one key and 62 for 16, so 2 more for each further; Triton 165: it fills too
  few warps. A GEMM of keys split in three bf16 parts about 35 whatever the keys are, up to some 32. fp32
  weights: the library's GEMM reads what CUDA reads.
- `apply_low_rank_`: CUDA 70 µs and Triton 76 for rank 16, both growing with the rank; bf16 parts of the
  factors in one GEMM about 60, and growing slower, on tensor cores.
- `memory_stream`: Triton holds a state in registers, 0.45 µs a write; CUDA spreads it over the GPU.
"""

import functools
from typing import NamedTuple

import torch

# Keys, or the rank of factors, above which the product is a GEMM, which is the library's.
GEMM_RANK = 32
# Keys beside a bf16 weight above which the GEMM of their bf16 parts is quicker than CUDA.
SPLIT_KEYS = 2
# fp16's exponents do not hold an fp32 factor's parts, and the library would convert the whole weight.
GEMM_RANK_HALF = 128
# Slots whose P fits the registers of a program in Triton.
STREAM_SLOTS = {torch.float32: 64, torch.float64: 32}

_DEFAULT = {"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")}


class Size(NamedTuple):
    """What the choice depends on.

    Attributes:
        count: keys or the rank of factors; slots of a memory.
        dtype: of the weight or the state.
    """

    count: int
    dtype: torch.dtype


# Where it depends on more than the operator: the count, of a call's arguments.
SIZED = {
    "apply_low_rank_": lambda weight, left, *rest: left.shape[-1],
    "residual_gram": lambda weight, keys, *rest: keys.shape[-2],
    "memory_stream": lambda precision_inverse, *rest: precision_inverse.shape[-1],
}


def size_of(operator: str, args: tuple) -> Size | None:
    """Return what the choice for a call depends on; None: on its operator alone."""
    count = SIZED.get(operator)
    return None if count is None else Size(count(*args), args[0].dtype)


@functools.cache
def order(operator: str, device: str, size: Size | None = None) -> tuple[str, ...]:
    """Return the backends in the order in which they are asked, the reference last.

    Native first: a backend that cannot run, or declines, is passed over. Without a size, the order of a small
    one.

    Args:
        operator: its name.
        device: the type of its tensors' device.
        size: of `size_of`.

    Example:
        >>> order("residual_gram", "cuda", Size(1, torch.bfloat16))
        ('cuda', 'torch')
    """
    if device != "cuda" or operator not in SIZED:
        return _DEFAULT.get(device, ("torch",))
    count, dtype = size or Size(1, torch.float32)
    if operator == "memory_stream":
        in_registers = count <= STREAM_SLOTS.get(dtype, 0)
        return ("triton", "cuda", "torch") if in_registers else ("cuda", "torch")
    if count > (GEMM_RANK_HALF if dtype == torch.float16 else GEMM_RANK):
        return ("torch",)
    if operator == "residual_gram" and dtype != torch.float16:
        return ("torch",) if dtype == torch.bfloat16 and count > SPLIT_KEYS else ("cuda", "torch")
    return ("cuda", "triton", "torch")
