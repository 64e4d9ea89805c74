"""Edit facts in Hugging Face language models by low-rank writes (ROME, MEMIT, AlphaEdit and their kin)."""

from ..hf.dequantize import dequantize_layer
from ..hf.experts import open_expert
from ..hf.loading import load_model
from .edit import Edit
from .editor import Editor
from .health import Health
from .methods import METHODS, Method
from .routing import routed_expert
from .saving.checkpoint import edit_checkpoint
from .saving.result import EditResult
from .search.gradients import GradientOptions
from .search.values import ValueOptions
from .statistics.npz import load_npz, save_npz
from .store.store import EditStore, StoredEdit
from .writing.records import EditRecord, SkippedEdit

__all__ = [
    "METHODS",
    "Edit",
    "EditRecord",
    "EditResult",
    "EditStore",
    "Editor",
    "GradientOptions",
    "Health",
    "Method",
    "SkippedEdit",
    "StoredEdit",
    "ValueOptions",
    "dequantize_layer",
    "edit_checkpoint",
    "load_model",
    "load_npz",
    "open_expert",
    "routed_expert",
    "save_npz",
]
