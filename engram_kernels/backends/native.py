"""What the bindings of `_cpu` and `_cuda` share: type codes and weights as pointers."""

import importlib
from types import ModuleType

import torch
from torch import Tensor

# enum engram::DType
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def extension(name: str) -> tuple[ModuleType | None, str | None]:
    """Import an extension module; return it, or the reason why there is none."""
    try:
        return importlib.import_module(f"engram_kernels.{name}"), None
    except ModuleNotFoundError:
        return None, f"the extension module {name} is not built"
    except ImportError as error:
        return None, f"the extension module {name} does not load: {error}"


def no_nvidia_gpu() -> str | None:
    """Say why no GPU here can run the kernels, or None: they take NVIDIA's from compute capability 8.0."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return f"takes GPUs from compute capability 8.0, not {major}.{minor}" if major < 8 else None


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
