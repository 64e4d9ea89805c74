"""Grafting: masks of one bit a weight, the choice by them, and the masks of the largest entries."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .. import _checks as check
from .._linalg import compute_dtype
from ..backends.torch.graft import packed_size
from .batching import with_mask
from .define import apply, backward, define
from .lists import (
    as_lists,
    check_alike,
    check_count,
    check_dense,
    check_flat,
    check_like,
    check_packed,
    check_weights,
    dense,
)

__all__ = ["graft_blend_packed", "graft_top_k", "pack_mask", "top_k_mask", "unpack_mask"]


# -- pack_mask, unpack_mask ----------------------------------------------------------------------------------


def _check_bools(mask: Tensor) -> None:
    check.expect(isinstance(mask, Tensor), "mask", "a bool tensor", type(mask).__name__, TypeError)
    check.expect(mask.dtype == torch.bool, "mask", "a bool tensor", mask.dtype, TypeError)


_pack_mask = define(
    "pack_mask(Tensor mask) -> Tensor",
    _check_bools,
    lambda mask: check_flat(mask=mask),
    fake=lambda mask: mask.new_empty(packed_size(mask.shape[0]), dtype=torch.uint8),
)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask into bits: entry i, in row-major order, is bit i % 8 of byte i // 8.

    Args:
        mask: [...], bool.

    Returns:
        uint8 [⌈numel / 8⌉], the least significant bit first; bits beyond the last entry are 0.

    Raises:
        TypeError: not a bool tensor.

    Example:
        >>> ek.pack_mask(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    _check_bools(mask)
    return _pack_mask(mask.reshape(-1).contiguous())


def _check_unpack(packed: Tensor, count: int) -> None:
    check.expect(isinstance(packed, Tensor), "packed", "a uint8 tensor", type(packed).__name__, TypeError)
    check_packed("packed", packed, count, packed.device)


_unpack_mask = define(
    "unpack_mask(Tensor packed, SymInt count) -> Tensor",
    _check_unpack,
    lambda packed, count: check_flat(packed=packed),
    fake=lambda packed, count: packed.new_empty(count, dtype=torch.bool),
)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack the bits of `pack_mask`.

    Args:
        packed: uint8 [⌈numel / 8⌉].
        shape: the mask's shape.

    Returns:
        bool, of that shape.

    Raises:
        ValueError: packed has another size than the shape asks for.
        TypeError: packed is not uint8.

    Example:
        >>> ek.unpack_mask(torch.tensor([5], dtype=torch.uint8), (3,))
        tensor([ True, False,  True])
    """
    sizes = isinstance(shape, Sequence) and all(isinstance(x, (int, torch.SymInt)) for x in shape)
    check.expect(sizes, "shape", "a sequence of integers", shape, TypeError)
    check.expect(all(size >= 0 for size in shape), "shape", "sizes of at least 0", list(shape))
    count = math.prod(shape)
    _check_unpack(packed, count)
    return _unpack_mask(packed.contiguous(), count).view(tuple(shape))


# -- graft_blend_packed --------------------------------------------------------------------------------------


def _check_choice(pre: Tensor, ft: Tensor, mask: Tensor) -> None:
    check.floating("pre", pre)
    check.floating("ft", ft)
    check_like("ft", ft, pre, pre.dtype)
    check.expect(isinstance(mask, Tensor), "mask", "a uint8 tensor", type(mask).__name__, TypeError)
    check_packed("mask", mask, pre.numel(), pre.device)


_graft_blend_packed = define(
    "graft_blend_packed(Tensor pre, Tensor ft, Tensor mask) -> Tensor",
    _check_choice,
    lambda pre, ft, mask: check_flat(pre=pre, ft=ft, mask=mask),
    fake=lambda pre, ft, mask: torch.empty_like(pre),
    batched=partial(with_mask, place=2),
)


