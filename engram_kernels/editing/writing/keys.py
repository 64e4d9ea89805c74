"""The one key under which an edit is written, out of the subject's keys in all its texts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...preconditioner import Preconditioner


@dataclass(frozen=True)
class MeanKey:
    """The mean of the keys, as ROME and MEMIT take it (Meng et al. 2022, eq. 3).

    Args:
        bare: the share of the bare prompt's key; None: all texts count alike.
    """

    bare: float | None = None

    def weights(self, keys: Tensor, preconditioner: Preconditioner, others: None = None) -> Tensor:
        """`[texts]`, the share of each key; one that is 0, of a token that misses the expert, has none.

        Args:
            keys: `[texts, in]`, the bare prompt's first.
            preconditioner, others: not asked here.
        """
        there = keys.any(-1).to(keys.dtype)
        others = len(keys) - 1
        if self.bare is not None and others:
            there *= there.new_tensor([self.bare] + [(1 - self.bare) / others] * others)
        return there / there.sum()


@dataclass(frozen=True)
class SpreadKey:
    """The combination of the keys that every text answers to alike, and other tokens not at all.

    The subject's last token has another key in every text, and a write under their mean reaches some of them
    by little. It also changes the answers to tokens of which the search knows nothing: those around it, where
    the second moment has seen few of a script's, by up to a third of `δ`, and other subjects of its kind. A
    joint write of `δ` under the keys of all texts, and of 0 under those `H` of the prompt's other tokens and
    of other names in the subject's place, does neither,

        [δᵀ 1ᵀ, 0] (λI + G)⁻¹ X C⁻¹,   X = [K; H],   G = X C⁻¹ Xᵀ

    It is of rank one, and but for a factor the write of `δ` under one key,

        w ∝ (λI + G)⁻¹ [1; 0],   k = Σ w_i x_i

    which is scaled so that the texts answer by `δ` in the mean.

    Args:
        ridge: `λ`: the larger, the nearer to the mean. A key that is hardly to be told from one that shall be
            spared, as of a subject that answers like the first token of any text, has less than its share.
    """

    ridge: float

    def weights(self, keys: Tensor, preconditioner: Preconditioner, others: Tensor | None = None) -> Tensor:
        """`[texts + others]`, the share of each key, which may be negative; texts answer by `δ` in the mean.

        Args:
            keys: `[texts, in]`.
            preconditioner: `C⁻¹`, or what stands in its place.
            others: `[others, in]`, keys of tokens whose answers shall stay.
        """
        texts = keys.new_ones(len(keys), dtype=torch.bool)
        if others is not None:
            texts = torch.cat([texts, texts.new_zeros(len(others))])
            keys = torch.cat([keys, others])
        there = keys.any(-1)
        wide = keys[there].double()
        gram = preconditioner.apply(wide) @ wide.T
        gram = (gram + gram.T) / 2
        ridged = gram + self.ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        found = torch.linalg.solve(ridged, texts[there].to(gram))
        answers = gram @ found
        # A write of δ under k changes the answer to x by xᵀC⁻¹k / kᵀC⁻¹k of it.
        weights = torch.zeros_like(keys[:, 0])
        weights[there] = (found * answers[texts[there]].mean() / (found @ answers)).to(weights)
        return weights
