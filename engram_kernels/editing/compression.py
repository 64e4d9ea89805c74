"""Many low-rank changes of a matrix as one of a smaller rank, the nearest there is."""

from __future__ import annotations

import torch
from torch import Tensor


def compressed(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest change of at most some rank, and the share of the norm that is lost.

    The singular values of `left @ right` are those of `R₁ R₂ᵀ`, with `left = Q₁ R₁` and `rightᵀ = Q₂ R₂`: no
    decomposition is larger than the rank that there is. What is left has singular values in equal parts in
    both factors, which half precision bears best.

    Args:
        left: `[out, n]`.
        right: `[n, in]`.
        rank: at least 1.

    Returns:
        left `[out, r]` and right `[r, in]`, float32, `r` at most `rank`, `n`, `out` and `in`; and
        `‖left @ right − theirs‖ / ‖left @ right‖`, Frobenius norms.

    Source: Eckart and Young 1936, for the truncation.
    """
    outer, upper = torch.linalg.qr(left.double())
    inner, lower = torch.linalg.qr(right.double().T)
    vectors, values, others = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    whole, kept = values.square().sum(), values[:rank]
    lost = values[rank:].square().sum() / whole if whole > 0 else whole
    root = kept.sqrt()
    narrow = (outer @ vectors[:, :rank]) * root, root.unsqueeze(1) * (others[:rank] @ inner.T)
    return narrow[0].float().contiguous(), narrow[1].float().contiguous(), float(lost.sqrt())