class GraftBlendPacked(torch.autograd.Function):
    """θ = ft where the mask's bit is 1, else pre [N]; dft = g there and 0 elsewhere, dpre the reverse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pre: Tensor, ft: Tensor, mask: Tensor) -> Tensor:
        return _graft_blend_packed(pre, ft, mask)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @backward
    def backward(ctx, gradient: Tensor):
        (mask,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        zeros = torch.zeros_like(gradient)
        d_pre = _graft_blend_packed(gradient, zeros, mask) if ctx.needs_input_grad[0] else None
        d_ft = _graft_blend_packed(zeros, gradient, mask) if ctx.needs_input_grad[1] else None
        return d_pre, d_ft, None


def graft_blend_packed(pre: Tensor, ft: Tensor, mask: Tensor) -> Tensor:
    """Take the fine-tuned weight where the mask's bit is 1 and the pre-trained one elsewhere, bit for bit.

    Differentiable in pre and ft.

    Args:
        pre: [...], fp32, bf16, fp16 or fp64. Strided tensors are copied.
        ft: [...], of pre's shape and dtype.
        mask: packed bit mask of `pack_mask`, uint8 [⌈numel / 8⌉].

    Returns:
        A new contiguous tensor of pre's shape and dtype.

    Raises:
        ValueError: wrong shape or device.
        TypeError: wrong dtype.

    Example:
        >>> theta = ek.graft_blend_packed(pre, ft, ek.pack_mask(mask))

    Source: Panigrahi et al. 2023 (arXiv 2302.06600), eq. 1.
    """
    _check_choice(pre, ft, mask)
    flat = (x.reshape(-1).contiguous() for x in (pre, ft, mask))
    return apply(GraftBlendPacked, *flat).view(pre.shape)


# -- top_k_mask ----------------------------------------------------------------------------------------------


def check_top_k(scores: list[Tensor], reference: list[Tensor], k: int) -> None:
    name = "pre" if reference else "scores"  # what the public functions call them
    check_weights(name, scores)
    if reference:
        check_alike("ft", reference, scores, [tensor.dtype for tensor in scores])
    for tensor in scores:
        if compute_dtype(tensor) != compute_dtype(scores[0]):
            check.expect(False, name, "all tensors fp64 or none", tensor.dtype, TypeError)
    check.integer("k", k)
    total = sum([tensor.numel() for tensor in scores])
    check.expect(0 <= k <= total, "k", f"0 to {total}, the number of entries", k)


def top_k_results(result: tuple[list[Tensor], Tensor], scores, reference: list[Tensor], k: int) -> None:
    name, expected = ("ft", "finite differences from pre") if reference else ("scores", "finite values")
    invalid = int(result[1])
    check.expect(invalid == 0, name, expected, f"{invalid} NaN or infinite")


# The k largest scores, or the k largest |scores − reference|; and how many of these are not finite.
_top_k_mask = define(
    "top_k_mask(Tensor[] scores, Tensor[] reference, SymInt k) -> (Tensor[] masks, Tensor invalid)",
    check_top_k,
    lambda scores, reference, k: check_dense(scores=scores, reference=reference),
    fake=lambda scores, reference, k: (
        [tensor.new_empty(packed_size(tensor.numel()), dtype=torch.uint8) for tensor in scores],
        scores[0].new_empty((), dtype=torch.int64),
    ),
    results=top_k_results,
    suspect=lambda result, *args: result[1],
    complaint="top_k_mask: expected finite scores, got NaN or infinite",
)


def graft_top_k(pre: Sequence[Tensor], ft: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return the masks of the k largest `|ft − pre|` over all tensors together.

    Exactly k bits are set. Of equal differences the first count: in the order of the list, then row-major.
    Differences are taken in fp32 (fp64 for fp64 weights), never rounded to the weights' type. A radix select
    by histograms: no tensor of differences is made.

    Args:
        pre: tensors of any shapes, all on one device; fp32, bf16 and fp16 may be mixed, fp64 not with others.
        ft: tensors of the same shapes and dtypes.
        k: the number of entries, 0 to the number of all.

    Returns:
        A packed mask of `pack_mask` for each tensor.

    Raises:
        ValueError: wrong shape, device or k, or a difference that is NaN or infinite.
        TypeError: wrong dtype.

    Example:
        >>> masks = ek.graft_top_k(pre, ft, round(1e-4 * sum(p.numel() for p in pre)))

    Source: the base mask of Panigrahi et al. 2023 (arXiv 2302.06600), section 2.
    """
    pre, ft = as_lists(pre=pre, ft=ft)
    check_count("ft", ft, pre)
    check_top_k(pre, ft, k)
    with torch.no_grad():
        return _top_k_mask(dense(pre), dense(ft), k)[0] if pre else []


def top_k_mask(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return the masks of the k largest scores over all tensors together, signs counted.

    As `graft_top_k`, for scores of your own.

    Args:
        scores: tensors of any shapes, all on one device; fp64 not mixed with other types.
        k: the number of entries, 0 to the number of all.

    Returns:
        A packed mask of `pack_mask` for each tensor.

    Raises:
        ValueError: wrong device or k, or a score that is NaN or infinite.
        TypeError: wrong dtype.

    Example:
        >>> masks = ek.top_k_mask([weight.grad.square() for weight in weights], k=1000)
    """
    (scores,) = as_lists(scores=scores)
    check_top_k(scores, [], k)
    with torch.no_grad():
        return _top_k_mask(dense(scores), [], k)[0] if scores else []
