"""Grafting on NVIDIA GPUs, in CUDA C++: packing of masks, masks of the k largest, sparse writes."""

import torch
from torch import Tensor

from ... import _cuda
from ..native import graft_rows, sparse_rows, stream
from ..torch.graft import packed_size, write_sparse
from .device import implements


def _workspace(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def _declines_wide(scores: list[Tensor], *args) -> str | None:
    return "leaves fp64 to the reference" if scores[0].dtype == torch.float64 else None


@implements("pack_mask", "cuda")
def pack_mask(mask: Tensor) -> Tensor:
    packed = mask.new_empty(packed_size(mask.numel()), dtype=torch.uint8)
    with torch.cuda.device(mask.device):
        _cuda.pack_mask(mask.data_ptr(), mask.numel(), packed.data_ptr(), stream(mask))
    return packed


@implements("top_k_table", "cuda", _declines_wide)
class TopKTable:
    """Scores, and room for the masks of the k largest."""

    def __init__(self, scores: list[Tensor], reference: list[Tensor]):
        self._first = scores[0]
        self.masks = [score.new_empty(packed_size(score.numel()), dtype=torch.uint8) for score in scores]
        self.invalid = torch.empty((), dtype=torch.int64, device=self._first.device)
        size = _cuda.top_k_workspace(len(scores), sum(map(Tensor.numel, scores)))
        self._workspace = _workspace(size, self._first)
        self._rows = graft_rows(scores, out=self.masks, ft=reference)

    def select_(self, k: int) -> None:
        with torch.cuda.device(self._first.device):
            workspace, invalid = self._workspace.data_ptr(), self.invalid.data_ptr()
            _cuda.top_k_mask(self._rows, k, workspace, invalid, stream(self._first))


@implements("top_k_mask", "cuda", _declines_wide)
def top_k_mask(scores: list[Tensor], reference: list[Tensor], k: int) -> tuple[list[Tensor], Tensor]:
    table = TopKTable(scores, reference)
    table.select_(k)
    return table.masks, table.invalid


@implements("sparse_faults", "cuda")
def sparse_faults(weights: list[Tensor], indices: list[Tensor]) -> Tensor:
    return SparseTable(weights, indices).faults()


@implements("sparse_table", "cuda")
class SparseTable:
    """The lists of a sparse write on the device, ready for as many as there are."""

    def __init__(self, weights: list[Tensor], indices: list[Tensor], values=(), overwritten=()):
        self._first, self._wide = weights[0], indices[0].dtype == torch.int64
        self._workspace = _workspace(_cuda.sparse_workspace(len(weights)), self._first)
        self._faults = torch.empty((), dtype=torch.int64, device=self._first.device)
        rows = sparse_rows(weights, indices, values, overwritten)
        with torch.cuda.device(self._first.device):
            chunks = _cuda.sparse_list(rows, self._workspace.data_ptr(), stream(self._first))
        self._sizes = len(weights), chunks

    def faults(self) -> Tensor:
        with torch.cuda.device(self._first.device):
            _cuda.sparse_faults(*self._arguments(), self._faults.data_ptr(), stream(self._first))
        return self._faults

    def apply_(self) -> Tensor:
        faults = self.faults()
        self.write_(faults.data_ptr())
        return faults

    def write_(self, faults: int = 0) -> None:
        with torch.cuda.device(self._first.device):
            _cuda.sparse_apply(*self._arguments(), faults, stream(self._first))

    def _arguments(self) -> tuple[int | bool, ...]:
        return self._workspace.data_ptr(), *self._sizes, self._wide


@implements("sparse_apply_", "cuda")
def sparse_apply_(
    weights: list[Tensor],
    indices: list[Tensor],
    values: list[Tensor],
    overwritten: list[Tensor],
    checked: bool,
) -> Tensor:
    return write_sparse(SparseTable(weights, indices, values, overwritten), checked, weights[0].device)
