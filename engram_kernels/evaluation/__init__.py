"""What edits do to a model: data sets of facts, measures, runs that resume, and reports."""

from .datasets import Case, Neighbour, read_cases
from .outcomes import summarise
from .run import Evaluation

__all__ = ["Case", "Evaluation", "Neighbour", "read_cases", "summarise"]
