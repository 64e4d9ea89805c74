"""Reference of the ridge memory: fp64, a chunk of tokens at a time, all chunks at once.

Per head, with g the cumulated logarithms of the decay within a chunk, H and G before the chunk:

    Sᵢ = e^gᵢ H + Σ_{j≤i} e^(gᵢ−gⱼ) βⱼ kⱼᵀkⱼ + Λᵢ,   Gᵢ = e^gᵢ G + Σ_{j≤i} e^(gᵢ−gⱼ) βⱼ kⱼᵀvⱼ,
    oᵢ = qᵢ Sᵢ⁻¹ Gᵢ

**Rank one** (no decay, or Λᵢ = e^gᵢ Λ): Sᵢ/e^gᵢ is S = H + Λ and i terms of rank one. With S = R Rᵀ, whitened
rows Y = Q R⁻ᵀ, X = √β K R⁻ᵀ and the whitened memory N = R⁻¹G,

    L Lᵀ = diag(e^g) + X Xᵀ,   A = L⁻¹ X,   E = L⁻¹ (√β V − X N),   O = Y N + tril(Y Aᵀ) E:

a leading part of L is the factor of what the tokens up to i have written, so one factorisation serves all i.

**Constant Λ under decay** changes S by a full rank at every token: one Cholesky factorisation a token.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import implements
from .chunks import Chunks, pairwise_decay

# Entries of a matrix of all heads and some chunks that a core's caches hold with a dozen others.
_CACHED = 1 << 17


class _Problem(NamedTuple):
    """Tokens in chunks, what each chunk meets, and `after`: gram, cross and the decay's log at the end."""

    chunks: Chunks
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    pairwise: Tensor | None
    ridge: Tensor
    gram: Tensor
    cross: Tensor
    after: tuple[Tensor, Tensor, Tensor]

    def parts(self) -> Iterator[tuple[slice, "_Problem"]]:
        """Some chunks at a time: on a CPU as many as its caches hold, on a GPU all of them."""
        rows = self.k[:1].numel() if self.k.shape[-1] >= self.v.shape[-1] else self.v[:1].numel()
        count = len(self.k) if self.k.is_cuda else max(1, _CACHED // max(1, rows))
        for start in range(0, len(self.k), count):
            part = slice(start, start + count)
            sliced = {name: getattr(self, name) for name in _SLICED}
            yield part, self._replace(**{name: x if x is None else x[part] for name, x in sliced.items()})

    def from_start(self, x: Tensor) -> Tensor:
        """Rows times what is left at each of them of the chunk's start."""
        return x if self.log_decay is None else x * self.log_decay.exp().unsqueeze(-1)

    def to_end(self, x: Tensor) -> Tensor:
        """Rows times what is left of each of them at the chunk's end."""
        g = self.log_decay
        return x if g is None else x * (g[..., -1:] - g).exp().unsqueeze(-1)

    def causal(self, products: Tensor) -> Tensor:
        """Products of tokens i and j, [..., i, j], times what is left of j at i."""
        return products.tril() if self.pairwise is None else products * self.pairwise


_SLICED = ("q", "k", "v", "beta", "log_decay", "pairwise", "ridge", "gram", "cross")


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    ridge: Tensor,
    gram: Tensor,
    cross: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    ridge_decays: bool,
    size: int | None = None,
) -> _Problem:
    """Cut into chunks, and sum what each of them meets."""
    chunks = Chunks(q, cu_seqlens, size)
    q, k, v, beta = map(chunks.split, (q, k, v, beta))
    g = None if decay is None else chunks.split(decay).cumsum(-1)
    total = None if g is None else g[..., -1]
    problem = _Problem(
        chunks, q, k, v, beta, g, None if g is None else pairwise_decay(g), ridge.double(), gram, cross, ()
    )
    weighted = problem.to_end(k * beta.unsqueeze(-1)).mT
    # Only the symmetric part of a gram has a meaning.
    gram, gram_after = chunks.scan((gram + gram.mT) / 2, weighted @ k, total)
    cross, cross_after = chunks.scan(cross, weighted @ v, total)
    totals = torch.zeros_like(beta[..., -1]) if total is None else total
    log_decay, log_decay_after = chunks.scan(log_decay, totals)
    left = log_decay.exp() if ridge_decays else torch.ones_like(log_decay)
    problem = problem._replace(ridge=problem.ridge * left.unsqueeze(-1))
    return problem._replace(gram=gram, cross=cross, after=(gram_after, cross_after, log_decay_after))


