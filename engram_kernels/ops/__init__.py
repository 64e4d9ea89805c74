"""The public functions, one file a family.

They bring their arguments to canonical rank and type, and call the operators.
"""

from .graft import (
    _foreach_graft_blend_,
    graft_blend,
    graft_blend_packed,
    graft_mask_step_,
    graft_top_k,
    pack_mask,
    sparse_apply_,
    top_k_mask,
    unpack_mask,
)
from .low_rank import apply_low_rank_, low_rank_factors, low_rank_update
from .memory import (
    memory_accumulate_,
    memory_address,
    memory_forget_,
    memory_read,
    memory_solve,
    memory_stream,
    pseudo_inverse,
)
from .second_moment import second_moment_

__all__ = [
    "_foreach_graft_blend_",
    "apply_low_rank_",
    "graft_blend",
    "graft_blend_packed",
    "graft_mask_step_",
    "graft_top_k",
    "low_rank_factors",
    "low_rank_update",
    "memory_accumulate_",
    "memory_address",
    "memory_forget_",
    "memory_read",
    "memory_solve",
    "memory_stream",
    "pack_mask",
    "pseudo_inverse",
    "second_moment_",
    "sparse_apply_",
    "top_k_mask",
    "unpack_mask",
]
