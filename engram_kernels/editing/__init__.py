"""Edit facts in Hugging Face language models by low-rank writes (ROME, MEMIT, AlphaEdit and their kin)."""

from ..hf.dequantize import dequantize_layer
from ..hf.experts import open_expert
from ..hf.loading import load_model
from .checkpoint import edit_checkpoint
from .edit import Edit
from .editor import Editor
from .gradients import GradientOptions
from .health import Health
from .methods import METHODS, Method
from .npz import load_npz, save_npz
from .records import EditRecord, SkippedEdit
from .result import EditResult
from .routing import routed_expert
from .store import EditStore, StoredEdit
from .values import ValueOptions

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
