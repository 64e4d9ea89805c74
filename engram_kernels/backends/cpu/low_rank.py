"""The associative write on CPUs, in C++."""

import torch
from torch import Tensor

from ... import _cpu
from .. import implements
from ..native import decline_strided_columns, weight_arguments

_HALF = (torch.bfloat16, torch.float16)


def largest_rank(dtype: torch.dtype) -> int:
    """Return the rank up to which the C++ update beats the library's GEMM (bench/bench_low_rank.py)."""
    # Half-precision weights spare the conversion to fp32 and back; fp32 ones gain only while bound by memory.
    return 128 if dtype in _HALF else 32


def _declines_update(weight: Tensor, left: Tensor, right: Tensor, alpha: float) -> str | None:
    rank, limit = left.shape[-1], largest_rank(weight.dtype)
    if rank > limit:
        return f"leaves rank {rank} > {limit} to the library's GEMM"
    return decline_strided_columns(weight)


def _declines_residual(weight: Tensor, keys: Tensor, *args) -> str | None:
    if weight.dtype not in _HALF:
        return "leaves weights that need no conversion to the library's GEMM"
    if keys.shape[1] > 128:
        return f"leaves {keys.shape[1]} > 128 keys to the library's GEMM"
    return decline_strided_columns(weight)


@implements("apply_low_rank_", "cpu", _declines_update, looks=True)
def apply_low_rank_(
    weight: Tensor, left: Tensor, right: Tensor, alpha: float, look: bool = False
) -> bool | None:
    left, right = left.contiguous(), right.contiguous()
    sound = _cpu.apply_low_rank(
        *weight_arguments(weight),
        left.data_ptr(),
        right.data_ptr(),
        left.shape[-1],
        alpha,
        look,
        torch.get_num_threads(),
    )
    return not sound if look else None


@implements("residual_gram", "cpu", _declines_residual)
def residual_gram(
    weight: Tensor, keys: Tensor, values: Tensor, preconditioned: Tensor
) -> tuple[Tensor, Tensor]:
    keys, values, preconditioned = keys.contiguous(), values.contiguous(), preconditioned.contiguous()
    batch, count, _ = keys.shape
    residual = torch.empty_like(values)
    gram = preconditioned.new_empty(batch, count, count)
    _cpu.residual_gram(
        *weight_arguments(weight),
        keys.data_ptr(),
        values.data_ptr(),
        preconditioned.data_ptr(),
        count,
        residual.data_ptr(),
        gram.data_ptr(),
        torch.get_num_threads(),
    )
    return residual, gram
