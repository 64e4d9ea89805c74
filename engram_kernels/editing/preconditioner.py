"""What stands in the place of `C⁻¹` in a write: whitening that spares earlier edits, or a null space."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..covariance import Covariance
from ..errors import EngramError

# By covariance and threshold: the eigenvectors of a wide layer take minutes.
_PROJECTIONS: WeakKeyDictionary[Covariance, dict[float, Tensor]] = WeakKeyDictionary()


def preserving(inverse: Tensor, keys: Tensor, weight: float) -> Tensor:
    """`(C + w KᵀK)⁻¹` from `C⁻¹`: later writes move the answers to `K` little (Woodbury's identity).

        C⁻¹ − Pᵀ (I/w + P Kᵀ)⁻¹ P,   P = K C⁻¹

    Args:
        inverse: `C⁻¹ [in, in]`, float64; may be singular, such as a projection.
        keys: `K [n, in]`, the keys written before.
        weight: `w > 0`, how much each counts against a sample of the statistics.

    Returns:
        `[in, in]` float64, symmetric.
    """
    keys = keys.to(inverse)
    preconditioned = keys @ inverse
    system = preconditioned @ keys.T
    system = (system + system.T) / 2
    system.diagonal().add_(1.0 / weight)
    factor = torch.linalg.cholesky(system)
    half = torch.linalg.solve_triangular(factor, preconditioned, upper=False)
    return inverse - half.T @ half


def null_space(covariance: Covariance, threshold: float) -> Tensor:
    """The projection onto the directions that ordinary text hardly uses (AlphaEdit, Fang et al. 2024).

    Args:
        covariance: `C [in, in]`.
        threshold: eigenvalues of `C` up to this share of their mean count as none.

    Returns:
        `[in, in]` float64, symmetric and idempotent.

    Raises:
        EngramError: no direction is left, or all are.
    """
    known = _PROJECTIONS.setdefault(covariance, {})
    if threshold not in known:
        known[threshold] = _null_space(covariance.inverse(), threshold)
    return known[threshold]


def _null_space(inverse: Tensor, threshold: float) -> Tensor:
    values, vectors = torch.linalg.eigh(inverse)
    moments = values.reciprocal()
    kept = moments <= threshold * moments.mean()
    if not kept.any() or kept.all():
        raise EngramError(
            f"null_space: expected a threshold between {float(moments.min() / moments.mean()):.1e} and "
            f"{float(moments.max() / moments.mean()):.1e} of the mean eigenvalue, got {threshold:g}"
        )
    basis = vectors[:, kept]
    return basis @ basis.T
