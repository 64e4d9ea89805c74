"""Fused kernels for the engrams of language models: grafting, ROME and MEMIT, episodic memory."""

from . import backends, integrations
from .backends import use_backend
from .covariance import Covariance
from .errors import EngramError
from .ops import (
    _foreach_graft_blend_,
    apply_low_rank_,
    graft_blend,
    graft_blend_packed,
    graft_mask_step_,
    graft_top_k,
    low_rank_factors,
    low_rank_update,
    memory_accumulate_,
    memory_address,
    memory_forget_,
    memory_read,
    memory_solve,
    memory_stream,
    pack_mask,
    pseudo_inverse,
    second_moment_,
    sparse_apply_,
    top_k_mask,
    unpack_mask,
)

__version__ = "0.1.0"

__all__ = [
    "Covariance",
    "EngramError",
    "_foreach_graft_blend_",
    "apply_low_rank_",
    "backends",
    "graft_blend",
    "graft_blend_packed",
    "graft_mask_step_",
    "graft_top_k",
    "integrations",
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
    "use_backend",
]
