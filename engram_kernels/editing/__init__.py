"""Edit facts in Hugging Face language models by low-rank writes (ROME, EMMET, MEMIT, AlphaEdit)."""

from ..models.loading import load_model
from .dequantize import dequantize_layer
from .editor import Editor
from .experts import open_expert, routed_expert
from .result import EditResult
from .tokens import Edit
from .traces import Trace, average
from .values import ValueOptions

__all__ = [
    "Edit",
    "EditResult",
    "Editor",
    "Trace",
    "ValueOptions",
    "average",
    "dequantize_layer",
    "load_model",
    "open_expert",
    "routed_expert",
]
