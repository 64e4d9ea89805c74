"""Grafting: the masked blend of two models, its gradient, packed masks, top-k masks, sparse writes.

Tensors are flat and contiguous here; lists hold one tensor for each weight of a model. A mask is packed: bit
i % 8 of byte i // 8 is entry i, and the bits beyond the last entry are 0. An empty list stands for none.
"""

from bisect import bisect_left
from itertools import chain, pairwise

import torch
from torch import Tensor

from .. import _checks as check
from ..backends import select
from .define import compute_dtype, define


def packed_size(count: int) -> int:
    """Return the bytes of a packed mask of so many entries."""
    return (count + 7) // 8


# A call may bring a thousand tensors: what is right is passed quickly, and words are made for what is wrong.
def _flat(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected one dimension, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got stride {tensor.stride()}")


def _like(
    name: str, tensor: Tensor, other: Tensor, dtype: torch.dtype, meaning: str = "the shape of pre"
) -> None:
    """Check that a tensor is flat, has another's shape and device, and the given dtype."""
    if tensor.dtype != dtype or tensor.shape != other.shape or tensor.device != other.device:
        check.floating(name, tensor, (dtype,))
        check.shape(name, tensor, other.shape, meaning)
        check.same_device(name, tensor, other.device)
    _flat(name, tensor)


def _packed(name: str, mask: Tensor, count: int, device: torch.device) -> None:
    check.expect(mask.dtype == torch.uint8, name, "a packed mask of uint8", mask.dtype, TypeError)
    check.shape(name, mask, (packed_size(count),), f"a bit for each of {count} entries")
    check.same_device(name, mask, device)
    _flat(name, mask)


def _tensors(name: str, tensors: list[Tensor], count: int, meaning: str) -> None:
    check.expect(len(tensors) == count, name, f"{count} tensors ({meaning})", len(tensors))


def _apart(name: str, written: list[Tensor], *others: list[Tensor]) -> None:
    """Check that memory that is written is written once, and is not read beside it."""
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in written if x.numel())
    for (_, end), (start, _) in pairwise(spans):
        check.expect(end <= start, name, "each tensor once", "memory that is written twice")
    starts = [start for start, _ in spans]
    for tensor in chain(*others):
        before = bisect_left(starts, tensor.data_ptr() + tensor.nbytes)
        shared = tensor.numel() and before and spans[before - 1][1] > tensor.data_ptr()
        check.expect(not shared, name, "memory of its own", "memory that is also read")


# -- graft_blend, graft_logits_gradient ----------------------------------------------------------------------


def _blend_arguments(pre: Tensor, ft: Tensor, logits: Tensor, base: Tensor | None, bias: float) -> None:
    check.floating("pre", pre)
    _flat("pre", pre)
    _like("ft", ft, pre, pre.dtype)
    _like("logits", logits, pre, compute_dtype(pre))
    if base is not None:
        _packed("base", base, pre.numel(), pre.device)


def _gradient_arguments(gradient: Tensor, pre: Tensor, *rest) -> None:
    _blend_arguments(pre, *rest)
    _like("gradient", gradient, pre, pre.dtype)


define(
    "graft_blend(Tensor pre, Tensor ft, Tensor logits, Tensor? base, float bias) -> Tensor",
    _blend_arguments,
    fake=lambda pre, ft, logits, base, bias: torch.empty_like(pre),
)

define(
    "graft_logits_gradient(Tensor gradient, Tensor pre, Tensor ft, Tensor logits, Tensor? base, float bias)"
    " -> Tensor",
    _gradient_arguments,
    fake=lambda gradient, pre, ft, logits, base, bias: torch.empty_like(logits),
)


# -- _foreach_graft_blend_, graft_mask_step_ ----------------------------------------------------------------


def _blend_all_arguments(
    out: list[Tensor], pre: list[Tensor], ft: list[Tensor], logits: list[Tensor], base: list[Tensor], bias
) -> None:
    count = len(out)
    for name, tensors in (("pre", pre), ("ft", ft), ("logits", logits)):
        _tensors(name, tensors, count, "one for each of out")
    _tensors("base", base, count if base else 0, "one for each of out")
    for i in range(count):
        _blend_arguments(pre[i], ft[i], logits[i], base[i] if base else None, bias)
        _like("out", out[i], pre[i], pre[i].dtype)
        check.same_device("pre", pre[i], out[0].device)


def _blend_all_values(out, pre, ft, logits, base, bias) -> None:
    _apart("out", out, pre, ft, logits, base)


define(
    "_foreach_graft_blend_(Tensor(a!)[] out, Tensor[] pre, Tensor[] ft, Tensor[] logits, Tensor[] base,"
    " float bias) -> ()",
    _blend_all_arguments,
    fake=lambda out, pre, ft, logits, base, bias: None,
    values=_blend_all_values,
)


def _mask_step_arguments(logits, gradients, pre, ft, base, bias, lr, l1, out) -> None:
    _blend_all_arguments(out or pre, pre, ft, logits, base, bias)
    _tensors("grads", gradients, len(logits), "one for each of logits")
    for gradient, weight in zip(gradients, pre, strict=True):
        _like("grads", gradient, weight, weight.dtype)


def _mask_step_values(logits, gradients, pre, ft, base, bias, lr, l1, out) -> None:
    _apart("logits", logits, gradients, pre, ft, base)
    _apart("out", out, pre, ft, logits, base, gradients)


