"""Episodic memory: write, read and forget latents in one least-squares step.

Das et al. 2024 (arXiv 2403.11901); the memory: Pham et al. 2022.
"""

from .encoder import SentenceEncoder, load_encoder
from .episodic import EpisodicMemory
from .long_context import read_recursively
from .scope import ScopeDetector, ScopedModel

__all__ = [
    "EpisodicMemory",
    "LarimarConfig",
    "LarimarModel",
    "ScopeDetector",
    "ScopedModel",
    "SentenceEncoder",
    "load_encoder",
    "read_recursively",
]


def __getattr__(name: str):
    # The model's classes are transformers' own, which everything else here does without.
    if name in ("LarimarConfig", "LarimarModel"):
        from ..models.loading import import_transformers

        import_transformers()
        from . import larimar

        return getattr(larimar, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
