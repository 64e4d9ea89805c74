"""CUDA C++ kernels, from the extension module `_cuda`."""

import torch

DEVICES = ("cuda",)

try:
    from ... import _cuda
except ImportError:
    _cuda, _missing = None, "the extension module _cuda is not built"
else:
    _missing = None
    from . import rank_one  # noqa: F401


def unavailable() -> str | None:
    """Say why the CUDA kernels cannot run, or None."""
    if _missing is not None:
        return _missing
    return None if torch.cuda.is_available() else "torch sees no CUDA device"
