"""Reference of episodic memory: accumulate, solve, leverages, the streaming write, the pseudo-inverse."""

from itertools import pairwise

import torch
from torch import Tensor

from ..._linalg import cholesky
from .. import implements

# Rows of a chunk of the streaming write: its products are GEMMs, its n × n algebra is small beside them.
_CHUNK = 64


@implements("memory_accumulate_", "torch")
def memory_accumulate_(
    gram: Tensor,
    cross: Tensor,
    weights: Tensor,
    latents: Tensor,
    alpha: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """A += Σ αᵢ wᵢᵀwᵢ, B += Σ αᵢ wᵢᵀzᵢ."""
    with torch.no_grad():
        weights, latents = weights.to(gram.dtype), latents.to(gram.dtype)
        signed = weights if alpha is None else weights * alpha.unsqueeze(-1)
        if cu_seqlens is None:
            gram.baddbmm_(signed.mT, weights)
            cross.baddbmm_(signed.mT, latents)
            return
        ends = cu_seqlens.tolist()
        for b, (start, end) in enumerate(pairwise(ends)):
            gram[b].addmm_(signed[start:end].mT, weights[start:end])
            cross[b].addmm_(signed[start:end].mT, latents[start:end])


def _factor(gram: Tensor, ridge: float, eps: float) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of the symmetric part of A + λI, and which pivot was lost first, or 0."""
    system = (gram + gram.mT) / 2
    system.diagonal(dim1=-2, dim2=-1).add_(ridge)
    return cholesky(system, eps)


@implements("memory_solve", "torch")
def memory_solve(gram: Tensor, cross: Tensor, ridge: float, finite: bool) -> tuple[Tensor, Tensor]:
    """M = (A + λI)⁻¹ B; `info` is the order of the first pivot lost to rounding, 0 where there is none."""
    factor, info = _factor(gram, ridge, torch.finfo(gram.dtype).eps)
    return torch.cholesky_solve(cross, factor).contiguous(), info


@implements("memory_leverages", "torch")
def memory_leverages(
    gram: Tensor, weights: Tensor, cu_seqlens: Tensor | None, ridge: float, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """diag(H) of H = W (A + λI)⁻¹ Wᵀ in fp64, its largest eigenvalue, and `info` as for `memory_solve`."""
    factor, info = _factor(gram.double(), ridge, torch.finfo(gram.dtype).eps)
    # What could not be factored is reported, not computed with.
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    factor = torch.where((info > 0).view(-1, 1, 1), identity, factor)
    if cu_seqlens is None:
        leverages, largest = _block_leverages(factor, weights.double())
    else:
        ends = cu_seqlens.tolist()
        blocks = [
            _block_leverages(factor[b], weights[start:end].double())
            for b, (start, end) in enumerate(pairwise(ends))
        ]
        empty = factor.new_empty(0)
        leverages = torch.cat([empty, *(block[0] for block in blocks)])
        largest = torch.cat([empty, *(block[1].view(1) for block in blocks)])
    return leverages.to(gram.dtype), largest, info


def _block_leverages(factor: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """diag and largest eigenvalue of YᵀY, Y = L⁻¹Wᵀ; YYᵀ has the same one, and either may be the smaller."""
    y = torch.linalg.solve_triangular(factor, weights.mT, upper=False)
    leverages = y.square().sum(-2)
    block = y.mT @ y if y.shape[-1] <= y.shape[-2] else y @ y.mT
    if block.shape[-1] == 0:
        return leverages, leverages.sum(-1)
    finite = leverages.sum(-1).isfinite()
    largest = torch.linalg.eigvalsh(torch.where(finite[..., None, None], block, 0.0))[..., -1]
    return leverages, torch.where(finite, largest, torch.inf)


def _chunk(
    precision_inverse: Tensor, memory: Tensor, w: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U = P Wᵀ, L of I + W U = L Lᵀ, E = L⁻¹(Z − W M), V = U L⁻ᵀ."""
    u = precision_inverse @ w.mT
    identity = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    factor, info = torch.linalg.cholesky_ex(identity + w @ u)
    factor.masked_fill_((info > 0).view(-1, 1, 1), torch.nan)
    innovations = torch.linalg.solve_triangular(factor, z - w @ memory, upper=False)
    return u, factor, innovations, torch.linalg.solve_triangular(factor, u.mT, upper=False).mT


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + _CHUNK) for start in range(0, max(1, count), _CHUNK)]


