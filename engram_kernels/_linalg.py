"""Factorisations that know which digits rounding has left."""

import torch
from torch import Tensor


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The type that products are accumulated in: fp64 for fp64 weights, fp32 for all others."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


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


def square_root(matrix: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return R with `R Rᵀ` the matrix [B, n, n], and whether it is positive semidefinite, [B].

    The Cholesky factor, or where there is none, as of a projection, a root by eigenvalues. The matrix's own
    entries are known to `eps`.
    """
    factor, lost = cholesky(matrix)
    if not bool(lost.any()) or not bool(matrix.isfinite().all()):
        return factor, lost == 0
    values, vectors = torch.linalg.eigh(matrix)
    rounding = matrix.shape[-1] * eps * values.abs().amax(-1)
    return vectors * values.clamp_min(0).sqrt().unsqueeze(-2), values.amin(-1) >= -rounding
