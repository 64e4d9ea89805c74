"""Which GPUs `_cuda` serves: it has machine code for some, and PTX that a driver may be too old for."""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ... import _cuda, backends


@functools.cache
def unusable(device: int) -> str | None:
    """Say why no kernel of the module runs on a GPU, or None; the first time as a warning too."""
    with torch.cuda.device(device):
        error = _cuda.probe()
    if error is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    built = ", ".join(f"sm_{arch}" for arch in _cuda.build_info()["archs"].split())
    reason = (
        f"the module _cuda, built for {built}, runs no kernel on cuda:{device}, sm_{major}{minor}: {error}"
    )
    warnings.warn(
        f"{reason}. Other backends serve there; ENGRAM_CUDA_ARCHS={major}{minor} builds the module for it.",
        RuntimeWarning,
        stacklevel=2,
    )
    return reason


def implements(
    operator: str,
    backend: str,
    declines: Callable[..., str | None] = lambda *args: None,
    looks: bool = False,
) -> Callable:
    """Register the decorated function as `backends.implements` does, for the GPUs that the module serves."""

    def declines_there(*args) -> str | None:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        return unusable(first.get_device()) or declines(*args)

    return backends.implements(operator, backend, declines_there, looks)
