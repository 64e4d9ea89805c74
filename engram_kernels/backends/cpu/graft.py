"""Grafting on CPUs, in C++."""

import torch
from torch import Tensor

from ... import _cpu
from .. import implements
from ..native import graft_rows, sparse_rows
from ..torch.graft import packed_size, write_sparse


def _empty_like(tensor: Tensor) -> Tensor:
    out = torch.empty_like(tensor)
    _cpu.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out


def _listed(base: Tensor | None) -> list[Tensor]:
    return [] if base is None else [base]


def _wide(*tensors: Tensor) -> str | None:
    return "leaves fp64 to the reference" if any(t.dtype == torch.float64 for t in tensors) else None


@implements("graft_blend", "cpu", lambda pre, *rest: _wide(pre))
def graft_blend(pre: Tensor, ft: Tensor, logits: Tensor, base: Tensor | None, bias: float) -> Tensor:
    out = _empty_like(pre)
    rows = graft_rows([pre], [out], [ft], [logits], _listed(base))
    _cpu.graft_blend(_cpu.GraftList(rows), bias, torch.get_num_threads())
    return out


@implements("graft_logits_gradient", "cpu", lambda gradient, *rest: _wide(gradient))
def graft_logits_gradient(
    gradient: Tensor, pre: Tensor, ft: Tensor, logits: Tensor, base: Tensor | None, bias: float
) -> Tensor:
    out = _empty_like(logits)
    rows = graft_rows([pre], [out], [ft], [logits], _listed(base), [gradient])
    _cpu.graft_logits_gradient(_cpu.GraftList(rows), bias, torch.get_num_threads())
    return out


@implements("graft_table", "cpu", lambda logits, *rest: _wide(*logits))
class GraftTable:
    """The lists of a blend, ready for its steps."""

    def __init__(
        self, logits: list[Tensor], pre: list[Tensor], ft: list[Tensor], base: list[Tensor], out: list[Tensor]
    ):
        self._list = _cpu.GraftList(graft_rows(pre, out, ft, logits, base))

    def blend_(self, bias: float) -> None:
        _cpu.graft_blend(self._list, bias, torch.get_num_threads())

    def set_gradients(self, grads: list[Tensor]) -> None:
        self._list.set_gradients([gradient.data_ptr() for gradient in grads])

    def step_(self, bias: float, lr: float, l1: float) -> None:
        _cpu.graft_mask_step(self._list, bias, lr, l1, torch.get_num_threads())


@implements("_foreach_graft_blend_", "cpu", lambda out, *rest: _wide(*out))
def _foreach_graft_blend_(
    out: list[Tensor],
    pre: list[Tensor],
    ft: list[Tensor],
    logits: list[Tensor],
    base: list[Tensor],
    bias: float,
) -> None:
    GraftTable(logits, pre, ft, base, out).blend_(bias)


@implements("graft_mask_step_", "cpu", lambda logits, *rest: _wide(*logits))
def graft_mask_step_(
    logits: list[Tensor],
    grads: list[Tensor],
    pre: list[Tensor],
    ft: list[Tensor],
    base: list[Tensor],
    bias: float,
    lr: float,
    l1: float,
    out: list[Tensor],
) -> None:
    table = GraftTable(logits, pre, ft, base, out)
    table.set_gradients(grads)
    table.step_(bias, lr, l1)


@implements("pack_mask", "cpu")
def pack_mask(mask: Tensor) -> Tensor:
    packed = mask.new_empty(packed_size(mask.numel()), dtype=torch.uint8)
    _cpu.pack_mask(mask.data_ptr(), mask.numel(), packed.data_ptr(), torch.get_num_threads())
    return packed


@implements("unpack_mask", "cpu")
def unpack_mask(packed: Tensor, count: int) -> Tensor:
    mask = packed.new_empty(count, dtype=torch.bool)
    _cpu.unpack_mask(packed.data_ptr(), count, mask.data_ptr(), torch.get_num_threads())
    return mask


@implements("graft_blend_packed", "cpu")
def graft_blend_packed(pre: Tensor, ft: Tensor, mask: Tensor) -> Tensor:
    out = _empty_like(pre)
    _cpu.graft_blend_packed(
        pre.data_ptr(),
        ft.data_ptr(),
        mask.data_ptr(),
        pre.numel(),
        pre.element_size(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@implements("top_k_table", "cpu", lambda scores, *rest: _wide(*scores))
class TopKTable:
    """Scores, and room for the masks of the k largest."""

    def __init__(self, scores: list[Tensor], reference: list[Tensor]):
        self.masks = [score.new_empty(packed_size(score.numel()), dtype=torch.uint8) for score in scores]
        self.invalid = torch.zeros((), dtype=torch.int64)
        self._list = _cpu.GraftList(graft_rows(scores, out=self.masks, ft=reference))

    def select_(self, k: int) -> None:
        self.invalid.fill_(_cpu.top_k_mask(self._list, k, torch.get_num_threads()))


@implements("top_k_mask", "cpu", lambda scores, *rest: _wide(*scores))
def top_k_mask(scores: list[Tensor], reference: list[Tensor], k: int) -> tuple[list[Tensor], Tensor]:
    table = TopKTable(scores, reference)
    table.select_(k)
    return table.masks, table.invalid


@implements("sparse_faults", "cpu")
def sparse_faults(weights: list[Tensor], indices: list[Tensor]) -> Tensor:
    rows, wide = sparse_rows(weights, indices), indices[0].dtype == torch.int64
    return torch.tensor(_cpu.sparse_faults(_cpu.SparseList(rows), wide, torch.get_num_threads()))


@implements("sparse_table", "cpu")
class SparseTable:
    """The lists of a sparse write, ready for as many as there are."""

    def __init__(
        self, weights: list[Tensor], indices: list[Tensor], values: list[Tensor], overwritten: list[Tensor]
    ):
        self._wide = indices[0].dtype == torch.int64
        self._list = _cpu.SparseList(sparse_rows(weights, indices, values, overwritten))

    def apply_(self) -> Tensor:
        return torch.tensor(_cpu.sparse_apply(self._list, self._wide, False, torch.get_num_threads()))

    def write_(self) -> None:
        _cpu.sparse_apply(self._list, self._wide, True, torch.get_num_threads())


@implements("sparse_apply_", "cpu")
def sparse_apply_(
    weights: list[Tensor],
    indices: list[Tensor],
    values: list[Tensor],
    overwritten: list[Tensor],
    checked: bool,
) -> Tensor:
    return write_sparse(SparseTable(weights, indices, values, overwritten), checked, weights[0].device)
