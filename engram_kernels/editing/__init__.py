"""Edit facts in Hugging Face language models by rank-one writes (ROME, Meng et al. 2022, 2202.05262)."""

from ..models.loading import load_model
from .editor import Editor
from .result import EditResult
from .tokens import Edit
from .trace import Trace, average

__all__ = ["Edit", "EditResult", "Editor", "Trace", "average", "load_model"]
