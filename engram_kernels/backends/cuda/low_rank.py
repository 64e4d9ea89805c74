"""The associative write on NVIDIA GPUs, in CUDA C++."""

import torch
from torch import Tensor

from ... import _cuda
from ..native import decline_strided_columns, stream, weight_arguments
from ..order import GEMM_RANK
from .device import implements

# enum engram::SystemKind
_KINDS = {"cholesky": 0, "unit_lower": 1, "unit_upper": 2}


def _declines_update(weight: Tensor, left: Tensor, right: Tensor, alpha: float) -> str | None:
    if left.shape[-1] > GEMM_RANK:
        return f"leaves rank {left.shape[-1]} > {GEMM_RANK} to the library's GEMM"
    return decline_strided_columns(weight)


def _declines_residual(weight: Tensor, keys: Tensor, *args) -> str | None:
    if keys.shape[1] > GEMM_RANK:
        return f"leaves {keys.shape[1]} > {GEMM_RANK} keys to the library's GEMM"
    return decline_strided_columns(weight)


def _declines_solve(system: Tensor, right_hand_side: Tensor, kind: str) -> str | None:
    limit = _cuda.small_solve_limit()
    return (
        f"leaves systems of order {system.shape[-1]} > {limit} to the library"
        if system.shape[-1] > limit
        else None
    )


@implements("apply_low_rank_", "cuda", _declines_update, looks=True)
def apply_low_rank_(
    weight: Tensor, left: Tensor, right: Tensor, alpha: float, look: bool = False
) -> Tensor | None:
    left, right = left.contiguous(), right.contiguous()
    refused = torch.empty((), dtype=torch.int32, device=weight.device) if look else None
    with torch.cuda.device(weight.device):
        _cuda.apply_low_rank(
            *weight_arguments(weight),
            left.data_ptr(),
            right.data_ptr(),
            left.shape[-1],
            alpha,
            refused.data_ptr() if look else 0,
            stream(weight),
        )
    return refused


@implements("residual_gram", "cuda", _declines_residual)
def residual_gram(
    weight: Tensor, keys: Tensor, values: Tensor, preconditioned: Tensor
) -> tuple[Tensor, Tensor]:
    keys, values, preconditioned = keys.contiguous(), values.contiguous(), preconditioned.contiguous()
    batch, count, _ = keys.shape
    residual = torch.empty_like(values)
    gram = preconditioned.new_empty(batch, count, count)
    with torch.cuda.device(weight.device):
        _cuda.residual_gram(
            *weight_arguments(weight),
            keys.data_ptr(),
            values.data_ptr(),
            preconditioned.data_ptr(),
            count,
            residual.data_ptr(),
            gram.data_ptr(),
            stream(weight),
        )
    return residual, gram


@implements("small_solve", "cuda", _declines_solve)
def small_solve(system: Tensor, right_hand_side: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    system, right_hand_side = system.contiguous(), right_hand_side.contiguous()
    batch, count, columns = right_hand_side.shape
    solution = torch.empty_like(right_hand_side)
    info = torch.empty(batch, dtype=torch.int32, device=system.device)
    with torch.cuda.device(system.device):
        _cuda.small_solve(
            system.data_ptr(),
            right_hand_side.data_ptr(),
            right_hand_side.dtype == torch.float64,
            _KINDS[kind],
            batch,
            count,
            columns,
            solution.data_ptr(),
            info.data_ptr(),
            stream(system),
        )
    return solution, info
