"""Sparse deltas: what changed between two models, as positions and new values."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .define import define, dynamic_size
from .lists import as_lists, check_alike, check_dense, check_weights, dense

__all__ = ["SparseDiff", "sparse_diff"]

# As many entries as int32 can number.
NARROW = 2**31


class SparseDiff(NamedTuple):
    """What changed in a list of tensors: `new[i].view(-1)[indices[i]] = values[i]`."""

    indices: list[Tensor]
    values: list[Tensor]


def _check_pair(old: list[Tensor], new: list[Tensor], threshold: float | None, wide: bool) -> None:
    check_weights("old", old)
    check_alike("new", new, old, [before.dtype for before in old])
    for before in old:
        if not wide and before.numel() > NARROW:
            check.expect(False, "index_dtype", f"int64 for {before.numel()} entries", "int32")
    if threshold is not None:
        check.number("threshold", threshold, at_least=0)


def _empty_diff(
    old: list[Tensor], new: list[Tensor], threshold: float | None, wide: bool
) -> tuple[list[Tensor], list[Tensor]]:
    counts = [dynamic_size() for _ in new]
    index = torch.int64 if wide else torch.int32
    indices = [tensor.new_empty(count, dtype=index) for tensor, count in zip(new, counts, strict=True)]
    return indices, [tensor.new_empty(count) for tensor, count in zip(new, counts, strict=True)]


_sparse_diff = define(
    "sparse_diff(Tensor[] old, Tensor[] new, float? threshold, bool wide)"
    " -> (Tensor[] indices, Tensor[] values)",
    _check_pair,
    lambda old, new, threshold, wide: check_dense(old=old, new=new),
    fake=_empty_diff,
    tags=(torch.Tag.dynamic_output_shape, torch.Tag.cudagraph_unsafe),
)


def sparse_diff(
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    threshold: float | None = None,
    index_dtype: torch.dtype | None = None,
) -> SparseDiff:
    """Find the entries of many tensors that changed, in one launch.

    An entry changed where its bits differ: `−0` for `0` is a change, a NaN for the same NaN is none. With a
    threshold it must also have moved by more than that, `|new − old| > threshold` in fp32 (fp64 for fp64
    weights); where the difference is NaN, it counts.

    `ek.sparse_apply_(old, *ek.sparse_diff(old, new))` makes old what new is. On CPUs both are read once, and
    what is allocated is a small multiple of the result; on GPUs also a bit an entry, and it waits once, for
    the number of changes.

    Args:
        old: tensors of any shapes, all on one device; fp32, bf16, fp16, fp64. Strided ones are copied.
        new: tensors of the same shapes and dtypes.
        threshold: 0 or more, in the weights' units; None compares bits.
        index_dtype: torch.int32 or torch.int64. Default: int32, unless a tensor has more than 2³¹ entries.

    Returns:
        `indices`, row-major positions in ascending order, [n] each, and `values` of new there, [n] each.

    Raises:
        ValueError: wrong shape, device, number of tensors or threshold, or int32 for more than 2³¹ entries.
        TypeError: wrong dtype.

    Example:
        >>> indices, values = ek.sparse_diff(before, after)
        >>> overwritten = ek.sparse_apply_(served, indices, values)
    """
    old, new = as_lists(old=old, new=new)
    if index_dtype is None:
        largest = max([0, *(tensor.numel() for tensor in old)])
        index_dtype = torch.int32 if largest <= NARROW else torch.int64
    known = index_dtype in (torch.int32, torch.int64)
    check.expect(known, "index_dtype", "torch.int32 or torch.int64", index_dtype, TypeError)
    wide = index_dtype == torch.int64
    _check_pair(old, new, threshold, wide)
    if not old:
        return SparseDiff([], [])
    least = None if threshold is None else float(threshold)
    with torch.no_grad():
        return SparseDiff(*_sparse_diff(dense(old), dense(new), least, wide))
