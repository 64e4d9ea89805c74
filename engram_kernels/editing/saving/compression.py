"""Many low-rank changes of a matrix as one of a smaller rank, the nearest there is."""

from __future__ import annotations

import torch
from torch import Tensor


def compressed(
    left: Tensor, right: Tensor, rank: int, keys: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """The nearest change of at most some rank, and the share that is lost.

    With keys nearest is what changes their answers most alike: `U Uᵀ ΔW`, with `U` the first left singular
    vectors of `ΔW Kᵀ`. Without, it is the truncated SVD of `ΔW`, whose singular values are those of `R₁ R₂ᵀ`,
    with `left = Q₁ R₁` and `rightᵀ = Q₂ R₂`: no decomposition is larger than the rank that there is.

    Args:
        left: `[out, n]`.
        right: `[n, in]`.
        rank: at least 1.
        keys: `[m, in]`, what the change was made for.

    Returns:
        left `[out, r]` and right `[r, in]`, float32, `r` at most `rank`; and which share of the change is
        lost, `‖(ΔW − theirs) Kᵀ‖ / ‖ΔW Kᵀ‖`, or `‖ΔW − theirs‖ / ‖ΔW‖`, Frobenius norms.

    Source: Eckart and Young 1936.
    """
    wide, inner = left.double(), right.double()
    if keys is not None:
        vectors, values, _ = torch.linalg.svd(wide @ (inner @ keys.double().T), full_matrices=False)
        narrow = vectors[:, :rank], vectors[:, :rank].T @ wide @ inner
    else:
        outer, upper = torch.linalg.qr(wide)
        others, lower = torch.linalg.qr(inner.T)
        vectors, values, turned = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        root = values[:rank].sqrt()
        narrow = (outer @ vectors[:, :rank]) * root, root.unsqueeze(1) * (turned[:rank] @ others.T)
    whole = values.square().sum()
    lost = values[rank:].square().sum() / whole if whole > 0 else whole
    return narrow[0].float().contiguous(), narrow[1].float().contiguous(), float(lost.sqrt())
