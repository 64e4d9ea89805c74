"""Reference of the associative write: residual and Gram matrix, small systems, low-rank update."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..._linalg import cholesky, damped_root, square_root
from .. import implements, select
from . import split

# Elements of a weight or an inverse converted at a time: a panel stays near the cache, and no matrix is held
# in the wider type as a whole.
_PANEL = 1 << 20


def _panels(weight: Tensor) -> Iterator[slice]:
    # At least this many rows: every panel reads the other factor again.
    rows = max(256, _PANEL // max(1, weight.shape[-1]))
    for start in range(0, weight.shape[-2], rows):
        yield slice(start, start + rows)


def _splits(weight: Tensor, factor: Tensor) -> bool:
    """Whether a bf16 weight meets the parts of an fp32 factor: on GPUs, which have tensor cores for them."""
    return weight.is_cuda and weight.dtype == torch.bfloat16 and factor.dtype == torch.float32


@implements("precondition", "torch")
def precondition(keys: Tensor, inverse: Tensor) -> Tensor:
    """P = K Q in fp64, without a copy of Q in fp64."""
    wide = keys.double()
    product = torch.zeros_like(wide)
    for rows in _panels(inverse):
        product += wide[..., rows] @ inverse[..., rows, :].double()
    return product


@implements("residual_gram", "torch")
def residual_gram(
    weight: Tensor, keys: Tensor, values: Tensor, preconditioned: Tensor
) -> tuple[Tensor, Tensor]:
    """E = V − K Wᵀ and G = K Pᵀ."""
    return _residual(weight, keys, values), keys.double() @ preconditioned.mT


def _residual(weight: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    if weight.dtype == keys.dtype:
        return torch.baddbmm(values, keys, weight.mT, alpha=-1)
    if _splits(weight, keys):
        return split.residual(weight, keys, values)
    residual = torch.empty_like(values, memory_format=torch.contiguous_format)
    for rows in _panels(weight):
        panel = weight[:, rows].to(keys.dtype)
        residual[:, :, rows] = torch.baddbmm(values[:, :, rows], keys, panel.mT, alpha=-1)
    return residual


@implements("residual_ridge", "torch")
def residual_ridge(
    weight: Tensor, keys: Tensor, values: Tensor, inverse: Tensor, ridge: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E, R = K (λC + KᵀK)⁻¹ and H with HᵀH = (λC + KᵀK)⁻¹, all from C⁻¹.

    `info` is −1 where C⁻¹ is not positive semidefinite, else the order of the first pivot lost, or 0.
    """
    root, sound = square_root(inverse.double(), torch.finfo(inverse.dtype).eps)
    half, lost = damped_root(keys, root, ridge)
    info = torch.where(sound, lost, -1).to(torch.int32)
    return _residual(weight, keys, values), keys.double() @ (half.mT @ half), half, info


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


@implements("apply_low_rank_", "torch")
def apply_low_rank_(weight: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """W += alpha · L R, accumulated in the factors' type and rounded once."""
    with torch.no_grad():
        if weight.dtype == left.dtype:
            if weight.dim() == 3 and len(weight) == 1:  # a GEMM as such is faster than a batch of one
                weight, left, right = weight[0], left[0], right[0]
            (weight.addmm_ if weight.dim() == 2 else weight.baddbmm_)(left, right, alpha=alpha)
            return
        if weight.dim() == 2:
            weight, left, right = weight.unsqueeze(0), left.unsqueeze(0), right.unsqueeze(0)
        if _splits(weight, left):
            split.add_(weight, left, right, alpha)
            return
        for rows in _panels(weight):
            panel = weight[:, rows].to(left.dtype)
            weight[:, rows] = panel.baddbmm_(left[:, rows], right, alpha=alpha).to(weight.dtype)


@implements("low_rank_update", "torch")
def low_rank_update(weight: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """The same out of place: a copy, and the fastest in-place kernel there is for it."""
    updated = weight.detach().clone(memory_format=torch.contiguous_format)
    arguments = updated, left.detach(), right.detach(), alpha
    select("apply_low_rank_", weight.device.type, arguments).function(*arguments)
    return updated
