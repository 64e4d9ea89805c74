"""Every operator once, one file a family: its schema, the checks of its arguments, its fake kernel.

Operators take tensors of canonical rank; `functional/` brings them there.
"""

from . import graft, memory, second_moment  # noqa: F401
from . import low_rank as low_rank
from .define import OPERATORS, compute_dtype, ops

__all__ = ["OPERATORS", "compute_dtype", "ops"]
