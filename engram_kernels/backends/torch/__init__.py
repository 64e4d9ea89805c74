"""The reference: plain PyTorch, the specification of every operator, on every device."""

from . import diff, graft, linear_memory, memory, ridge, second_moment  # noqa: F401
from . import low_rank as low_rank

DEVICES = None  # every one


def unavailable() -> str | None:
    """Return None: the reference always runs."""
    return None
