"""Fused kernels for the engrams of language models: grafting, ROME and MEMIT, episodic memory."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from . import backends, ops
from .backends import use_backend
from .covariance import Covariance
from .errors import EngramError
from .ops import *  # noqa: F403

if TYPE_CHECKING:
    from . import editing as editing
    from . import evaluation as evaluation
    from . import grafting as grafting
    from . import hf as hf
    from . import integrations as integrations
    from . import larimar as larimar
    from . import memory as memory
    from . import tracing as tracing

__version__ = "0.1.0"

__all__ = ["Covariance", "EngramError", "backends", "use_backend"]
__all__ += ops.__all__

# Imported at first use: `ek.editing` needs no import of its own, and the operators need no transformers.
_LAZY = ("editing", "evaluation", "grafting", "hf", "integrations", "larimar", "memory", "tracing")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
