"""Edit facts in Hugging Face language models by low-rank writes (ROME, EMMET, MEMIT, AlphaEdit)."""

from ..models.loading import load_model
from .editor import Editor
from .result import EditResult
from .tokens import Edit
from .trace import Trace, average

__all__ = ["Edit", "EditResult", "Editor", "Trace", "average", "load_model"]
