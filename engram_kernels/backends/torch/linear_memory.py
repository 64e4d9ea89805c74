"""Reference of the memories that take a step where the ridge memory solves: Hebb's and the delta rule's.

Per head, with g the cumulated logarithms of the decay within a chunk, Dᵢⱼ = e^(gᵢ−gⱼ) for j ≤ i, and M the
memory before it:

    B U = β (V − e^g K M),   B = I + stril(β D ∘ K Kᵀ)   the delta rule;   U = β V   Hebb's
    O = e^g Q M + (D ∘ Q Kᵀ) U,   M ← e^g_C M + (e^(g_C−g) K)ᵀ U
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..._linalg import compute_dtype
from .. import implements
from .chunks import Chunks, pairwise_decay


class _Problem(NamedTuple):
    """The tokens in chunks; `from_start` and `to_end` are e^g and e^(g_C−g); B without its diagonal."""

    chunks: Chunks
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    pairwise: Tensor
    from_start: Tensor
    to_end: Tensor
    system: Tensor | None

    def solve(self, rows: Tensor, part: slice | Tensor, transposed: bool = False) -> Tensor:
        """B⁻¹ or B⁻ᵀ of rows of some chunks; Hebb's B is the identity."""
        if self.system is None:
            return rows
        system = self.system[part]
        system = system.mT if transposed else system
        return torch.linalg.solve_triangular(system, rows, upper=transposed, unitriangular=True)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    memory: Tensor,
    cu_seqlens: Tensor | None,
    delta: bool,
) -> _Problem:
    dtype, chunks = compute_dtype(q), Chunks(q, cu_seqlens)
    q, k, v, beta = (chunks.split(x, dtype) for x in (q, k, v, beta))
    g = torch.zeros_like(beta) if decay is None else chunks.split(decay, dtype).cumsum(-1)
    beta, from_start, to_end = (x.unsqueeze(-1) for x in (beta, g.exp(), (g[..., -1:] - g).exp()))
    pairwise = pairwise_decay(g)
    system = (beta * pairwise * (k @ k.mT)).tril(-1) if delta else None
    return _Problem(chunks, q, k, v, beta, pairwise, from_start, to_end, system)


def _write(p: _Problem, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each chunk writes, U, the memory that it meets, and the memory after each sequence."""
    written, taken = p.beta * p.v, None
    if p.system is not None:
        rows = torch.cat([written, p.beta * p.from_start * p.k], -1)
        written, taken = p.solve(rows, slice(None)).split([p.v.shape[-1], p.k.shape[-1]], -1)
        written = written.contiguous()
    kept, left = (p.k * p.to_end).mT, p.from_start[..., -1:, :]
    memory, before = memory.clone(), p.v.new_empty(*p.k.shape[:2], *memory.shape[2:])
    for c, n in p.chunks.steps:
        before[c] = memory[n]
        if taken is not None:
            written[c] -= taken[c] @ before[c]
        memory[n] = before[c] * left[c] + kept[c] @ written[c]
    return written, before, memory


@implements("linear_memory", "torch")
def linear_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    memory: Tensor,
    cu_seqlens: Tensor | None,
    delta: bool,
) -> tuple[Tensor, Tensor]:
    """The readout of every token after its own write, and the memory after each sequence."""
    p = _prepare(q, k, v, beta, decay, memory, cu_seqlens, delta)
    written, before, memory = _write(p, memory)
    out = (p.q * p.from_start) @ before + (p.pairwise * (p.q @ p.k.mT)) @ written
    return p.chunks.join(out).to(v.dtype), memory


@implements("linear_memory_gradient", "torch")
def linear_memory_gradient(
    d_out: Tensor,
    d_memory: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    memory: Tensor,
    cu_seqlens: Tensor | None,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The chunks once more forwards, for M before each; then the algebra of each backwards."""
    p = _prepare(q, k, v, beta, decay, memory, cu_seqlens, delta)
    written, before, _ = _write(p, memory)
    d_out = p.chunks.split(d_out, p.q.dtype)
    keys, read = p.k * p.from_start, p.q * p.from_start
    kept, left = p.k * p.to_end, p.from_start[..., -1:, :]
    products = p.q @ p.k.mT

    # What the memory after a chunk owes, and B⁻ᵀ dU.
    d_after, d_right = torch.empty_like(before), torch.empty_like(written)
    d_written, d_read = (p.pairwise * products).mT @ d_out, read.mT @ d_out
    d_memory = d_memory.clone()
    for c, n in reversed(p.chunks.steps):
        d_after[c] = d_memory[n]
        d_right[c] = p.solve(d_written[c] + kept[c] @ d_after[c], c, transposed=True)
        d_before = d_read[c] + left[c] * d_after[c]
        if delta:
            d_before = d_before - keys[c].mT @ (p.beta[c] * d_right[c])
        d_memory[n] = d_before

    d_v, d_kept, d_rows = p.beta * d_right, written @ d_after.mT, d_out @ before.mT
    d_products = d_out @ written.mT
    d_q = p.from_start * d_rows + (d_products * p.pairwise) @ p.k
    d_k = p.to_end * d_kept + (d_products * p.pairwise).mT @ p.q
    d_pairwise = d_products * products * p.pairwise
    d_g = (d_rows * read).sum(-1) - (d_kept * kept).sum(-1)
    d_end = (d_kept * kept).sum((-1, -2)) + (d_after * before * left).sum((-1, -2))
    d_target = p.v
    if delta:
        d_target = p.v - keys @ before
        d_keys = -d_v @ before.mT
        gram, d_system = p.k @ p.k.mT, -(d_right @ written.mT).tril(-1)
        d_gram = p.beta * d_system * p.pairwise
        d_k += p.from_start * d_keys + (d_gram + d_gram.mT) @ p.k
        d_pairwise += d_gram * gram
        d_g += (d_keys * keys).sum(-1)
    d_beta = (d_right * d_target).sum(-1)
    if delta:
        d_beta += (d_system * p.pairwise * gram).sum(-1)
    d_g += d_pairwise.sum(-1) - d_pairwise.sum(-2)
    d_g[..., -1] += d_end

    def like(gradient: Tensor, given: Tensor) -> Tensor:
        return p.chunks.join(gradient).to(given.dtype)

    d_decay = d_g.flip(-1).cumsum(-1).flip(-1)
    return (
        like(d_q, q),
        like(d_k, k),
        like(d_v, v),
        like(d_beta, beta),
        d_out.new_empty(0, dtype=torch.float32) if decay is None else like(d_decay, decay),
        d_memory,
    )
