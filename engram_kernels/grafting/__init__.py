"""Graft skills: find the few fine-tuned weights that carry one, and set them in the base model.

Panigrahi et al. 2023 (arXiv 2302.06600).
"""

from .applied import AppliedGraft
from .checkpoint import graft_checkpoint
from .density import Density
from .graft import Graft, Overlap
from .interchange import (
    WeightPatch,
    from_patches,
    read_slime,
    read_trl,
    save_shira,
    save_slime,
    save_trl,
    weight_patches,
)
from .joining import METHODS, join_state_dicts, trim
from .localize import localize
from .mask import GraftMask
from .parameters import graftable_parameters
from .recipes import RECIPES, Recipe
from .scores import ClassificationScore, calibration_error, classification_score
from .shards import shard_entries, shard_graft
from .stream import Delta, DeltaReader, DeltaWriter
from .switch import GraftSwitch
from .tasks import PromptTask

__all__ = [
    "METHODS",
    "RECIPES",
    "AppliedGraft",
    "ClassificationScore",
    "Delta",
    "DeltaReader",
    "DeltaWriter",
    "Density",
    "Graft",
    "GraftMask",
    "GraftSwitch",
    "Overlap",
    "PromptTask",
    "Recipe",
    "WeightPatch",
    "calibration_error",
    "classification_score",
    "from_patches",
    "graft_checkpoint",
    "graftable_parameters",
    "join_state_dicts",
    "localize",
    "read_slime",
    "read_trl",
    "save_shira",
    "save_slime",
    "save_trl",
    "shard_entries",
    "shard_graft",
    "trim",
    "weight_patches",
]
