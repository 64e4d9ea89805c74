"""The associative write on CPUs, in C++."""

import torch
from torch import Tensor

from ... import _cpu
from .. import implements
from ..native import decline_strided_columns, weight_arguments

# Above this many keys or factors the products are GEMMs, and oneDNN's are faster (bench/bench_rank_one.py).
GEMM_RANK = 64


def _declines_update(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> str | None:
    if left.shape[-1] > GEMM_RANK:
        return f"leaves rank {left.shape[-1]} > {GEMM_RANK} to the library's GEMM"
    return decline_strided_columns(weight)


def _declines_residual(weight: Tensor, keys: Tensor, *args) -> str | None:
    if keys.shape[1] > GEMM_RANK:
        return f"leaves {keys.shape[1]} > {GEMM_RANK} keys to the library's GEMM"
    return decline_strided_columns(weight)


@implements("apply_low_rank_", "cpu", _declines_update)
def apply_low_rank_(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    left, right = left.contiguous(), right.contiguous()
    _cpu.apply_low_rank(
        *weight_arguments(weight),
        left.data_ptr(),
        right.data_ptr(),
        left.shape[-1],
        scale,
        torch.get_num_threads(),
    )


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
