"""Grafting on GPUs, in Triton: the masked blend, its gradient, the mask's step, packed masks.

Lists of tensors go to the GPU as a table of pointers, and are served by one launch for each dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import implements
from .graft_kernels import (
    COLUMNS,
    blend_all_kernel,
    blend_kernel,
    choose_kernel,
    gradient_kernel,
    step_all_kernel,
    unpack_kernel,
)
from .launch import OPTIONS

# A thread takes one row: with more, the mask's step fills the registers.
LAUNCH = {"ROWS": 256, "num_warps": 8, **OPTIONS}
BLOCK = 8 * LAUNCH["ROWS"]

WEIGHTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _declines(weight: Tensor, *args) -> str | None:
    return None if weight.dtype in WEIGHTS else "leaves fp64 to the reference"


def _declines_list(weights: list[Tensor]) -> str | None:
    if any(weight.dtype not in WEIGHTS for weight in weights):
        return "leaves fp64 to the reference"
    if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return "copies a table of pointers to the GPU, which a CUDA graph does not capture"
    return None


def blocks(size: int) -> int:
    """Return the number of programs for so many entries."""
    return triton.cdiv(size, BLOCK)


def _launch_list(kernel, logits, pre, ft, base, gradients, out, *scalars, **constants) -> None:
    """Launch a kernel once for the tensors of each dtype; an empty list stands for null pointers."""
    columns = (logits, pre, ft, base, gradients, out)
    for dtype in dict.fromkeys(tensor.dtype for tensor in pre):
        table, first = [], 0
        for i, tensor in enumerate(pre):
            if tensor.dtype == dtype and tensor.numel():
                pointers = [column[i].data_ptr() if column else 0 for column in columns]
                table += [first, tensor.numel(), all(p % 16 == 0 for p in pointers), *pointers]
                first += blocks(tensor.numel())
        if not table:
            continue
        rows = torch.tensor(table, dtype=torch.int64)
        if pre[0].is_cuda:
            rows = rows.pin_memory().to(pre[0].device, non_blocking=True)
        with torch.cuda.device(pre[0].device):
            kernel[(first,)](
                rows, len(table) // COLUMNS, *scalars, WEIGHT=WEIGHTS[dtype], **constants, **LAUNCH
            )


@implements("graft_blend", "triton", _declines)
def graft_blend(pre: Tensor, ft: Tensor, logits: Tensor, base: Tensor | None, bias: float) -> Tensor:
    out = torch.empty_like(pre)
    size = pre.numel()
    with torch.cuda.device(pre.device):
        blend_kernel[(blocks(size),)](
            out, pre, ft, logits, base, bias, size, HAS_BASE=base is not None, **LAUNCH
        )
    return out


@implements("graft_logits_gradient", "triton", lambda gradient, pre, *args: _declines(pre))
def graft_logits_gradient(
    gradient: Tensor, pre: Tensor, ft: Tensor, logits: Tensor, base: Tensor | None, bias: float
) -> Tensor:
    out = torch.empty_like(logits)
    size = pre.numel()
    with torch.cuda.device(pre.device):
        gradient_kernel[(blocks(size),)](
            out, gradient, pre, ft, logits, base, bias, size, HAS_BASE=base is not None, **LAUNCH
        )
    return out


@implements("_foreach_graft_blend_", "triton", lambda out, *args: _declines_list(out))
def _foreach_graft_blend_(
    out: list[Tensor],
    pre: list[Tensor],
    ft: list[Tensor],
    logits: list[Tensor],
    base: list[Tensor],
    bias: float,
) -> None:
    _launch_list(blend_all_kernel, logits, pre, ft, base, [], out, bias, HAS_BASE=bool(base))


@implements("graft_mask_step_", "triton", lambda logits, gradients, pre, *args: _declines_list(pre))
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
    _launch_list(
        step_all_kernel, logits, pre, ft, base, grads, out, bias, lr, l1,
        HAS_BASE=bool(base), HAS_OUT=bool(out),
    )  # fmt: skip


@implements("unpack_mask", "triton")
def unpack_mask(packed: Tensor, count: int) -> Tensor:
    out = packed.new_empty(count, dtype=torch.bool)
    with torch.cuda.device(packed.device):
        unpack_kernel[(blocks(count),)](out.view(torch.uint8), packed, count, **LAUNCH)
    return out


@implements("graft_blend_packed", "triton")
def graft_blend_packed(pre: Tensor, ft: Tensor, mask: Tensor) -> Tensor:
    out, bits = torch.empty_like(pre), _BITS[pre.element_size()]
    size = pre.numel()
    with torch.cuda.device(pre.device):
        choose_kernel[(blocks(size),)](out.view(bits), pre.view(bits), ft.view(bits), mask, size, **LAUNCH)
    return out
