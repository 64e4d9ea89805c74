"""Graft skills: find the few fine-tuned weights that carry one, and set them in the base model.

Panigrahi et al. 2023 (arXiv 2302.06600).
"""

from .applied import AppliedGraft, GraftSwitch
from .graft import Density, Graft, Overlap
from .localize import localize
from .mask import GraftMask
from .parameters import graftable_parameters
from .recipes import RECIPES, Recipe
from .tasks import Evaluation, PromptTask, calibration_error, evaluate

__all__ = [
    "RECIPES",
    "AppliedGraft",
    "Density",
    "Evaluation",
    "Graft",
    "GraftMask",
    "GraftSwitch",
    "Overlap",
    "PromptTask",
    "Recipe",
    "calibration_error",
    "evaluate",
    "graftable_parameters",
    "localize",
]
