"""The memory that solves a state, and its pseudo-inverse with the rounding cut off."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import EngramError
from ..ops import memory_solve, pseudo_inverse
from ..ops.waiting import raises_at_once

# Steps of power iteration: ‖M‖₂ is wanted to some ten percent.
_POWER_STEPS = 8


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Compute in the tensor's own dtype, inside the caller's autocast too."""
    return torch.autocast(tensor.device.type, enabled=False)


@raises_at_once
def solve(precision: Tensor, right: Tensor, ridges: Tensor) -> Tensor:
    """Return (A + λI)⁻¹ R for each memory.

    Args:
        precision: A + λI, [batch, K, K], fp64 or fp32.
        right: R, [batch, K, m].
        ridges: λ, for the error's text.

    Raises:
        EngramError: a ridge that is lost in the rounding of A.
    """
    try:
        return memory_solve(precision, right)
    except EngramError as error:
        slots = precision.shape[-1]
        trace = float(precision.diagonal(dim1=-2, dim2=-1).sum(-1).max())
        least = slots * torch.finfo(precision.dtype).eps * trace
        raise EngramError(
            f"ridge: expected one that shows beside the state, such as {least:.1g} or more, got "
            f"{float(ridges.min()):.1g}, with which its solution would be rounding"
        ) from error


def cut_inverse(matrix: Tensor, energy: Tensor, ridges: Tensor) -> Tensor:
    """Return M⁺ with singular values σ inverted as σ / (σ² + c²).

        c = max(ε (a ‖M‖₂ + (a b)^½) / (λ K^½),  (8 K ε₆₄)^½ ‖M‖_F)

    A and B carry rounding of ε a and ε (a b)^½ in all, spread over K directions, and it comes out of the
    solution up to 1/λ larger. The first term estimates its largest singular value; measured, it lies five to
    twenty times above it. What lies under the second one the squares of singular values in fp64 cannot
    resolve. Without the cut-off the reading `z M⁺ M` would take rounding for content.

    Args:
        matrix: M, [batch, K, C], fp64 or fp32.
        energy: a = Σ ‖w‖² and b = Σ ‖z‖² over all rows ever written, [batch, 2].
        ridges: λ, [batch].

    Returns:
        [batch, C, K] in M's dtype; zero for a memory that is zero.
    """
    slots, norm = matrix.shape[-2], _norm(matrix)
    weights, values = energy.unbind(-1)
    spread = torch.finfo(matrix.dtype).eps / slots**0.5
    rounding = spread * (weights * norm + weights.sqrt() * values.sqrt()) / ridges
    resolved = (8 * slots * torch.finfo(torch.float64).eps) ** 0.5 * torch.linalg.matrix_norm(matrix)
    cutoff = torch.maximum(rounding, resolved)
    # A cut-off of its own for each memory: (M/c)⁺/c with a ridge of 1.
    scale = torch.where(cutoff > 0, cutoff, 1)[:, None, None]
    return _refined((matrix / scale).double()).to(matrix.dtype) / scale


def condition(precision: Tensor, ridges: Tensor) -> float:
    """The largest 2-norm condition number of A + λI, [batch, K, K]."""
    eigenvalues = torch.linalg.eigvalsh(precision)
    # Only rounding can push the smallest under the ridge.
    least = torch.maximum(eigenvalues[:, 0], ridges)
    return float((eigenvalues[:, -1] / least).max())


@raises_at_once
def _refined(matrix: Tensor) -> Tensor:
    """Mᵀ (MMᵀ + I)⁻¹, refined once.

    A product of M with itself loses its small directions. The correction is solved from the right, whatever
    M's shape: there an error is damped by the inverse before the reading multiplies it by M.
    """
    inverse = pseudo_inverse(matrix, ridge=1.0)
    residual = matrix.mT - (inverse @ matrix) @ matrix.mT - inverse
    return inverse + memory_solve(matrix @ matrix.mT, residual.mT, ridge=1.0).mT


def _norm(matrix: Tensor) -> Tensor:
    """The largest singular value of each matrix, by power iteration: a lower bound, close to it."""
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(matrix.shape[-1], 1, generator=generator, dtype=torch.float64, device="cpu")
    vector = start.to(matrix).expand(matrix.shape[0], -1, -1)
    tiny = torch.finfo(matrix.dtype).tiny
    for _ in range(_POWER_STEPS):
        vector = matrix.mT @ (matrix @ (vector / vector.norm(dim=-2, keepdim=True).clamp_min(tiny)))
    unit = vector / vector.norm(dim=-2, keepdim=True).clamp_min(tiny)
    return (matrix @ unit).norm(dim=(-2, -1))
