"""What the bindings of `_cpu` and `_cuda` share: type codes and weights as pointers."""

import torch
from torch import Tensor

# enum engram::DType
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def decline_strided_columns(weight: Tensor, *args) -> str | None:
    """Say why the native kernels do not take a weight whose columns are not contiguous, or None."""
    if weight.shape[-1] > 1 and weight.stride(-1) != 1:
        return f"takes weights with contiguous columns, not stride {weight.stride(-1)}"
    return None


def weight_arguments(weight: Tensor) -> tuple[int, ...]:
    """Return (pointer, type code, batch, rows, cols, batch stride, row stride) of a weight [B, out, in]."""
    batch, rows, columns = weight.shape
    return (
        weight.data_ptr(),
        DTYPE_CODES[weight.dtype],
        batch,
        rows,
        columns,
        weight.stride(0),
        weight.stride(1),
    )
