"""What the bindings of `_cpu` and `_cuda` share: type codes, tensors and lists of them as pointers."""

import importlib
from collections.abc import Iterable
from itertools import repeat
from types import ModuleType

import torch
from torch import Tensor

# enum engram::DType
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def extension(name: str) -> tuple[ModuleType | None, str | None]:
    """Import an extension module; return it, or the reason why there is none."""
    try:
        return importlib.import_module(f"...{name}", __name__), None
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


def stream(tensor: Tensor) -> int:
    """Return the address of the CUDA stream that work on a tensor is launched on."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def decline_strided_columns(weight: Tensor, *args) -> str | None:
    """Say why the native kernels do not take a weight whose columns are not contiguous, or None."""
    if weight.shape[-1] > 1 and weight.stride(-1) != 1:
        return f"takes weights with contiguous columns, not stride {weight.stride(-1)}"
    return None


def matrices(weight: Tensor) -> tuple[int, ...]:
    """Return (batch, rows, cols, batch stride, row stride) of a weight [out, in] or [B, out, in]."""
    if weight.dim() == 2:
        return 1, *weight.shape, 0, weight.stride(0)
    return *weight.shape, weight.stride(0), weight.stride(1)


def weight_arguments(weight: Tensor) -> tuple[int, ...]:
    """Return its pointer and type code, and what `matrices` says of it."""
    return weight.data_ptr(), DTYPE_CODES[weight.dtype], *matrices(weight)


def _addresses(tensors: list[Tensor]) -> Iterable[int]:
    """Return where each tensor begins; an empty list stands for null pointers."""
    return map(Tensor.data_ptr, tensors) if tensors else repeat(0)


def graft_rows(pre: list[Tensor], out=(), ft=(), logits=(), base=(), gradient=()) -> list[tuple[int, ...]]:
    """Return one `engram::GraftTensor` for each tensor; an empty list stands for null pointers."""
    pointers = map(_addresses, (out, pre, ft, logits, base, gradient))
    return list(
        zip(*pointers, map(Tensor.numel, pre), (DTYPE_CODES[tensor.dtype] for tensor in pre), strict=False)
    )


def sparse_rows(
    weights: list[Tensor], indices: list[Tensor], values=(), overwritten=()
) -> list[tuple[int, ...]]:
    """Return one `engram::SparseTensor` for each weight; an empty list stands for null pointers."""
    pointers = map(_addresses, (weights, indices, values, overwritten))
    sizes = map(Tensor.numel, indices), map(Tensor.numel, weights), map(Tensor.element_size, weights)
    return list(zip(*pointers, *sizes, strict=False))
