"""CUDA C++ kernels, from the extension module `_cuda`."""

from ..native import extension, no_nvidia_gpu

DEVICES = ("cuda",)

_module, _missing = extension("_cuda")
if _module is not None:
    from . import graft, memory  # noqa: F401
    from . import low_rank as low_rank


def unavailable() -> str | None:
    """Say why the CUDA kernels cannot run, or None."""
    return _missing or no_nvidia_gpu() or _runtime_error()


def _runtime_error() -> str | None:
    """Say why the CUDA runtime that is built into the module cannot run where torch's can, or None."""
    if error := _module.runtime_error():
        return f"the CUDA {_module.build_info()['cuda']} of the module _cuda cannot run here: {error}"
    return None