def _cholesky(system: Tensor) -> Tensor:
    """The factor, or NaN where there is none."""
    factor, info = torch.linalg.cholesky_ex(system)
    return factor.masked_fill_((info > 0)[..., None, None], torch.nan)


def whiten(p: _Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R; in its coordinates the queries Y and keys X, [chunks, H, C, K], and the memory N, [..., K, V]."""
    count = p.q.shape[-2]
    factor = _cholesky(p.gram + torch.diag_embed(p.ridge))
    # LAPACK takes columns: rows that are stacked and turned are solved for without a copy.
    rows = torch.cat([p.q, p.k * p.beta.sqrt().unsqueeze(-1), p.cross.mT], -2)
    rows = torch.linalg.solve_triangular(factor, rows.mT, upper=False).mT
    y, x, memory = rows.split([count, count, p.v.shape[-1]], -2)
    return factor, y, x, memory.mT


def _within(p: _Problem, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The chunk's directions A and innovations E."""
    system = x @ x.mT
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    diagonal += 1.0 if p.log_decay is None else p.log_decay.exp()
    rows = torch.cat([x.mT, (p.v * p.beta.sqrt().unsqueeze(-1) - x @ memory).mT], -2)
    rows = torch.linalg.solve_triangular(_cholesky(system), rows.mT, upper=False).mT
    directions, innovations = rows.split([x.shape[-1], p.v.shape[-1]], -2)
    return directions.mT, innovations.mT


def _solve_rank_one(p: _Problem, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """qᵢ Sᵢ⁻¹ and Sᵢ⁻¹ Gᵢ doᵢ."""
    factor, queries, keys, memory = whiten(p)
    directions, innovations = _within(p, keys, memory)
    x = queries - (queries @ directions.mT).tril_() @ directions
    if p.log_decay is not None:
        x = x * (-p.log_decay).exp().unsqueeze(-1)
    y = d_out @ memory.mT + (d_out @ innovations.mT).tril_() @ directions
    rows = torch.cat([x, y], -2).mT
    return torch.linalg.solve_triangular(factor.mT, rows, upper=True).mT.chunk(2, -2)


def _solve_each(p: _Problem, *rows: Tensor) -> list[Tensor]:
    """rᵢ Sᵢ⁻¹ for the rows rᵢ of every token; token i of all chunks at once."""
    solved = [torch.empty_like(r) for r in rows]
    decay = p.log_decay.diff(dim=-1, prepend=torch.zeros_like(p.log_decay[..., :1])).exp()
    gram, weighted = p.gram, p.k * p.beta.unsqueeze(-1)
    for i in range(p.k.shape[-2]):
        gram = gram * decay[..., i, None, None] + weighted[..., i, :, None] * p.k[..., i, None, :]
        factor = _cholesky(gram + torch.diag_embed(p.ridge))
        sides = torch.stack([r[..., i, :] for r in rows], -1)
        for out, side in zip(solved, torch.cholesky_solve(sides, factor).unbind(-1), strict=True):
            out[..., i, :] = side
    return solved


def _is_rank_one(decay: Tensor | None, ridge_decays: bool) -> bool:
    return decay is None or ridge_decays


def _read(p: _Problem, x: Tensor) -> Tensor:
    """xᵢ Gᵢ."""
    return p.from_start(x) @ p.cross + p.causal(x @ p.k.mT) @ (p.v * p.beta.unsqueeze(-1))


@implements("ridge_memory", "torch")
def ridge_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    ridge: Tensor,
    gram: Tensor,
    cross: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    ridge_decays: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """oᵢ = qᵢ (Hᵢ + Λᵢ)⁻¹ Gᵢ, and H, G and the logarithm of all decay after the last token."""
    p = prepare(q, k, v, beta, decay, ridge, gram, cross, log_decay, cu_seqlens, ridge_decays)
    if _is_rank_one(decay, ridge_decays):
        out = torch.empty_like(p.v)
        for part, some in p.parts():
            _, queries, keys, memory = whiten(some)
            directions, innovations = _within(some, keys, memory)
            out[part] = ((queries @ directions.mT).tril_() @ innovations).add_(queries @ memory)
    else:
        out = _read(p, *_solve_each(p, p.q))
    return p.chunks.join(out).to(v.dtype), *p.after


@implements("ridge_memory_gradient", "torch")
def ridge_memory_gradient(
    d_out: Tensor,
    d_gram: Tensor,
    d_cross: Tensor,
    d_log_decay: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    ridge: Tensor,
    gram: Tensor,
    cross: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    ridge_decays: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With xᵢ = qᵢ Sᵢ⁻¹, yᵢ = Sᵢ⁻¹ Gᵢ doᵢ: dGᵢ = xᵢᵀ doᵢ, dSᵢ = −xᵢᵀ yᵢ; then the sums G and H backwards."""
    p = prepare(q, k, v, beta, decay, ridge, gram, cross, log_decay, cu_seqlens, ridge_decays)
    d_out = p.chunks.split(d_out)
    if _is_rank_one(decay, ridge_decays):
        x, y = torch.empty_like(p.q), torch.empty_like(p.q)
        for part, some in p.parts():
            x[part], y[part] = _solve_rank_one(some, d_out[part])
    else:
        d_sums = p.from_start(d_out @ p.cross.mT)
        d_sums = d_sums + p.causal(d_out @ p.v.mT) @ (p.k * p.beta.unsqueeze(-1))
        x, y = _solve_each(p, p.q, d_sums)

    total = None if p.log_decay is None else p.log_decay[..., -1]
    left = p.from_start(x).mT
    outer = left @ y
    end_gram, d_gram_before = p.chunks.scan((d_gram + d_gram.mT) / 2, -(outer + outer.mT) / 2, total, True)
    end_cross, d_cross_before = p.chunks.scan(d_cross, left @ d_out, total, True)

    x_k, y_k, out_v = p.causal(x @ p.k.mT), p.causal(y @ p.k.mT), p.causal(d_out @ p.v.mT)
    of_cross = out_v.mT @ x + p.to_end(p.v @ end_cross.mT)
    of_gram = 2 * p.to_end(p.k @ end_gram) - y_k.mT @ x - x_k.mT @ y
    d_v = p.beta.unsqueeze(-1) * (x_k.mT @ d_out + p.to_end(p.k @ end_cross))
    d_k = p.beta.unsqueeze(-1) * (of_cross + of_gram)
    d_beta = (p.k * (of_cross + of_gram / 2)).sum(-1)

    d_ridge = -x * y
    if ridge_decays and p.log_decay is not None:
        d_ridge = d_ridge * p.log_decay.exp().unsqueeze(-1)
    of_ridge = d_ridge * p.ridge.unsqueeze(-2)
    if ridge_decays:
        d_ridge = d_ridge * (p.ridge / ridge).unsqueeze(-2)
        total_of_ridge = of_ridge.sum((-1, -2))
        _, d_log_decay_before = p.chunks.scan(d_log_decay, total_of_ridge, None, True)
    else:
        d_log_decay_before = d_log_decay.clone()
    d_decay = None
    if decay is not None:
        # What is read at i falls with the logarithm gᵢ, what is written at j grows with −gⱼ. All of Sᵢ falls
        # as Gᵢ does where the ridge decays, and o stays as it is.
        d_g = -p.beta * d_beta
        if not ridge_decays:
            d_g = d_g - of_ridge.sum(-1)
        at_end = (d_gram * p.after[0]).sum((-1, -2)) + (d_cross * p.after[1]).sum((-1, -2)) + d_log_decay
        later, _ = p.chunks.scan(at_end, d_g.sum(-1), None, True)
        d_decay = d_g.flip(-1).cumsum(-1).flip(-1) + later.unsqueeze(-1)

    def like(gradient: Tensor, given: Tensor) -> Tensor:
        return p.chunks.join(gradient).to(given.dtype)

    return (
        like(y, q),
        like(d_k, k),
        like(d_v, v),
        like(d_beta, beta),
        torch.empty(0, device=q.device) if d_decay is None else like(d_decay, decay),
        d_ridge.sum((0, -2)).to(ridge.dtype),
        d_gram_before,
        d_cross_before,
        d_log_decay_before,
    )
