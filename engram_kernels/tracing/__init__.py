"""Causal tracing: which states of a model carry a fact (Meng et al. 2022, arXiv 2202.05262, section 2)."""

from .result import AverageTrace, Trace, average
from .trace import trace

__all__ = ["AverageTrace", "Trace", "average", "trace"]
