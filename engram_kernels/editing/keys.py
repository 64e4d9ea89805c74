"""The one key under which an edit is written, out of the subject's keys in all its texts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..preconditioner import Preconditioner


@dataclass(frozen=True)
class MeanKey:
    """The mean of the keys, as ROME and MEMIT take it (Meng et al. 2022, eq. 3).

    Args:
        bare: the share of the bare prompt's key; None: all texts count alike.
    """

    bare: float | None = None

    def weights(self, keys: Tensor, preconditioner: Preconditioner) -> Tensor:
        """`[texts]`, the share of each key; one that is 0, of a token that misses the expert, has none.

        Args:
            keys: `[texts, in]`, the bare prompt's first.
            preconditioner: not asked here.
        """
        there = keys.any(-1).to(keys.dtype)
        others = len(keys) - 1
        if self.bare is not None and others:
            there *= there.new_tensor([self.bare] + [(1 - self.bare) / others] * others)
        return there / there.sum()


@dataclass(frozen=True)
class SpreadKey:
    """The combination of the keys that every text answers to alike.

    The subject's last token has another key in every text, and a write under their mean reaches some of them
    by little. A joint write of the same `δ` under all of them, `δᵀ 1ᵀ (λI + G)⁻¹ K C⁻¹` with `G = K C⁻¹ Kᵀ`,
    reaches each by about all of it; it is of rank one, and but for a factor next to 1 the write of `δ` under
    one key,

        w ∝ (λI + G)⁻¹ 1,   k = Σ w_c k_c

    Args:
        ridge: `λ`: the larger, the nearer to the mean.
    """

    ridge: float

    def weights(self, keys: Tensor, preconditioner: Preconditioner) -> Tensor:
        """`[texts]`, the share of each key; they sum to 1, and a share may be negative.

        Args:
            keys: `[texts, in]`.
            preconditioner: `C⁻¹`, or what stands in its place.
        """
        there = keys.any(-1)
        wide = keys[there].double()
        gram = preconditioner.apply(wide) @ wide.T
        gram.diagonal().add_(self.ridge)
        found = torch.linalg.solve((gram + gram.T) / 2, torch.ones_like(gram[:, 0]))
        weights = torch.zeros_like(keys[:, 0])
        weights[there] = (found / found.sum()).to(weights)
        return weights
