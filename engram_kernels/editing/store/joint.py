"""A stream of writes as one joint write, from which an edit can be taken as if it had never been made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...covariance import Covariance
from ..methods import Method
from ..writing.preconditioner import LayerOperator
from ..writing.records import Write


def joint_writes(
    writes: Sequence[Write], covariances: Mapping[str, Covariance], method: Method, without: int
) -> list[Write]:
    """The writes of a stream, one a matrix, without one edit.

    Recursive least squares: batch after batch, each with `Q = (Q₀⁻¹ + Σ KₚᵀKₚ/λ)⁻¹` of those before it, a
    stream reaches what one write of all keys would, `Aᵀ (λI + K Q₀ Kᵀ)⁻¹ K Q₀`, where row i of `A` is by how
    much the answer to key i was to differ from the base's once it was written.

    Args:
        writes: in their order.
        covariances: by module, of the base model.
        method: that made the writes, and weighs earlier keys by `1/λ`.
        without: the number of the edit to leave out; the later ones are renumbered.

    Returns:
        A write of every matrix of which something is left.

    Source: Wang et al. 2026 (arXiv 2601.15686), for the equivalence.
    """
    found = []
    for module in dict.fromkeys(write.module for write in writes):
        own = [write for write in writes if write.module == module]
        keys, changes, edits = _changes(own)
        kept = [place for place, edit in enumerate(edits) if edit != without]
        if not kept:
            continue
        keys, changes = keys[kept], changes[kept]
        device = covariances[module].inverse().device
        weight = torch.empty(changes.shape[1], keys.shape[1], device=device)
        operator = LayerOperator(method, covariances[module])
        solved = operator.factors(weight, keys.float().to(device), changes.float().to(device))
        parts = (solved.left, solved.right, keys.float(), changes.float())
        left, right, keys, changes = (part.float().cpu().contiguous() for part in parts)
        numbers = tuple(edits[place] - (edits[place] > without) for place in kept)
        found.append(Write(module, left, right, keys, changes, solved.ridge, numbers))
    return found


def _changes(writes: Sequence[Write]) -> tuple[Tensor, Tensor, list[int]]:
    """All keys of one matrix, by how much each answer was to differ from the base's, and whose they are."""
    keys = torch.cat([write.keys for write in writes]).double()
    lefts, rights = (torch.cat(parts, dim) for parts, dim in (
        ([write.left for write in writes], 1), ([write.right for write in writes], 0)
    ))  # fmt: skip
    changes = torch.cat([write.residuals for write in writes]).double()
    # Row i answers to what the writes before its own did already.
    overlap = keys @ rights.double().T
    start = 0
    for write in writes:
        stop = start + len(write.keys)
        changes[start:stop] += overlap[start:stop, :start] @ lefts[:, :start].double().T
        start = stop
    return keys, changes, [edit for write in writes for edit in write.edits]
