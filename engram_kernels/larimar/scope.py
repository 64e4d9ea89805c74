"""Whether a prompt is about what a memory holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..memory.episodic import EpisodicMemory


def key_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """The cosine of each query to the nearest stored key; −1 where nothing is stored.

    Args:
        queries: `[N, latent]`.
        keys: `[S, latent]`.

    Returns:
        `[N]`, from −1 to 1.
    """
    if not len(keys):
        return queries.new_full((len(queries),), -1.0)
    normalise = nn.functional.normalize
    return (normalise(queries, dim=-1) @ normalise(keys.to(queries), dim=-1).mT).amax(-1)


def stored_keys(memory: EpisodicMemory) -> Tensor:
    """The keys in a memory's ledger, of rows written with ids.

    Args:
        memory: a single one.

    Returns:
        `[S, latent]`, in the order of the ledger.
    """
    keys = [entry.key for _, entry in memory.ledger.items()]
    return torch.cat(keys) if keys else memory.cross.new_zeros(0, memory.latent)


class ScopeDetector:
    """A threshold on a score: at or above it a query is in scope.

    Args:
        threshold: of the scores, such as `key_scores`.

    Example:
        >>> detector = ScopeDetector.calibrate(key_scores(asked, keys), key_scores(others, keys))
        >>> detector(key_scores(queries, stored_keys(memory)))
        tensor([True, False])

    Source: Das et al. 2024 (arXiv 2403.11901), the scope detector.
    """

    def __init__(self, threshold: float):
        check.number("threshold", threshold)
        self.threshold = threshold

    def __repr__(self) -> str:
        return f"ScopeDetector({self.threshold:.4g})"

    def __call__(self, scores: Tensor) -> Tensor:
        """Which of the scores `[N]` are in scope, bool `[N]`."""
        return scores >= self.threshold

    @classmethod
    def calibrate(cls, inside: Tensor, outside: Tensor) -> ScopeDetector:
        """Find the threshold that tells the highest share of both kinds right, on average over the two.

        It lies midway between two scores; of equally good thresholds, in the widest gap.

        Args:
            inside: scores of queries about facts that were stored, `[N]`.
            outside: scores of queries about others, `[M]`.

        Raises:
            ValueError: no scores of a kind, or scores that are not finite.
        """
        for name, scores in (("inside", inside), ("outside", outside)):
            check.expect(scores.numel() > 0, name, "some scores", "none")
            check.finite(name, scores)
        scores = torch.cat([inside, outside]).double().unique()
        edges = torch.cat([scores[:1] - 1, scores, scores[-1:] + 1])
        middles = (edges[1:] + edges[:-1]) / 2
        right = (inside.double() >= middles[:, None]).double().mean(-1)
        right = right + (outside.double() < middles[:, None]).double().mean(-1)
        gaps = torch.where(right == right.max(), edges[1:] - edges[:-1], -1.0)
        return cls(float(middles[gaps.argmax()]))
