"""Grafting on CPUs, in C++."""

import torch
from torch import Tensor

from ... import _cpu
from .. import implements
from ..native import graft_rows, sparse_rows
from ..torch.graft import packed_size


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
    _cpu.graft_blend(graft_rows([pre], [out], [ft], [logits], _listed(base)), bias, torch.get_num_threads())
    return out


@implements("graft_logits_gradient", "cpu", lambda gradient, *rest: _wide(gradient))
def graft_logits_gradient(
    gradient: Tensor, pre: Tensor, ft: Tensor, logits: Tensor, base: Tensor | None, bias: float
) -> Tensor:
    out = _empty_like(logits)
    _cpu.graft_logits_gradient(
        graft_rows([pre], [out], [ft], [logits], _listed(base), [gradient]), bias, torch.get_num_threads()
    )
    return out


@implements("_foreach_graft_blend_", "cpu", lambda out, *rest: _wide(*out))
def _foreach_graft_blend_(
    out: list[Tensor],
    pre: list[Tensor],
    ft: list[Tensor],
    logits: list[Tensor],
    base: list[Tensor],
    bias: float,
) -> None:
    rows = graft_rows(pre, out, ft, logits, base)
    _cpu.graft_blend(rows, bias, torch.get_num_threads())


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
    rows = graft_rows(pre, out, ft, logits, base, grads)
    _cpu.graft_mask_step(rows, bias, lr, l1, torch.get_num_threads())


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


@implements("top_k_mask", "cpu", lambda scores, *rest: _wide(*scores))
def top_k_mask(scores: list[Tensor], reference: list[Tensor], k: int) -> tuple[list[Tensor], Tensor]:
    masks = [score.new_empty(packed_size(score.numel()), dtype=torch.uint8) for score in scores]
    invalid = _cpu.top_k_mask(graft_rows(scores, out=masks, ft=reference), k, torch.get_num_threads())
    return masks, torch.tensor(invalid)


@implements("sparse_faults", "cpu")
def sparse_faults(weights: list[Tensor], indices: list[Tensor]) -> Tensor:
    wide = indices[0].dtype == torch.int64
    faults = _cpu.sparse_faults(sparse_rows(weights, indices), wide, torch.get_num_threads())
    return torch.tensor(faults)


@implements("sparse_apply_", "cpu")
def sparse_apply_(
    weights: list[Tensor], indices: list[Tensor], values: list[Tensor], overwritten: list[Tensor]
) -> None:
    wide = indices[0].dtype == torch.int64
    _cpu.sparse_apply(sparse_rows(weights, indices, values, overwritten), wide, torch.get_num_threads())
