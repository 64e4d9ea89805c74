"""Edit facts in Hugging Face language models by low-rank writes (ROME, EMMET, MEMIT, AlphaEdit)."""

from ..hf.dequantize import dequantize_layer
from ..hf.experts import open_expert
from ..hf.loading import load_model
from .edit import Edit
from .editor import Editor
from .result import EditResult
from .routing import routed_expert
from .values import ValueOptions

__all__ = [
    "Edit",
    "EditResult",
    "Editor",
    "ValueOptions",
    "dequantize_layer",
    "load_model",
    "open_expert",
    "routed_expert",
]
