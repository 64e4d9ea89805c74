"""Fused kernels for the engrams of language models: grafting, ROME and MEMIT, episodic memory."""

from .backends import backends, use_backend
from .covariance import Covariance
from .errors import EngramError
from .functional import apply_low_rank_, rank_one_factors, rank_one_update, second_moment_

__version__ = "0.1.0"

__all__ = [
    "Covariance",
    "EngramError",
    "apply_low_rank_",
    "backends",
    "rank_one_factors",
    "rank_one_update",
    "second_moment_",
    "use_backend",
]
