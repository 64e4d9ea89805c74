"""Grafting: values written into scattered positions, and the overwritten ones given back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks as check
from ..backends import select
from .define import define
from .lists import Spans, Written, as_lists, check_alike, check_count, check_dense, check_weights, dense

__all__ = ["sparse_apply_"]

_INDICES = {torch.int32, torch.int64}


def _check_indices(weights: list[Tensor], indices: list[Tensor]) -> None:
    check_count("indices", indices, weights)
    check_weights("weights", weights)
    types = {index.dtype for index in indices}
    check.expect(
        types <= _INDICES, "indices", "int32 or int64", next(iter(types - _INDICES), None), TypeError
    )
    if {index.device for index in indices} != {weight.device for weight in weights}:
        for index in indices:
            check.same_device("indices", index, weights[0].device)


def _canonical_indices(weights: list[Tensor], indices: list[Tensor]) -> None:
    check_dense(weights=weights, indices=indices)
    types = {index.dtype for index in indices}
    check.expect(len(types) == 1, "indices", "the same type in all tensors", types, TypeError)


# How many indices are out of range or not above the one before them.
sparse_faults = define(
    "sparse_faults(Tensor[] weights, Tensor[] indices) -> Tensor",
    _check_indices,
    _canonical_indices,
    fake=lambda weights, indices: weights[0].new_empty((), dtype=torch.int64),
)


def check_sparse(weights: list[Tensor], indices: list[Tensor], values: list[Tensor]) -> None:
    """Check shapes, types and devices of a sparse write."""
    _check_indices(weights, indices)
    check_alike("values", values, indices, [weight.dtype for weight in weights], "one for each index")


def _check_write(weights, indices, values, overwritten, checked) -> None:
    check_sparse(weights, indices, values)
    dtypes = [weight.dtype for weight in weights]
    check_alike("overwritten", overwritten, indices, dtypes, "one for each index")


def _canonical_write(weights, indices, values, overwritten, checked) -> None:
    _canonical_indices(weights, indices)
    check_dense(values=values, overwritten=overwritten)


def one_index_type(indices: list[Tensor]) -> list[Tensor]:
    """Contiguous indices of one type: int64, where there are both."""
    mixed = len({index.dtype for index in indices}) > 1
    return dense([index.long() for index in indices] if mixed else indices)


def check_positions(weights: list[Tensor], indices: list[Tensor]) -> None:
    """Name the index that is out of range or given twice, if there is one. The order does not matter."""
    for number, (weight, index) in enumerate(zip(weights, indices, strict=True)):
        ordered = index.view(-1).sort().values
        outside = ordered[(ordered < 0) | (ordered >= weight.numel())]
        if outside.numel():
            range_ = f"0 to {weight.numel() - 1} in tensor {number}"
            check.expect(False, "indices", range_, outside[0].item())
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if twice.numel():
            once = f"each position once in tensor {number}"
            check.expect(False, "indices", once, f"{twice[0].item()} twice")


def _write_results(faults: Tensor, weights, indices, values, overwritten, checked) -> None:
    if not checked and int(faults):
        check_positions(weights, indices)
        # They are in another order alone, which is as good.
        arguments = weights, indices, values, overwritten, True
        select("sparse_apply_", weights[0].device.type, arguments).function(*arguments)


# Returns how many indices are out of range or not above the one before them. Unless `checked`, which makes it
# 0, nothing is written where there is one.
_sparse_apply_ = define(
    "sparse_apply_(Tensor(a!)[] weights, Tensor[] indices, Tensor[] values, Tensor(b!)[] overwritten, "
    "bool checked) -> Tensor",
    _check_write,
    _canonical_write,
    fake=lambda weights, *rest: weights[0].new_empty((), dtype=torch.int64),
    apart=lambda weights, indices, values, overwritten, checked: Spans(weights=weights).check_apart(values),
    results=_write_results,
    suspect=lambda faults, *args: faults,
    complaint="sparse_apply_: expected indices in range, in ascending order, got others; nothing was written",
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
    check_sparse(weights, indices, values)
    if not weights:
        return []
    indices, values = one_index_type(indices), dense(values)
    overwritten = room_for(values)
    with torch.no_grad(), Written("weights", weights, indices, values) as targets:
        _sparse_apply_(targets, indices, values, overwritten, False)
    return overwritten


def room_for(values: list[Tensor]) -> list[Tensor]:
    """Empty tensors like these, of each type in one piece of memory."""
    if torch.compiler.is_compiling():
        return [torch.empty_like(value) for value in values]
    sizes: dict[torch.dtype, list[int]] = {}
    for value in values:
        sizes.setdefault(value.dtype, []).append(value.numel())
    device = values[0].device
    pieces = {
        dtype: iter(torch.empty(sum(parts), dtype=dtype, device=device).split(parts))
        for dtype, parts in sizes.items()
    }
    rooms = [next(pieces[value.dtype]) for value in values]
    flat = all([value.dim() == 1 for value in values])
    return rooms if flat else [room.view(value.shape) for room, value in zip(rooms, values, strict=True)]
