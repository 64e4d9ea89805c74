"""Triton kernels: no compiler at install."""

import importlib.util

from ..native import no_nvidia_gpu

DEVICES = ("cuda",)


def _load() -> str | None:
    """Import the kernels where they can run, for Triton takes long to import; else return the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if reason := no_nvidia_gpu():
        return reason
    try:
        from . import diff, graft, memory, ridge  # noqa: F401
        from . import low_rank as low_rank
    except ImportError as error:
        return f"triton does not load: {error}"
    return None


_reason = _load()


def unavailable() -> str | None:
    """Say why the Triton kernels cannot run, or None."""
    return _reason
