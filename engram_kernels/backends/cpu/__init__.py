"""C++ kernels for CPUs: AVX2 and AVX-512, on torch's threads, from the extension module `_cpu`."""

from .. import PROCESS
from ..native import extension

DEVICES = ("cpu",)

_module, _reason = extension("_cpu")
if _module is not None:
    _module.set_process(PROCESS)
    from . import diff, graft, memory, ridge  # noqa: F401
    from . import low_rank as low_rank


def unavailable() -> str | None:
    """Say why the C++ kernels cannot run, or None."""
    return _reason
