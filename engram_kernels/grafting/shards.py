"""From a checkpoint's coordinates to those of a tensor-parallel shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from .. import _checks as check
from .graft import Graft

# The dimension that transformers' tensor-parallel plans split.
STYLES = {"colwise": 0, "rowwise": 1}


def shard_entries(
    indices: Tensor,
    values: Tensor,
    shape: Sequence[int],
    dim: int,
    start: int,
    stop: int,
    offset: int = 0,
    size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The entries of a part `start ≤ coordinate < stop` of one dimension, in that part's own coordinates.

    Args:
        indices: `[n]`, ascending row-major positions in the whole tensor.
        values: `[n]`.
        shape: of the whole tensor.
        dim: the dimension that is split.
        start, stop: the part.
        offset: where the part begins in the parameter that holds it: a packed one, such as qkv, holds others.
        size: of that parameter in this dimension. Default: the part's own.

    Returns:
        `indices` and `values` of the part, as ascending as the given ones.

    Raises:
        ValueError: the dimension or the part is not one of the tensor.
    """
    shape = tuple(shape)
    check.expect(-len(shape) <= dim < len(shape), "dim", f"one of {len(shape)} dimensions", dim)
    dim %= len(shape)
    check.expect(0 <= start <= stop <= shape[dim], "start", f"a part of 0 to {shape[dim]}", (start, stop))
    size = stop - start if size is None else size
    check.expect(offset >= 0 and offset + stop - start <= size, "offset", f"a place in {size}", offset)
    inner = torch.Size(shape[dim + 1 :]).numel()
    at = indices.long()
    coordinate = at // inner % shape[dim]
    mine = (coordinate >= start) & (coordinate < stop)
    at, coordinate = at[mine], coordinate[mine]
    outer = at // (inner * shape[dim])
    moved = (outer * size + coordinate - start + offset) * inner + at % inner
    return moved.to(indices.dtype), values[mine]


def shard_graft(
    graft: Graft, plan: Mapping[str, str | int], rank: int, world: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The entries of a graft that belong to one of `world` tensor-parallel shards, in its coordinates.

    Args:
        graft: in the checkpoint's coordinates.
        plan: by glob pattern of a parameter's name or of its module's, as in transformers' `tp_plan`:
            "colwise" (dimension 0, of weights `[out, in]` and biases), "rowwise" (dimension 1; biases are
            whole everywhere), or a dimension. What no pattern names is whole everywhere.
        rank: of the shard, from 0.
        world: how many there are. A dimension is split as `torch.chunk` does.

    Returns:
        `(indices, values)` by name, of the parameters that have any in this shard.

    Raises:
        ValueError: a rank or a dimension that is none.

    Example:
        >>> mine = shard_graft(graft, model.tp_plan, rank=0, world=2)
    """
    check.integer("world", world, at_least=1)
    check.integer("rank", rank, at_least=0)
    check.expect(rank < world, "rank", f"below {world}", rank)
    found = {}
    for name, at in graft.indices.items():
        shape, values = graft.shapes[name], graft.values[name]
        dim = _dimension(name, plan)
        if dim is not None and dim < len(shape):
            length = -(-shape[dim] // world)
            start = min(rank * length, shape[dim])
            at, values = shard_entries(at, values, shape, dim, start, min(start + length, shape[dim]))
        if at.numel():
            found[name] = at, values
    return found


def _dimension(name: str, plan: Mapping[str, str | int]) -> int | None:
    module = name.rpartition(".")[0]
    for pattern, style in plan.items():
        if fnmatchcase(name, pattern) or fnmatchcase(module, pattern):
            known = isinstance(style, int) or style in STYLES
            check.expect(known, "plan", "'colwise', 'rowwise' or a dimension", repr(style))
            return style if isinstance(style, int) else STYLES[style]
    return None
