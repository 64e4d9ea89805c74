"""What edits do to a model: data sets of facts, measures, runs that resume, and reports."""

from .cases import Case, Question
from .datasets import read_cases
from .outcomes import summarise
from .run import Evaluation

__all__ = ["Case", "Evaluation", "Question", "read_cases", "summarise"]
