"""Larimar: a language model that is conditioned on what it reads from an episodic memory.

Das et al. 2024 (arXiv 2403.11901).
"""

from .long_context import read_recursively
from .scope import ScopeDetector, ScopedModel

__all__ = ["LarimarConfig", "LarimarModel", "ScopeDetector", "ScopedModel", "read_recursively"]


def __getattr__(name: str):
    # The model's classes are transformers' own, which everything else here does without.
    if name in ("LarimarConfig", "LarimarModel"):
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
