"""Sparse differences on CPUs, in C++."""

import torch
from torch import Tensor

from ... import _cpu
from .. import implements
from ..native import graft_rows


@implements("sparse_diff", "cpu")
def sparse_diff(
    old: list[Tensor], new: list[Tensor], threshold: float | None, wide: bool
) -> tuple[list[Tensor], list[Tensor]]:
    indices: list[Tensor] = []
    values: list[Tensor] = []

    def place(counts: list[int]) -> list[tuple[int, int]]:
        index = torch.int64 if wide else torch.int32
        indices.extend(
            tensor.new_empty(count, dtype=index) for tensor, count in zip(new, counts, strict=True)
        )
        values.extend(tensor.new_empty(count) for tensor, count in zip(new, counts, strict=True))
        return [(at.data_ptr(), value.data_ptr()) for at, value in zip(indices, values, strict=True)]

    least = -1.0 if threshold is None else threshold
    _cpu.sparse_diff(graft_rows(old, ft=new), least, wide, torch.get_num_threads(), place)
    return indices, values
