"""Flat tensors, lists of tensors, one for each weight of a model, and packed masks.

Grafting's operators take single tensors flat and contiguous, and lists of contiguous tensors of any shape. An
empty list stands for none. A mask is packed: bit i % 8 of byte i // 8 is entry i, and the bits beyond the
last entry are 0.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain, pairwise, repeat
from operator import add, le

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..backends.torch.graft import packed_size

_FLOATING = set(check.WEIGHT_DTYPES)
# What has no ways of its own, and needs no closer look.
_PLAIN = {Tensor, nn.Parameter}


def as_lists(**arguments: object) -> list[list[Tensor]]:
    """Check that each argument is a list of tensors, and return them as such."""
    for name, tensors in arguments.items():
        known = isinstance(tensors, Sequence) and not isinstance(tensors, Tensor)
        check.expect(known, name, "a list of tensors", type(tensors).__name__, TypeError)
        if {type(tensor) for tensor in tensors} <= _PLAIN:
            continue
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    return [list(tensors) for tensors in arguments.values()]


def as_masks(base: Sequence[Tensor] | None, count: int) -> list[Tensor]:
    """Check that there is a packed mask for each tensor, or none at all, and return them as a list."""
    (masks,) = as_lists(base=[] if base is None else base)
    check.expect(base is None or len(masks) == count, "base", f"{count} packed masks", len(masks))
    return masks


def dense(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors to read as contiguous memory: they themselves, or copies of strided ones."""
    if all([tensor.is_contiguous() for tensor in tensors]):
        return tensors
    return [tensor.detach().contiguous() for tensor in tensors]


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


def check_alike(
    name: str,
    tensors: list[Tensor],
    others: list[Tensor],
    dtypes: list[torch.dtype],
    meaning: str = "as the other tensors",
) -> None:
    """Check that there are as many tensors as others, with their shapes and devices, and the given dtypes."""
    check_count(name, tensors, others)
    if (
        [tensor.dtype for tensor in tensors] != dtypes
        or [tensor.shape for tensor in tensors] != [other.shape for other in others]
        or [tensor.device for tensor in tensors] != [other.device for other in others]
    ):
        for tensor, other, dtype in zip(tensors, others, dtypes, strict=True):
            check_like(name, tensor, other, dtype, meaning)


def check_weights(name: str, tensors: list[Tensor]) -> None:
    """Check that tensors are floating, and on one device."""
    if not {tensor.dtype for tensor in tensors} <= _FLOATING or len({x.device for x in tensors}) > 1:
        for tensor in tensors:
            check.floating(name, tensor)
            check.same_device(name, tensor, tensors[0].device)


def check_masks(name: str, masks: list[Tensor], like: list[Tensor]) -> None:
    """Check a packed mask for each tensor."""
    check_count(name, masks, like)
    if (
        {type(mask) for mask in masks} <= _PLAIN
        and {mask.dtype for mask in masks} == {torch.uint8}
        and [mask.shape for mask in masks] == [(packed_size(x.numel()),) for x in like]
        and [mask.device for mask in masks] == [x.device for x in like]
    ):
        return
    for mask, tensor in zip(masks, like, strict=True):
        check_packed(name, mask, tensor.numel(), tensor.device)


def check_dense(**arguments: list[Tensor]) -> None:
    """Check the canonical layout of lists: contiguous memory."""
    for name, tensors in arguments.items():
        if not all([tensor.is_contiguous() for tensor in tensors]):
            strides = next(tensor.stride() for tensor in tensors if not tensor.is_contiguous())
            raise ValueError(f"{name}: expected contiguous tensors, got strides {strides}")


def check_packed(name: str, mask: object, count: int, device: torch.device) -> None:
    """Check a packed mask of so many entries."""
    check.expect(isinstance(mask, Tensor), name, "a packed mask", type(mask).__name__, TypeError)
    check.expect(mask.dtype == torch.uint8, name, "a packed mask of uint8", mask.dtype, TypeError)
    check.shape(name, mask, (packed_size(count),), f"a bit for each of {count} entries")
    check.same_device(name, mask, device)


def check_flat(**arguments: Tensor | None) -> None:
    """Check the canonical layout of tensors: one contiguous dimension."""
    for name, tensor in arguments.items():
        if tensor is not None and not (tensor.dim() == 1 and tensor.is_contiguous()):
            got = f"shape {list(tensor.shape)} with strides {tensor.stride()}"
            raise ValueError(f"{name}: expected one contiguous dimension, got {got}")


class Spans:
    """The memory of lists of tensors that are written, by the names of the lists.

    Raises:
        ValueError: memory that is written twice.
    """

    def __init__(self, **written: list[Tensor]):
        self._written = written
        tensors = [tensor for tensors in written.values() for tensor in tensors if tensor.numel()]
        spans = sorted([(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors])
        self._starts = [start for start, _ in spans]
        self._ends = [end for _, end in spans]
        if not all(map(le, self._ends[:-1], self._starts[1:])):
            self._blame()

    def check_apart(self, *read: list[Tensor]) -> None:
        """Check that what is read lies elsewhere."""
        for tensors in read if self._starts else ():
            if self.meet([tensor.data_ptr() for tensor in tensors], [tensor.nbytes for tensor in tensors]):
                self._blame(*read)

    def meet(self, begins: list[int], sizes: list[int]) -> bool:
        """Whether memory of these addresses and bytes lies in what is written."""
        ends = self._ends
        places = map(bisect_left, repeat(self._starts), map(add, begins, sizes))
        return any([at and ends[at - 1] > begin for at, begin in zip(places, begins, strict=True)])

    def _blame(self, *read: list[Tensor]) -> None:
        """Name the list whose tensors are not apart."""
        for name, tensors in self._written.items():
            own = sorted(check.span(tensor) for tensor in tensors if tensor.numel())
            for (_, end), (start, _) in pairwise(own):
                check.expect(end <= start, name, "each tensor once", "memory that is written twice")
            lists = [others for other, others in self._written.items() if other != name]
            for tensor in chain(*lists, *read):
                begin, end = check.span(tensor)
                shared = any(first < end and begin < last for first, last in own) and begin < end
                check.expect(not shared, name, "memory of its own", "memory that is also read")


class Written:
    """Contiguous tensors to write to: those given, or copies of strided ones, put back at the end."""

    def __init__(self, name: str, tensors: list[Tensor], *others: list[Tensor]):
        self.name, self.others = name, others
        self.tensors = tensors
        self.strided = [i for i, tensor in enumerate(tensors) if not tensor.is_contiguous()]

    def __enter__(self) -> list[Tensor]:
        self.dense = self.tensors
        if self.strided:
            # The operator sees a copy, and cannot see what else lies where that goes back to.
            spans = [check.span(tensor) for tensor in chain(self.tensors, *self.others)]
            for i in self.strided:
                check.no_overlap(self.name, self.tensors[i])
                begin, end = spans[i]
                shared = any(first < end and begin < last for first, last in spans[:i] + spans[i + 1 :])
                check.expect(not shared, self.name, "memory of its own for a strided tensor", "shared memory")
            self.dense = dense(self.tensors)
        return self.dense

    def __exit__(self, error, *details) -> None:
        if error is None:
            for i in self.strided:
                self.tensors[i].detach().copy_(self.dense[i])
