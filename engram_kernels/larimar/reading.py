"""Memories that exist in one call's graph alone: written and read differentiably."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from ..memory.episodic import EpisodicMemory
from ..memory.ridge import LOO
from ..memory.solution import without_autocast
from ..ops import memory_address, memory_solve, pseudo_inverse
from ..ops.waiting import raises_at_once


@raises_at_once
def read_episode(
    values: Tensor,
    keys: Tensor,
    queries: Tensor,
    present: Tensor,
    memory: EpisodicMemory,
    addressing: str,
    noise: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Write facts into new memories, a memory a row, and read each with its query; differentiable.

    `w = k M0⁺`, `A = Σ wᵀw`, `B = Σ wᵀz`, `M = (A + λI)⁻¹B`; the readout is `(q M0⁺) M` or `(q M⁺) M`.

    Args:
        values: z, `[batch, N, latent]`.
        keys: k, `[batch, N, latent]`.
        queries: q, `[batch, latent]`.
        present: which of the facts there are, `[batch, N]`.
        memory: whose M0 and λ are used; it is neither read nor written.
        addressing: `"key"` or `"content"`.
        noise: standard deviation of noise on the reading weights.

    Returns:
        The readouts `[batch, latent]` in the values' dtype, and the reading weights `[batch, K]`.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, facts, latent = values.shape
    check.shape("keys", keys, (batch, facts, latent), "as the facts")
    check.shape("query", queries, (batch, latent), "[batch, latent]")
    check.shape("facts_mask", present, (batch, facts), "[batch, N]")
    with without_autocast(memory.gram):
        weights = memory_address(keys, memory.m0_pinv)
        held = weights * present.to(weights.dtype).unsqueeze(-1)
        matrix = memory_solve(held.mT @ held, held.mT @ values.to(held.dtype), ridge=fixed_ridge(memory))
        inverse = memory.m0_pinv if addressing == "key" else soft_inverse(matrix)
        reading = memory_address(queries.unsqueeze(-2), inverse)
        if noise:
            reading = reading + noise * torch.randn_like(reading)
        return (reading @ matrix).squeeze(-2).to(values.dtype), reading.squeeze(-2)


@raises_at_once
def soft_inverse(matrix: Tensor) -> Tensor:
    """M⁺ of memories that hold fewer facts than slots, with a gradient that is no rounding error.

    Directions that M lacks must not be divided by: σ becomes `σ / (σ² + ε^½ ‖M‖²)`, ε of M's type, so that a
    singular value of 1 % of the norm is off by 0.015 % in fp64.

    Args:
        matrix: M, `[..., K, C]`, fp64.
    """
    size = matrix.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    return pseudo_inverse(matrix / size, ridge=torch.finfo(matrix.dtype).eps ** 0.5) / size


def fixed_ridge(memory: EpisodicMemory) -> float:
    """λ of a memory, which must be a number: inside a graph no ridge is chosen by leave-one-out."""
    check.expect(memory.ridge != LOO, "ridge", "a number for memories in a batch", repr(memory.ridge))
    return memory.ridge
