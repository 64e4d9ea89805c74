"""Flat tensors and lists of them, one for each weight of a model; packed masks.

Grafting's operators take tensors that are flat and contiguous. An empty list stands for none. A mask is
packed: bit i % 8 of byte i // 8 is entry i, and the bits beyond the last entry are 0.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor

from .. import _checks as check
from ..backends.torch.graft import packed_size


def as_lists(**arguments: object) -> list[list[Tensor]]:
    """Check that each argument is a list of tensors, and return them as such."""
    for name, tensors in arguments.items():
        known = isinstance(tensors, Sequence) and not isinstance(tensors, Tensor)
        check.expect(known, name, "a list of tensors", type(tensors).__name__, TypeError)
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    return [list(tensors) for tensors in arguments.values()]


def as_masks(base: Sequence[Tensor] | None, count: int) -> list[Tensor]:
    """Check that there is a packed mask for each tensor, or none at all, and return them as a list."""
    (masks,) = as_lists(base=[] if base is None else base)
    check.expect(base is None or len(masks) == count, "base", f"{count} packed masks", len(masks))
    return masks


def flatten(tensor: Tensor) -> Tensor:
    """A tensor to read as one contiguous dimension: a view, or a copy of a strided one."""
    if tensor.dim() == 1 and tensor.is_contiguous() and not tensor.requires_grad:
        return tensor
    if tensor.is_contiguous():
        return tensor.detach().view(-1)
    return tensor.detach().reshape(-1).contiguous()


def check_count(name: str, tensors: list[Tensor], like: list[Tensor]) -> None:
    """Check that there are as many tensors as of another list."""
    check.expect(len(tensors) == len(like), name, f"{len(like)} tensors", len(tensors))


# A call may bring a thousand tensors: what is right is passed quickly, and words are made for what is wrong.
def check_like(
    name: str, tensor: Tensor, other: Tensor, dtype: torch.dtype, meaning: str = "as the other tensors"
) -> None:
    """Check that a tensor has another's shape and device, and the given dtype."""
    if tensor.dtype != dtype or tensor.shape != other.shape or tensor.device != other.device:
        check.floating(name, tensor, (dtype,))
        check.shape(name, tensor, other.shape, meaning)
        check.same_device(name, tensor, other.device)


def check_packed(name: str, mask: object, count: int, device: torch.device) -> None:
    """Check a packed mask of so many entries."""
    check.expect(isinstance(mask, Tensor), name, "a packed mask", type(mask).__name__, TypeError)
    check.expect(mask.dtype == torch.uint8, name, "a packed mask of uint8", mask.dtype, TypeError)
    check.shape(name, mask, (packed_size(count),), f"a bit for each of {count} entries")
    check.same_device(name, mask, device)


def check_flat(**arguments: Tensor | list[Tensor] | None) -> None:
    """Check the canonical layout: one contiguous dimension."""
    for name, argument in arguments.items():
        for tensor in argument if isinstance(argument, list) else [argument]:
            if tensor is not None and not (tensor.dim() == 1 and tensor.is_contiguous()):
                got = f"shape {list(tensor.shape)} with strides {tensor.stride()}"
                raise ValueError(f"{name}: expected one contiguous dimension, got {got}")


def check_apart(name: str, written: list[Tensor], *others: list[Tensor]) -> None:
    """Check that memory that is written is written once, and is not read beside it."""
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in written if x.numel())
    for (_, end), (start, _) in pairwise(spans):
        if start < end:
            check.expect(False, name, "each tensor once", "memory that is written twice")
    starts = [start for start, _ in spans]
    for tensor in chain(*others):
        start = tensor.data_ptr()
        before = bisect_left(starts, start + tensor.nbytes)
        if before and spans[before - 1][1] > start and tensor.numel():
            check.expect(False, name, "memory of its own", "memory that is also read")


class Written:
    """Flat tensors to write to: views of contiguous memory; dense copies of other, put back at the end."""

    def __init__(self, name: str, tensors: list[Tensor], *others: list[Tensor]):
        self.name, self.others = name, others
        self.tensors = tensors

    def __enter__(self) -> list[Tensor]:
        strided = [i for i, tensor in enumerate(self.tensors) if not tensor.is_contiguous()]
        if strided:
            # The operator sees a copy, and cannot see what else lies where that goes back to.
            spans = [check.span(tensor) for tensor in chain(self.tensors, *self.others)]
            for i in strided:
                check.no_overlap(self.name, self.tensors[i])
                begin, end = spans[i]
                shared = any(first < end and begin < last for first, last in spans[:i] + spans[i + 1 :])
                check.expect(not shared, self.name, "memory of its own for a strided tensor", "shared memory")
        self.flat = [flatten(tensor) for tensor in self.tensors]
        return self.flat

    def __exit__(self, error, *details) -> None:
        if error is None:
            for tensor, flat in zip(self.tensors, self.flat, strict=True):
                if not tensor.is_contiguous():
                    tensor.detach().copy_(flat.view(tensor.shape))