define(
    "graft_mask_step_(Tensor(a!)[] logits, Tensor[] grads, Tensor[] pre, Tensor[] ft, Tensor[] base,"
    " float bias, float lr, float l1, Tensor(b!)[] out) -> ()",
    _mask_step_arguments,
    fake=lambda logits, gradients, pre, ft, base, bias, lr, l1, out: None,
    values=_mask_step_values,
)


# -- pack_mask, unpack_mask, graft_blend_packed --------------------------------------------------------------


def _pack_arguments(mask: Tensor) -> None:
    check.expect(mask.dtype == torch.bool, "mask", "a bool tensor", mask.dtype, TypeError)
    _flat("mask", mask)


def _unpack_arguments(packed: Tensor, count: int) -> None:
    _packed("packed", packed, count, packed.device)


def _blend_packed_arguments(pre: Tensor, ft: Tensor, mask: Tensor) -> None:
    check.floating("pre", pre)
    _flat("pre", pre)
    _like("ft", ft, pre, pre.dtype)
    _packed("mask", mask, pre.numel(), pre.device)


define(
    "pack_mask(Tensor mask) -> Tensor",
    _pack_arguments,
    fake=lambda mask: mask.new_empty(packed_size(mask.shape[0]), dtype=torch.uint8),
)

define(
    "unpack_mask(Tensor packed, SymInt count) -> Tensor",
    _unpack_arguments,
    fake=lambda packed, count: packed.new_empty(count, dtype=torch.bool),
)

define(
    "graft_blend_packed(Tensor pre, Tensor ft, Tensor mask) -> Tensor",
    _blend_packed_arguments,
    fake=lambda pre, ft, mask: torch.empty_like(pre),
)


# -- top_k_mask ----------------------------------------------------------------------------------------------


def _top_k_arguments(scores: list[Tensor], reference: list[Tensor], k: int) -> None:
    name = "pre" if reference else "scores"  # what the public functions call them
    _tensors("ft", reference, len(scores) if reference else 0, "one for each of pre")
    for i, tensor in enumerate(scores):
        check.floating(name, tensor)
        _flat(name, tensor)
        check.same_device(name, tensor, scores[0].device)
        alike = compute_dtype(tensor) == compute_dtype(scores[0])
        check.expect(alike, name, "all tensors fp64 or none", tensor.dtype, TypeError)
        if reference:
            _like("ft", reference[i], tensor, tensor.dtype)
    total = sum(tensor.numel() for tensor in scores)
    check.expect(0 <= k <= total, "k", f"0 to {total}, the number of entries", k)


def _top_k_results(result: tuple[list[Tensor], Tensor], scores, reference: list[Tensor], k: int) -> None:
    name, expected = ("ft", "finite differences from pre") if reference else ("scores", "finite values")
    invalid = int(result[1])
    check.expect(invalid == 0, name, expected, f"{invalid} NaN or infinite")


# The k largest scores, or the k largest |scores − reference|; and how many of these are not finite.
define(
    "top_k_mask(Tensor[] scores, Tensor[] reference, int k) -> (Tensor[] masks, Tensor invalid)",
    _top_k_arguments,
    fake=lambda scores, reference, k: (
        [tensor.new_empty(packed_size(tensor.shape[0]), dtype=torch.uint8) for tensor in scores],
        scores[0].new_empty((), dtype=torch.int64),
    ),
    results=_top_k_results,
)


# -- sparse_apply_, sparse_faults ----------------------------------------------------------------------------


def _faults_arguments(weights: list[Tensor], indices: list[Tensor]) -> None:
    _tensors("indices", indices, len(weights), "one for each of weights")
    device, integers = weights[0].device, indices[0].dtype
    for weight, index in zip(weights, indices, strict=True):
        check.floating("weights", weight)
        check.same_device("weights", weight, device)
        _flat("weights", weight)
        if index.dtype != integers or integers not in (torch.int32, torch.int64):
            raise TypeError(f"indices: expected int32 or int64, the same in all tensors, got {index.dtype}")
        check.same_device("indices", index, device)
        _flat("indices", index)


def _sparse_arguments(
    weights: list[Tensor], indices: list[Tensor], values: list[Tensor], overwritten: list[Tensor]
) -> None:
    _faults_arguments(weights, indices)
    for name, tensors in (("values", values), ("overwritten", overwritten)):
        _tensors(name, tensors, len(weights), "one for each of weights")
        for weight, index, value in zip(weights, indices, tensors, strict=True):
            _like(name, value, index, weight.dtype, "one for each index")


def _sparse_values(
    weights: list[Tensor], indices: list[Tensor], values: list[Tensor], overwritten: list[Tensor]
) -> None:
    _apart("weights", weights, values)
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


# How many indices are out of range or not above the one before them.
define(
    "sparse_faults(Tensor[] weights, Tensor[] indices) -> Tensor",
    _faults_arguments,
    fake=lambda weights, indices: weights[0].new_empty((), dtype=torch.int64),
)

define(
    "sparse_apply_(Tensor(a!)[] weights, Tensor[] indices, Tensor[] values, Tensor(b!)[] overwritten) -> ()",
    _sparse_arguments,
    fake=lambda weights, indices, values, overwritten: None,
    values=_sparse_values,
)
