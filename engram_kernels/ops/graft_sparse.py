"""Grafting: values written into scattered positions, and the overwritten ones given back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks as check
from ..backends import select
from .define import define
from .lists import Written, as_lists, check_apart, check_count, check_flat, check_like, flatten

__all__ = ["sparse_apply_"]

_INDICES = (torch.int32, torch.int64)


def _check_indices(weights: list[Tensor], indices: list[Tensor]) -> None:
    check_count("indices", indices, weights)
    device = weights[0].device if weights else None
    for weight, index in zip(weights, indices, strict=True):
        # What is right is passed quickly, as in `check_like`.
        if weight.dtype not in check.WEIGHT_DTYPES or weight.device != device:
            check.floating("weights", weight)
            check.same_device("weights", weight, device)
        if index.dtype not in _INDICES:
            raise TypeError(f"indices: expected int32 or int64, got {index.dtype}")
        if index.device != device:
            check.same_device("indices", index, device)


def _canonical_indices(weights: list[Tensor], indices: list[Tensor]) -> None:
    check_flat(weights=weights, indices=indices)
    types = {index.dtype for index in indices}
    check.expect(len(types) == 1, "indices", "the same type in all tensors", types, TypeError)


# How many indices are out of range or not above the one before them.
define(
    "sparse_faults(Tensor[] weights, Tensor[] indices) -> Tensor",
    _check_indices,
    _canonical_indices,
    fake=lambda weights, indices: weights[0].new_empty((), dtype=torch.int64),
)


def _check_sparse(
    weights: list[Tensor], indices: list[Tensor], values: list[Tensor], overwritten: list[Tensor]
) -> None:
    _check_indices(weights, indices)
    named = {"values": values} if overwritten is values else {"values": values, "overwritten": overwritten}
    for name, tensors in named.items():
        check_count(name, tensors, weights)
        for weight, index, value in zip(weights, indices, tensors, strict=True):
            check_like(name, value, index, weight.dtype, "one for each index")


def _canonical_sparse(
    weights: list[Tensor], indices: list[Tensor], values: list[Tensor], overwritten: list[Tensor]
) -> None:
    _canonical_indices(weights, indices)
    check_flat(values=values, overwritten=overwritten)


def _sparse_values(
    weights: list[Tensor], indices: list[Tensor], values: list[Tensor], overwritten: list[Tensor]
) -> None:
    check_apart("weights", weights, values)
    checked = weights, indices
    if not int(select("sparse_faults", weights[0].device, checked)(*checked)):
        return
    # Unsorted indices are as good as sorted ones; the rest is named here, where time no longer matters.
    for number, (weight, index) in enumerate(zip(weights, indices, strict=True)):
        ordered = index.sort().values
        outside = ordered[(ordered < 0) | (ordered >= weight.numel())]
        where = f"in tensor {number}"
        check.expect(
            outside.numel() == 0,
            "indices",
            f"0 to {weight.numel() - 1} {where}",
            outside[:1].tolist()[0] if outside.numel() else None,
        )
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        check.expect(
            twice.numel() == 0,
            "indices",
            f"each position once {where}",
            f"{twice[:1].tolist()[0]} twice" if twice.numel() else None,
        )


_sparse_apply_ = define(
    "sparse_apply_(Tensor(a!)[] weights, Tensor[] indices, Tensor[] values, Tensor(b!)[] overwritten) -> ()",
    _check_sparse,
    _canonical_sparse,
    fake=lambda weights, indices, values, overwritten: None,
    values=_sparse_values,
)


def sparse_apply_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]
) -> list[Tensor]:
    """Write values into positions of many tensors in one launch, and return what they overwrote.

    `values[i]` go to the row-major positions `indices[i]` of `weights[i]`, bit for bit. The result is the
    undo: `sparse_apply_(weights, indices, sparse_apply_(weights, indices, values))` changes nothing.

    Args:
        weights: tensors of any shapes and floating types, all on one device, changed in place.
        indices: [n] each, int32 or int64; in any order, fastest in ascending order.
        values: [n] each, of the weight's dtype.

    Returns:
        The overwritten values, [n] each.

    Raises:
        ValueError: an index out of range or given twice, wrong shape, device or number of tensors, memory
            that is written twice, or written and read; nothing is changed.
        TypeError: wrong dtype.

    Example:
        >>> before = ek.sparse_apply_(weights, graft.indices, graft.values)
        >>> ek.sparse_apply_(weights, graft.indices, before)
    """
    weights, indices, values = as_lists(weights=weights, indices=indices, values=values)
    _check_sparse(weights, indices, values, overwritten=values)
    if not weights:
        return []
    indices, values = [flatten(x) for x in indices], [flatten(x) for x in values]
    if len({index.dtype for index in indices}) > 1:
        indices = [index.long() for index in indices]
    overwritten = [torch.empty_like(x) for x in values]
    with Written("weights", weights, indices, values) as targets:
        _sparse_apply_(targets, indices, values, overwritten)
    return overwritten
