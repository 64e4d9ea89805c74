"""Grafting on NVIDIA GPUs, in CUDA C++: packing of masks, masks of the k largest, sparse writes."""

import torch
from torch import Tensor

from ... import _cuda
from ..native import graft_rows, sparse_rows, stream
from ..torch.graft import packed_size
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


@implements("top_k_mask", "cuda", _declines_wide)
def top_k_mask(scores: list[Tensor], reference: list[Tensor], k: int) -> tuple[list[Tensor], Tensor]:
    masks = [score.new_empty(packed_size(score.numel()), dtype=torch.uint8) for score in scores]
    invalid = torch.empty((), dtype=torch.int64, device=scores[0].device)
    workspace = _workspace(_cuda.top_k_workspace(len(scores)), scores[0])
    with torch.cuda.device(scores[0].device):
        _cuda.top_k_mask(
            graft_rows(scores, out=masks, ft=reference),
            k,
            workspace.data_ptr(),
            invalid.data_ptr(),
            stream(scores[0]),
        )
    return masks, invalid


@implements("sparse_faults", "cuda")
def sparse_faults(weights: list[Tensor], indices: list[Tensor]) -> Tensor:
    faults = torch.empty((), dtype=torch.int64, device=weights[0].device)
    workspace = _workspace(_cuda.sparse_workspace(len(weights)), weights[0])
    with torch.cuda.device(weights[0].device):
        _cuda.sparse_faults(
            sparse_rows(weights, indices),
            indices[0].dtype == torch.int64,
            workspace.data_ptr(),
            faults.data_ptr(),
            stream(weights[0]),
        )
    return faults


@implements("sparse_apply_", "cuda")
def sparse_apply_(
    weights: list[Tensor], indices: list[Tensor], values: list[Tensor], overwritten: list[Tensor]
) -> None:
    workspace = _workspace(_cuda.sparse_workspace(len(weights)), weights[0])
    with torch.cuda.device(weights[0].device):
        _cuda.sparse_apply(
            sparse_rows(weights, indices, values, overwritten),
            indices[0].dtype == torch.int64,
            workspace.data_ptr(),
            stream(weights[0]),
        )
