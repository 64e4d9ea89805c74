"""Graft skills: find the few fine-tuned weights that carry one, and set them in the base model.

Panigrahi et al. 2023 (arXiv 2302.06600).
"""

from .applied import AppliedGraft
from .checkpoint import graft_checkpoint
from .density import Density
from .graft import Graft, Overlap
from .joining import METHODS, join_state_dicts, trim
from .localize import localize
from .mask import GraftMask
from .parameters import graftable_parameters
from .recipes import RECIPES, Recipe
from .scores import ClassificationScore, calibration_error, classification_score
from .switch import GraftSwitch
from .tasks import PromptTask

__all__ = [
    "METHODS",
    "RECIPES",
    "AppliedGraft",
    "ClassificationScore",
    "Density",
    "Graft",
    "GraftMask",
    "GraftSwitch",
    "Overlap",
    "PromptTask",
    "Recipe",
    "calibration_error",
    "classification_score",
    "graft_checkpoint",
    "graftable_parameters",
    "join_state_dicts",
    "localize",
    "trim",
]
