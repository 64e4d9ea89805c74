"""Causal tracing: which states of a model carry a fact (Meng et al. 2022, arXiv 2202.05262, section 2)."""

from .causal import KINDS, embedding_std, known, trace
from .plots import draw
from .result import AverageTrace, Trace, average, best_layer

__all__ = [
    "KINDS",
    "AverageTrace",
    "Trace",
    "average",
    "best_layer",
    "draw",
    "embedding_std",
    "known",
    "trace",
]
