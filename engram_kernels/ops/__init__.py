"""The public functions: of each family in one file the schema, the check, the fake kernel, the gradient.

A family's `__all__` is what it gives to the package.
"""

from typing import TYPE_CHECKING

from .graft import *  # noqa: F403
from .graft_diff import *  # noqa: F403
from .graft_masks import *  # noqa: F403
from .graft_sparse import *  # noqa: F403
from .linear_memory import *  # noqa: F403
from .low_rank import *  # noqa: F403
from .memory import *  # noqa: F403
from .memory_inverse import *  # noqa: F403
from .memory_streaming import *  # noqa: F403
from .plans import *  # noqa: F403
from .ridge import *  # noqa: F403
from .second_moment import *  # noqa: F403
from .waiting import *  # noqa: F403

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
