"""Edit facts in Hugging Face causal language models by rank-one writes (ROME, Meng et al. 2022, arXiv 2202.05262)."""

from engram_kernels.editing.editor import Editor
from engram_kernels.editing.models import load_model
from engram_kernels.editing.result import EditResult
from engram_kernels.editing.tokens import Edit

__all__ = ["Edit", "EditResult", "Editor", "load_model"]
