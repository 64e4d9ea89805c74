"""C++ kernels for CPUs: OpenMP, AVX2 and AVX-512, from the extension module `_cpu`."""

from ..native import extension

DEVICES = ("cpu",)

_module, _reason = extension("_cpu")
if _module is not None:
    from . import diff, graft, memory, ridge  # noqa: F401
    from . import low_rank as low_rank


def unavailable() -> str | None:
    """Say why the C++ kernels cannot run, or None."""
    return _reason