@implements("memory_stream", "torch")
def memory_stream(
    precision_inverse: Tensor, memory: Tensor, weights: Tensor, latents: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """N sequential writes with a readout after each, exact, a chunk of rows at a time.

    M += V E, P −= V Vᵀ. With d = diag(L), after its own write row t reads z_t − E_t / d_t, with the leverage
    1 − 1/d_t².
    """
    readouts, leverages = [], []
    for rows in _chunks(weights.shape[1]):
        w, z = weights[:, rows], latents[:, rows]
        _, factor, innovations, v = _chunk(precision_inverse, memory, w, z)
        memory = torch.baddbmm(memory, v, innovations)
        precision_inverse = torch.baddbmm(precision_inverse, v, v.mT, alpha=-1)
        pivots = factor.diagonal(dim1=-2, dim2=-1)
        readouts.append(z - innovations / pivots.unsqueeze(-1))
        leverages.append(1 - pivots.square().reciprocal())
    return precision_inverse, memory, torch.cat(readouts, 1), torch.cat(leverages, 1)


@implements("memory_stream_gradient", "torch")
def memory_stream_gradient(
    precision_inverse: Tensor,
    memory: Tensor,
    weights: Tensor,
    latents: Tensor,
    d_precision_inverse: Tensor,
    d_memory: Tensor,
    d_readouts: Tensor,
    d_leverages: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The chunks once more forwards, for P and M before each; then the algebra of each backwards."""
    chunks, states = _chunks(weights.shape[1]), []
    for rows in chunks:
        states.append((precision_inverse, memory))
        _, _, innovations, v = _chunk(precision_inverse, memory, weights[:, rows], latents[:, rows])
        memory = torch.baddbmm(memory, v, innovations)
        precision_inverse = torch.baddbmm(precision_inverse, v, v.mT, alpha=-1)
    d_weights, d_latents = torch.empty_like(weights), torch.empty_like(latents)
    for rows, (p, m) in zip(reversed(chunks), reversed(states), strict=True):
        w, z = weights[:, rows], latents[:, rows]
        u, factor, innovations, v = _chunk(p, m, w, z)
        pivots = factor.diagonal(dim1=-2, dim2=-1)
        read = d_readouts[:, rows] / pivots.unsqueeze(-1)
        d_pivots = ((read * innovations).sum(-1) + 2 * d_leverages[:, rows] / pivots.square()) / pivots
        d_residual = _solve_transposed(factor, v.mT @ d_memory - read)
        d_v = innovations @ d_memory.mT - v.mT @ (d_precision_inverse + d_precision_inverse.mT)
        d_u = _solve_transposed(factor, d_v)
        d_factor = torch.diag_embed(d_pivots) - (d_residual @ innovations.mT + d_u @ v).tril()
        d_system = _cholesky_gradient(factor, d_factor)
        d_u = d_u + d_system @ w
        d_weights[:, rows] = d_system @ u.mT + d_u @ p - d_residual @ m.mT
        d_latents[:, rows] = d_readouts[:, rows] + d_residual
        d_memory = d_memory - w.mT @ d_residual
        d_precision_inverse = d_precision_inverse + d_u.mT @ w
    return d_precision_inverse.contiguous(), d_memory.contiguous(), d_weights, d_latents


def _solve_transposed(factor: Tensor, right_hand_side: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor.mT, right_hand_side, upper=True)


def _cholesky_gradient(factor: Tensor, d_factor: Tensor) -> Tensor:
    """The symmetric part of L⁻ᵀ Φ(Lᵀ dL) L⁻¹, of S = L Lᵀ; Φ takes the lower triangle, half the diagonal."""
    inner = (factor.mT @ d_factor).tril()
    inner.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    half = _solve_transposed(factor, inner)
    outer = _solve_transposed(factor, half.mT)
    return (outer + outer.mT) / 2


@implements("pseudo_inverse", "torch")
def pseudo_inverse(
    a: Tensor, ridge: float | None, relative: float, largest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """X = (AᵀA + λI)⁻¹Aᵀ, λ the ridge or `relative` of the trace; with it the Cholesky factor and `info`."""
    gram = a.mT @ a
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1, keepdim=True)
    # A zero matrix has no scale; whatever is added, its pseudo-inverse is zero.
    diagonal += torch.where(trace > 0, relative * trace, 1.0) if ridge is None else ridge
    factor, info = cholesky(gram)
    return torch.cholesky_solve(a.mT, factor).contiguous(), factor.contiguous(), info
