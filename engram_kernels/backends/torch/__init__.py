"""The reference: plain PyTorch, the specification of every operator, on every device."""

from . import graft, memory, rank_one, second_moment  # noqa: F401

DEVICES = None  # every one


def unavailable() -> str | None:
    """Return None: the reference always runs."""
    return None
