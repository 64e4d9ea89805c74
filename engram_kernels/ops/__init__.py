"""The public functions: of each family in one file the schema, the check, the fake kernel, the gradient.

A family's `__all__` is what it gives to the package.
"""

from typing import TYPE_CHECKING

from .graft import *
from .graft_diff import *
from .graft_masks import *
from .graft_sparse import *
from .linear_memory import *
from .low_rank import *
from .memory import *
from .memory_inverse import *
from .memory_streaming import *
from .plans import *
from .ridge import *
from .second_moment import *
from .waiting import *

# Type checkers take the stars above as what this exports; a computed list would hide it all from mypy.
if not TYPE_CHECKING:
    from . import (
        graft,
        graft_diff,
        graft_masks,
        graft_sparse,
        linear_memory,
        low_rank,
        memory,
        memory_inverse,
        memory_streaming,
        plans,
        ridge,
        second_moment,
        waiting,
    )

    __all__ = [
        *graft.__all__,
        *graft_diff.__all__,
        *graft_masks.__all__,
        *graft_sparse.__all__,
        *linear_memory.__all__,
        *low_rank.__all__,
        *memory.__all__,
        *memory_streaming.__all__,
        *memory_inverse.__all__,
        *plans.__all__,
        *ridge.__all__,
        *second_moment.__all__,
        *waiting.__all__,
    ]
