"""More facts than a memory holds: a memory for each chunk, and memories of what was read from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..memory.addressing import check_addressing
from ..memory.episodic import EpisodicMemory
from ..memory.solution import without_autocast
from ..ops import memory_address, memory_solve
from ..ops.waiting import raises_at_once
from .reading import fixed_ridge, soft_inverse

# From the second level on every query has memories of its own, each with systems of K × K.
_QUERIES = 32


def read_recursively(
    values: Tensor,
    queries: Tensor,
    memory: EpisodicMemory,
    keys: Tensor | None = None,
    chunk: int | None = None,
    addressing: str | None = None,
) -> Tensor:
    """Read queries from any number of facts, with memories of at most `chunk` facts each.

    Every chunk is written into a memory of its own, and each query reads all of them: the value, and the key
    that the memory has at the query's address, which is short where the chunk holds nothing like the query.
    These pairs, a chunk each, are the facts that are chunked and read next, until one memory is left. No
    memory solves for more than `chunk` facts, so there can be many more than slots. Differentiable.

    Args:
        values: z of the facts, `[T, latent]`.
        queries: `[Q, latent]`.
        memory: whose M0 and λ are used; it is neither read nor written.
        keys: what the facts are written under, `[T, latent]`; None: the values themselves.
        chunk: facts a memory, at least 2; None: half the slots.
        addressing: "key" or "content", as for `EpisodicMemory.read`; None: by key where keys are given.

    Returns:
        Readouts `[Q, latent]` in the queries' dtype; zeros if there are no facts.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, a chunk below 2.
        TypeError: not a floating dtype.

    Example:
        >>> read_recursively(latents, encoder.encode(["Where is the Louvre?"]), memory, chunk=64)

    Source: Das et al. 2024 (arXiv 2403.11901), reading recursively for long contexts.
    """
    if addressing is None:
        addressing = "content" if keys is None else "key"
    check_addressing(addressing)
    keys = values if keys is None else keys
    latent = memory.latent
    for name, rows in (("values", values), ("queries", queries), ("keys", keys)):
        check.floating(name, rows)
        expected = (len(values) if name == "keys" else len(rows), latent)
        check.shape(name, rows, expected, "[rows, latent]")
        check.finite(name, rows)
    chunk = max(2, memory.slots // 2) if chunk is None else chunk
    check.integer("chunk", chunk)
    check.expect(chunk >= 2, "chunk", "at least 2", chunk)
    if not len(values) or not len(queries):
        return torch.zeros_like(queries)
    asked = queries.to(memory.m0_pinv.dtype)
    pairs = torch.cat([values, keys], -1).to(asked.dtype)
    # The first memories are read by all queries; from then on each query has facts of its own.
    read = _read_chunks(pairs.unsqueeze(0), asked.unsqueeze(0), chunk, memory, addressing)
    readouts = []
    for pairs, some in zip(read.split(_QUERIES), asked.split(_QUERIES), strict=True):
        while pairs.shape[1] > 1:
            pairs = _read_chunks(pairs, some.unsqueeze(1), chunk, memory, addressing)
        readouts.append(pairs[:, 0, :latent])
    return torch.cat(readouts).to(queries.dtype)


def _read_chunks(
    pairs: Tensor, queries: Tensor, chunk: int, memory: EpisodicMemory, addressing: str
) -> Tensor:
    """What queries `[G, q, C]` read from the chunks of pairs `[G, N, 2C]`: `[G q, chunks, 2C]`."""
    count = -(-pairs.shape[1] // chunk)
    # Rows of zeros have weights of zero: they fill a chunk and are not there.
    pairs = nn.functional.pad(pairs, (0, 0, 0, count * chunk - pairs.shape[1]))
    pairs = pairs.view(len(pairs), count, chunk, -1)
    return _read(pairs, queries.unsqueeze(1), memory, addressing).movedim(2, 1).flatten(0, 1)


@raises_at_once
def _read(pairs: Tensor, queries: Tensor, memory: EpisodicMemory, addressing: str) -> Tensor:
    """What memories of pairs of value and key `[…, N, 2C]` have for queries `[…, Q, C]`: `[…, Q, 2C]`."""
    latent = memory.latent
    with without_autocast(memory.gram):
        weights = memory_address(pairs[..., latent:], memory.m0_pinv)
        matrix = memory_solve(weights.mT @ weights, weights.mT @ pairs, ridge=fixed_ridge(memory))
        inverse = memory.m0_pinv if addressing == "key" else soft_inverse(matrix[..., latent:])
        return (queries @ inverse) @ matrix
