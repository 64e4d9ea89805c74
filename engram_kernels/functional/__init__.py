"""The public functions, one file a family.

They bring their arguments to canonical rank and type, and call the operators.
"""

from .graft import (
    graft_blend,
    graft_blend_all_,
    graft_blend_packed,
    graft_mask_step_,
    graft_top_k,
    pack_mask,
    sparse_apply_,
    top_k_mask,
    unpack_mask,
)
from .memory import (
    memory_accumulate_,
    memory_address,
    memory_forget_,
    memory_read,
    memory_solve,
    memory_stream,
    pseudo_inverse,
)
from .rank_one import apply_low_rank_, rank_one_factors, rank_one_update
from .second_moment import second_moment_

__all__ = [
    "apply_low_rank_",
    "graft_blend",
    "graft_blend_all_",
    "graft_blend_packed",
    "graft_mask_step_",
    "graft_top_k",
    "memory_accumulate_",
    "memory_address",
    "memory_forget_",
    "memory_read",
    "memory_solve",
    "memory_stream",
    "pack_mask",
    "pseudo_inverse",
    "rank_one_factors",
    "rank_one_update",
    "second_moment_",
    "sparse_apply_",
    "top_k_mask",
    "unpack_mask",
]
