"""Fused kernels for the engrams of language models: grafting, ROME and MEMIT, episodic memory."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from . import ops
from .backends import use_backend as use_backend
from .covariance import Covariance as Covariance
from .errors import EngramError as EngramError
from .ops import *
from .preconditioner import Preconditioner as Preconditioner

if TYPE_CHECKING:
    from . import editing as editing
    from . import evaluation as evaluation
    from . import grafting as grafting
    from . import hf as hf
    from . import integrations as integrations
    from . import larimar as larimar
    from . import layers as layers
    from . import memory as memory
    from . import tracing as tracing

    def backends() -> dict[str, str | None]: ...

else:
    from . import backends

    __all__ = ["Covariance", "EngramError", "Preconditioner", "backends", "use_backend", *ops.__all__]

    def __getattr__(name: str) -> ModuleType:
        """Import a system at its first use: the operators need no transformers."""
        if name in _SYSTEMS:
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """The public names: no imports of this file, and the systems before their first use."""
        own = (name for name in globals() if name.startswith("__"))
        return sorted({*own, *__all__, *_SYSTEMS, "ops"})


__version__ = "0.1.0"

_SYSTEMS = (
    "editing",
    "evaluation",
    "grafting",
    "hf",
    "integrations",
    "larimar",
    "layers",
    "memory",
    "tracing",
)
