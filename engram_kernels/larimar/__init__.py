"""Larimar: a language model that is conditioned on what it reads from an episodic memory.

Das et al. 2024 (arXiv 2403.11901).
"""

from typing import TYPE_CHECKING

from .answering import Answer, Answerer
from .episodes import EpisodeCollator, Fact, FactEpisodes
from .long_context import read_recursively
from .objective import Objective
from .scope import ScopeDetector, key_scores, stored_keys
from .scoped_model import ScopedModel
from .token_values import ReadAloud, TokenValues, row_weights
from .warm_start import warm_start

if TYPE_CHECKING:
    from .config import LarimarConfig
    from .model import LarimarModel

__all__ = [
    "Answer",
    "Answerer",
    "EpisodeCollator",
    "Fact",
    "FactEpisodes",
    "LarimarConfig",
    "LarimarModel",
    "Objective",
    "ReadAloud",
    "ScopeDetector",
    "ScopedModel",
    "TokenValues",
    "key_scores",
    "read_recursively",
    "row_weights",
    "stored_keys",
    "warm_start",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    # The model's classes are transformers' own, which everything else here does without.
    if name in ("LarimarConfig", "LarimarModel"):
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
