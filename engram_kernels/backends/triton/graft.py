"""Grafting on GPUs, in Triton: the masked blend, its gradient, the mask's step, packed masks.

Lists of tensors go to the GPU as a table of pointers, and are served by one launch for each dtype.
"""

from itertools import accumulate

import torch
import triton.language as tl
from torch import Tensor

from ...errors import EngramError
from .. import implements
from .graft_kernels import (
    ALIGNED,
    GRADIENT,
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
        return "copies a table of pointers to the GPU, which a CUDA graph does not capture: make a plan"
    return None


def blocks(size: int) -> int:
    """Return the number of programs for so many entries."""
    return -(-size // BLOCK)  # triton.cdiv takes microseconds


class _Rows:
    """The table of the tensors of one dtype, on their device."""

    def __init__(self, places: list[int], sizes: list[int], columns: list[list[int]], device: torch.device):
        """Take where in the lists they are, their sizes, and the columns of their pointers."""
        counts = [blocks(size) for size in sizes]
        self.places, self.blocks = places, sum(counts)
        self._aligned = [all(p % 16 == 0 for p in row) for row in zip(*columns, strict=True)]
        firsts = list(accumulate(counts, initial=0))[:-1]
        self._host = torch.tensor([firsts, sizes, self._aligned, *columns], dtype=torch.int64).T.contiguous()
        self._device, self._copy = device, None
        self._gradients: list[int] = []

    def on_device(self) -> Tensor:
        """Return the table, copied where it changed."""
        if self._device.type != "cuda":
            return self._host
        if self._copy is None:
            # Each copy from pinned memory of its own, which the allocator keeps until the copy is done.
            self._copy = self._host.pin_memory().to(self._device, non_blocking=True)
        return self._copy

    def set_gradients(self, pointers: list[int]) -> None:
        if pointers == self._gradients:
            return
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise EngramError(
                "grads: expected those of the last step while a CUDA graph is captured, got others: a graph "
                "keeps no copy of their addresses"
            )
        self._gradients, self._copy = pointers, None
        aligned = [whole and p % 16 == 0 for whole, p in zip(self._aligned, pointers, strict=True)]
        self._host[:, GRADIENT.value] = torch.tensor(pointers)
        self._host[:, ALIGNED.value] = torch.tensor(aligned)


@implements("graft_table", "triton", lambda logits, pre, *args: _declines_list(pre))
class GraftTable:
    """The lists of a blend as tables on the device, one for each dtype, ready for its steps."""

    def __init__(
        self, logits: list[Tensor], pre: list[Tensor], ft: list[Tensor], base: list[Tensor], out: list[Tensor]
    ):
        self._device, self._flags = pre[0].device, {"HAS_BASE": bool(base)}
        self._has_out = bool(out)
        sizes = [tensor.numel() for tensor in pre]
        dtypes = [tensor.dtype for tensor in pre]
        self._tables: list[tuple[torch.dtype, _Rows]] = []
        for dtype in dict.fromkeys(dtypes):
            places = [i for i, size in enumerate(sizes) if size and dtypes[i] == dtype]
            columns = [
                [column[i].data_ptr() for i in places] if column else [0] * len(places)
                for column in (logits, pre, ft, base, [], out)
            ]
            if places:
                rows = _Rows(places, [sizes[i] for i in places], columns, self._device)
                self._tables.append((dtype, rows))

    def blend_(self, bias: float) -> None:
        self._launch(blend_all_kernel, bias)

    def set_gradients(self, grads: list[Tensor]) -> None:
        pointers = [gradient.data_ptr() for gradient in grads]
        for _, rows in self._tables:
            rows.set_gradients([pointers[i] for i in rows.places])

    def step_(self, bias: float, lr: float, l1: float) -> None:
        self._launch(step_all_kernel, bias, lr, l1, HAS_OUT=self._has_out)

    def _launch(self, kernel, *scalars: float, **flags: bool) -> None:
        with torch.cuda.device(self._device):
            for dtype, rows in self._tables:
                kernel[(rows.blocks,)](
                    rows.on_device(), len(rows.places), *scalars,
                    WEIGHT=WEIGHTS[dtype], **self._flags, **flags, **LAUNCH,
                )  # fmt: skip


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
    GraftTable(logits, pre, ft, base, out).blend_(bias)


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
    table = GraftTable(logits, pre, ft, base, out)
    table.set_gradients(grads)
    table.step_(bias, lr, l1)


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
