"""Operators that edit the weights and memories of language models."""

from . import backends as backends
from . import ops
from .backends import use_backend as use_backend
from .covariance import Covariance as Covariance
from .errors import EngramError as EngramError
from .ops import *  # noqa: F403

__all__ = ["Covariance", "EngramError", "backends", "use_backend", *ops.__all__]
