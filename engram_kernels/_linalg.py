"""Factorisations that know which digits rounding has left."""

import torch
from torch import Tensor

# Keys that are widened to fp64 at a time, and columns of a triangular factor.
_ROWS, _COLUMNS = 4096, 512


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


def damped_root(keys: Tensor, root: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return H [B, in, in] with `HᵀH = (λQ⁻¹ + KᵀK)⁻¹`, and the order of the first pivot lost, or 0.

    `Q = L Lᵀ` is given by its root L: `H = F⁻¹Lᵀ` with `F Fᵀ = λI + (KL)ᵀKL`. This form does without `Q⁻¹`,
    lets Q be singular, and factors a matrix of the condition of `λI + K Q Kᵀ`. Keys are widened a panel at a
    time.
    """
    width = root.shape[-1]
    system = root.new_zeros(*keys.shape[:-2], width, width)
    # A Cholesky factor begins on its diagonal, and of the system one half is read: by blocks, half the work.
    lower = width > _COLUMNS and not bool(root.triu(1).any())
    for panel in keys.split(_ROWS, dim=-2):
        panel = panel.double()
        whitened = torch.empty_like(panel)
        for start in range(0, width, _COLUMNS):
            block = slice(start, start + _COLUMNS)
            begin = start if lower else 0
            torch.matmul(panel[..., begin:], root[..., begin:, block], out=whitened[..., block])
        for start in range(0, width, _COLUMNS):
            block = slice(start, start + _COLUMNS)
            system[..., start:, block] += whitened[..., start:].mT @ whitened[..., block]
    system.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, lost = cholesky(system)
    return torch.linalg.solve_triangular(factor, root.mT, upper=False).contiguous(), lost
