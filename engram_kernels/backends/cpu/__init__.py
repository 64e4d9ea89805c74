"""C++ kernels for CPUs: OpenMP, AVX2 and AVX-512, from the extension module `_cpu`."""

from ..native import extension

DEVICES = ("cpu",)

_module, _reason = extension("_cpu")
if _module is not None:
    from . import graft, memory, rank_one  # noqa: F401


def unavailable() -> str | None:
    """Say why the C++ kernels cannot run, or None."""
    return _reason
