"""Reference of the associative write: residual and Gram matrix, small systems, low-rank update."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..._ops.define import ops
from .. import implements

# Elements of a half-precision weight converted at a time: a panel stays near the cache, the weight is never
# held in fp32 as a whole.
_PANEL = 1 << 20


def _panels(weight: Tensor) -> Iterator[slice]:
    # At least this many rows: every panel reads the other factor again.
    rows = max(256, _PANEL // max(1, weight.shape[-1]))
    for start in range(0, weight.shape[-2], rows):
        yield slice(start, start + rows)


@implements("residual_gram", "torch")
def residual_gram(
    weight: Tensor, keys: Tensor, values: Tensor, preconditioned: Tensor
) -> tuple[Tensor, Tensor]:
    """E = V − K Wᵀ and G = K Pᵀ."""
    if weight.dtype == keys.dtype:
        residual = torch.baddbmm(values, keys, weight.mT, alpha=-1)
    else:
        residual = torch.empty_like(values, memory_format=torch.contiguous_format)
        for rows in _panels(weight):
            panel = weight[:, rows].to(keys.dtype)
            residual[:, :, rows] = torch.baddbmm(values[:, :, rows], keys, panel.mT, alpha=-1)
    return residual, keys.double() @ preconditioned.mT


@implements("small_solve", "torch")
def small_solve(system: Tensor, right_hand_side: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """X = A⁻¹ Y in fp64; `info` is the order of the first pivot lost to rounding, 0 where there is none."""
    wide = right_hand_side.double()
    if kind == "cholesky":
        factor, info = cholesky(system)
        solution = torch.cholesky_solve(wide, factor)
    else:
        info = torch.zeros(system.shape[0], dtype=torch.int32, device=system.device)
        solution = torch.linalg.solve_triangular(system, wide, upper=kind == "unit_upper", unitriangular=True)
    return solution.to(right_hand_side.dtype).contiguous(), info


def cholesky(matrix: Tensor, eps: float = torch.finfo(torch.float64).eps) -> tuple[Tensor, Tensor]:
    """Return the factor [B, n, n], and the order of the first pivot that is not above rounding, or 0, [B].

    A factorisation of a singular matrix need not fail: rounding can leave a tiny positive pivot, and a
    solution of noise. A pivot under `n · eps` of the entry it came from carries no digit of the matrix, whose
    own entries are known to `eps`.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    entries = matrix.diagonal(dim1=-2, dim2=-1)
    count = matrix.shape[-1]
    lost = ~(pivots > count * eps * entries)  # NaN counts as lost
    order = torch.arange(1, count + 1, device=matrix.device)
    first = torch.where(lost, order, count + 1)
    if count == 0:
        return factor, failed
    first = first.amin(-1)
    return factor, torch.where(failed > 0, failed, torch.where(first > count, 0, first)).to(torch.int32)


@implements("apply_low_rank_", "torch")
def apply_low_rank_(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """W += scale · L R, accumulated in the factors' type and rounded once."""
    with torch.no_grad():
        if weight.dtype == left.dtype:
            weight.baddbmm_(left, right, alpha=scale)
            return
        for rows in _panels(weight):
            panel = weight[:, rows].to(left.dtype)
            weight[:, rows] = panel.baddbmm_(left[:, rows], right, alpha=scale).to(weight.dtype)


@implements("low_rank_update", "torch")
def low_rank_update(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """The same out of place: a copy, and the fastest in-place kernel there is for it."""
    updated = weight.detach().clone(memory_format=torch.contiguous_format)
    ops.apply_low_rank_(updated, left.detach(), right.detach(), scale)
    return updated
