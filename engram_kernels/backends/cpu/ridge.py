"""The ridge memory on CPUs, in C++: token by token, with the state in a core's caches.

A chunk's matrix products do twice the operations of rank-one updates, and LAPACK's small factorisations and
solves come on top: while a head's state stays in the cache, the updates win. Under a decay they would not be
stable, for what has decayed divides what is left.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ... import _cpu
from ..._linalg import cholesky
from .. import implements
from ..native import DTYPE_CODES

# Bytes of a head's state that the updates find in a core's caches: measured on one thread up to here.
_CACHED_STATE = 1 << 20


def _declines(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    ridge: Tensor,
    gram: Tensor,
    cross: Tensor,
    *rest: object,
) -> str | None:
    if decay is not None:
        return "leaves a memory that decays to the reference, whose factors are of its sums"
    if bool((beta < 0).any()):
        return "leaves weights under 0 to the reference"
    state = gram[0, 0].nbytes + cross[0, 0].nbytes
    if state > _CACHED_STATE:
        return f"leaves a state beyond {_CACHED_STATE >> 10} KiB to GEMMs"
    return None


@implements("ridge_memory", "cpu", _declines)
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
    batch, length, heads, keys = q.shape
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    rows = [x.to(dtype).contiguous() for x in (q, k, v)]
    beta = beta.double().contiguous()
    ends = torch.arange(batch + 1) * length if cu_seqlens is None else cu_seqlens.long().contiguous()

    gram = (gram + gram.mT) / 2
    left = log_decay.exp() if ridge_decays else torch.ones_like(log_decay)
    factor, info = cholesky((gram + torch.diag_embed(ridge.double() * left.unsqueeze(-1))).flatten(0, 1))
    factor = factor.masked_fill_((info > 0).view(-1, 1, 1), torch.nan)
    inverse = torch.cholesky_inverse(factor).contiguous()
    memory = inverse @ cross.flatten(0, 1)
    out = torch.empty_like(rows[2])
    _cpu.ridge_memory(
        *(x.data_ptr() for x in rows),
        DTYPE_CODES[dtype],
        beta.data_ptr(),
        ends.data_ptr(),
        len(ends) - 1,
        heads,
        keys,
        v.shape[-1],
        inverse.data_ptr(),
        memory.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    gram, cross = gram.clone(), cross.clone()
    _add(gram, cross, rows[1].flatten(0, 1), rows[2].flatten(0, 1), beta.flatten(0, 1), ends)
    return out.to(v.dtype), gram, cross, log_decay.clone()


def _add(gram: Tensor, cross: Tensor, k: Tensor, v: Tensor, beta: Tensor, ends: Tensor) -> None:
    """H += Σ β kᵀk, G += Σ β kᵀv in fp64, some tokens at a time, which stay in the cache."""
    for n, (first, last) in enumerate(pairwise(ends.tolist())):
        for start in range(first, last, 256):
            part = slice(start, min(start + 256, last))
            keys = k[part].transpose(0, 1).to(torch.float64, memory_format=torch.contiguous_format)
            values = v[part].transpose(0, 1).to(torch.float64, memory_format=torch.contiguous_format)
            weighted = (keys * beta[part].T.unsqueeze(-1)).mT
            gram[n].baddbmm_(weighted, keys)
            cross[n].baddbmm_(weighted, values)
