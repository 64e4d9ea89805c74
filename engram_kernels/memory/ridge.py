"""The ridge: what is allowed, and its choice by leave-one-out in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check

RIDGE = 1e-2
LOO = "loo"

# Ridges tried: four a decade, from far under the largest eigenvalue of the Gram matrix to above it.
DECADES = (-8, 1)
STEPS = 4
# Errors this close count as equal; of equally good ridges the largest is taken, as the most stable.
TIE = 1e-6


def candidates(largest: float, slots: int, dtype: torch.dtype) -> Tensor:
    """Ridges on a log grid, ascending, fp64, for a Gram matrix of that largest eigenvalue, slots and dtype.

    Those that are lost in the rounding of the matrix are left out.
    """
    low, high = DECADES
    grid = torch.logspace(low, high, STEPS * (high - low) + 1, dtype=torch.float64, device="cpu")
    return largest * grid[grid > 4 * slots * torch.finfo(dtype).eps]


def leave_one_out(gram: Tensor, cross: Tensor, weights: Tensor, values: Tensor, ridges: Tensor) -> Tensor:
    """The mean squared error of each row, read from a memory that holds all rows but that one.

        eᵢ / (1 − hᵢ)        e = Z − W (A + λI)⁻¹ B        hᵢ = wᵢ (A + λI)⁻¹ wᵢᵀ

    With `A = Q diag(a) Qᵀ` once, every λ costs one product of the rows with the memory.

    Args:
        gram: A [K, K], without a ridge, fp64.
        cross: B [K, C].
        weights: W [n, K], of rows that are in A and B.
        values: Z [n, C].
        ridges: λ [m], each above 0.

    Returns:
        [m].

    Example:
        >>> errors = leave_one_out(gram, cross, weights, values, torch.tensor([0.1, 1.0]))

    Source: the identity of Sherman and Morrison; Golub, Heath and Wahba 1979.
    """
    eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues = eigenvalues.clamp_min(0)
    turned, memory = weights @ vectors, vectors.mT @ cross
    errors = []
    for ridge in ridges.tolist():
        shrunk = turned / (eigenvalues + ridge)
        leverage = (shrunk * turned).sum(-1, keepdim=True)
        errors.append(((values - shrunk @ memory) / (1 - leverage)).square().sum(-1).mean())
    return torch.stack(errors)


def choose_ridge(gram: Tensor, cross: Tensor, weights: Tensor, values: Tensor) -> float | None:
    """The ridge of the least leave-one-out error; None where the rows say nothing: none, or zeros.

    Computed in fp64: a leverage in fp32 reaches 1 long before its row is alone.

    Args:
        gram, cross, weights, values: as for `leave_one_out`, in the dtype of the state.
    """
    slots, dtype = gram.shape[-1], gram.dtype
    gram, cross, weights, values = (tensor.double() for tensor in (gram, cross, weights, values))
    largest = float(torch.linalg.eigvalsh(gram)[-1]) if len(weights) else 0.0
    if not largest > 0:
        return None
    ridges = candidates(largest, slots, dtype)
    errors = leave_one_out(gram, cross, weights, values, ridges)
    good = (errors <= (1 + TIE) * errors.min()).nonzero().flatten()
    return float(ridges[int(good[-1])])


def checked_ridge(ridge: float | str, dtype: torch.dtype) -> float | str:
    """λ as a float, or "loo".

    Raises:
        TypeError: something else.
        ValueError: a number that is not above 0 and finite, or that `dtype` does not hold.
    """
    if ridge == LOO:
        return LOO
    expected = "a number above 0, or 'loo'"
    is_number = isinstance(ridge, (int, float)) and not isinstance(ridge, bool)
    check.expect(is_number, "ridge", expected, repr(ridge), TypeError)
    if not 0 < ridge < float("inf"):
        raise ValueError(
            f"ridge: expected {expected}, got {ridge} (without a ridge, a memory of fewer rows than slots "
            "has no solution, and its pseudo-inverse does not forget)"
        )
    shown = float(torch.tensor(float(ridge), dtype=torch.float64, device="cpu").to(dtype))
    fits = 0 < shown < float("inf")
    check.expect(fits, "ridge", f"a number that fits {str(dtype).removeprefix('torch.')}", ridge)
    return float(ridge)
