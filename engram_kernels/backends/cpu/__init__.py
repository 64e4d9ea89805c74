"""C++ kernels for CPUs: OpenMP, AVX2 and AVX-512, from the extension module `_cpu`."""

DEVICES = ("cpu",)

try:
    from ... import _cpu
except ImportError:
    _cpu, _reason = None, "the extension module _cpu is not built"
else:
    _reason = None
    from . import rank_one  # noqa: F401


def unavailable() -> str | None:
    """Say why the C++ kernels cannot run, or None."""
    return _reason
