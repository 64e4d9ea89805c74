"""Sparse differences on GPUs, in Triton: for each dtype two launches, and a wait for the counts between."""

from itertools import pairwise

import torch
import triton.language as tl
from torch import Tensor

from .. import implements
from ..torch.graft import packed_size
from .diff_kernels import diff_kernel, select_kernel
from .graft import LAUNCH, WEIGHTS, blocks

BITS = {2: tl.int16, 4: tl.int32, 8: tl.int64}
INDICES = {torch.int32: tl.int32, torch.int64: tl.int64}


def _declines(old: list[Tensor], new: list[Tensor], threshold: float | None, wide: bool) -> str | None:
    if threshold is not None and any(tensor.dtype not in WEIGHTS for tensor in old):
        return "leaves fp64 with a threshold to the reference"
    return None


@implements("sparse_diff", "triton", _declines)
def sparse_diff(
    old: list[Tensor], new: list[Tensor], threshold: float | None, wide: bool
) -> tuple[list[Tensor], list[Tensor]]:
    index = torch.int64 if wide else torch.int32
    indices = [tensor.new_empty(0, dtype=index) for tensor in new]
    values = [tensor.new_empty(0) for tensor in new]
    for dtype in dict.fromkeys(tensor.dtype for tensor in old):
        mine = [i for i, tensor in enumerate(old) if tensor.dtype == dtype and tensor.numel()]
        if mine:
            found = _diff([old[i] for i in mine], [new[i] for i in mine], threshold, index)
            for i, at, value in zip(mine, *found, strict=True):
                indices[i], values[i] = at, value
    return indices, values


def _diff(
    old: list[Tensor], new: list[Tensor], threshold: float | None, index: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """The difference of tensors of one dtype, none of them empty."""
    device, dtype = old[0].device, old[0].dtype
    masks = [tensor.new_empty(packed_size(tensor.numel()), dtype=torch.uint8) for tensor in old]
    firsts = [0]
    for tensor in old:
        firsts.append(firsts[-1] + blocks(tensor.numel()))
    grid = (firsts[-1],)
    found = torch.empty(firsts[-1], dtype=torch.int32, device=device)
    bits = BITS[old[0].element_size()]
    with torch.cuda.device(device):
        diff_kernel[grid](
            _table(firsts, old, new, masks), len(old), 0.0 if threshold is None else threshold, found,
            BITS=bits, FLOAT=None if threshold is None else WEIGHTS[dtype], **LAUNCH,
        )  # fmt: skip
    ends = found.cumsum(0, dtype=torch.int64)
    sums = [0, *ends[torch.tensor(firsts[1:], device=device) - 1].tolist()]
    counts = [after - before for before, after in pairwise(sums)]
    indices = [tensor.new_empty(count, dtype=index) for tensor, count in zip(new, counts, strict=True)]
    values = [tensor.new_empty(count) for tensor, count in zip(new, counts, strict=True)]
    if any(counts):
        with torch.cuda.device(device):
            select_kernel[grid](
                _table(firsts, old, new, masks, indices, values), len(old), ends,
                BITS=bits, INDEX=INDICES[index], **LAUNCH,
            )  # fmt: skip
    return indices, values


def _table(
    firsts: list[int],
    old: list[Tensor],
    new: list[Tensor],
    masks: list[Tensor],
    indices: list[Tensor] | None = None,
    values: list[Tensor] | None = None,
) -> Tensor:
    """The table of `diff_kernels`, on the tensors' device."""
    rows = []
    for i, tensor in enumerate(old):
        read = [tensor.data_ptr(), new[i].data_ptr(), masks[i].data_ptr()]
        written = [indices[i].data_ptr(), values[i].data_ptr(), indices[i].numel()] if indices else [0, 0, 0]
        rows.append([firsts[i], tensor.numel(), all(p % 16 == 0 for p in read), *read, *written])
    table = torch.tensor(rows, dtype=torch.int64)
    return table.pin_memory().to(old[0].device, non_blocking=True) if old[0].is_cuda else table
