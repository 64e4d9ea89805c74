"""The associative write on GPUs, in Triton: K C⁻¹, the residual against W and the low-rank update of W.

They are bound by the bytes of W or C⁻¹ while the number of keys is small, so these are read once, in their
own type, and never held in another. Dots of fp32 operands say their precision: "tf32x3" carries fp32's digits
on the tensor cores; the single "tf32" would lose them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import implements
from ..native import decline_strided_columns, matrices
from .launch import OPTIONS

PRECISION = "tf32x3"
# Keys up to which an inverse in fp32 is read by P's kernel; beyond, fp64 products are the time.
PRECONDITION_KEYS = 64
# 27 KB of the inverse on their way a multiprocessor, at 14,336 columns.
PRECONDITION_LAUNCH = {
    "BLOCK_KEYS": 16, "BLOCK_ROWS": 16, "BLOCK_COLS": 64, "num_warps": 8, "num_stages": 5, **OPTIONS,
}  # fmt: skip
_HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


def update_launch(cols: int, batch_stride: int, row_stride: int) -> dict[str, int]:
    """Return the launch configuration of the update: the largest tile that compiles without spills."""
    # Where a row may begin anywhere, every entry has an address of its own: too many for four warps.
    aligned = cols % 16 == 0 and batch_stride % 16 == 0 and row_stride % 16 == 0
    return {
        "BLOCK_ROWS": 32, "BLOCK_COLS": 128, "BLOCK_RANK": 16, "num_warps": 4 if aligned else 8,
        "num_stages": 2, **OPTIONS,
    }  # fmt: skip


def residual_launch(count: int) -> dict[str, int]:
    """Return the launch configuration of the residual for a number of keys."""
    # Few rows of W a program: 4,096 rows must still fill 132 multiprocessors. Twice the keys, half the cols:
    # more would spill where the sizes are odd.
    keys, cols = (16, 64) if count <= 16 else (32, 32)
    return {
        "BLOCK_KEYS": keys, "BLOCK_ROWS": 32, "BLOCK_COLS": cols, "num_warps": 4, "num_stages": 3, **OPTIONS,
    }  # fmt: skip


@triton.jit
def _apply_low_rank_kernel(
    weight,
    left,
    right,
    rows,
    cols,
    rank,
    batch_stride,
    row_stride,
    scale,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """W[b] += scale · L[b] R[b]; one program a tile of one W."""
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    col_tiles = tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0)
    col_tile = program % col_tiles
    row_tile = (program // col_tiles) % row_tiles
    b = (program // (col_tiles * row_tiles)).to(tl.int64)

    i = row_tile.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    j = col_tile.to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
    inside = (i < rows)[:, None] & (j < cols)[None, :]
    tile = weight + b * batch_stride + i[:, None] * row_stride + j[None, :]
    left += b * rows * rank
    right += b * rank * cols

    old = tl.load(tile, mask=inside, other=0.0)  # asked for before the dots, so that it travels under them
    product = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        r = start + tl.arange(0, BLOCK_RANK)  # [BLOCK_RANK]
        a = tl.load(
            left + i[:, None] * rank + r[None, :], mask=(i < rows)[:, None] & (r < rank)[None, :], other=0.0
        )
        c = tl.load(
            right + r[:, None].to(tl.int64) * cols + j[None, :],
            mask=(r < rank)[:, None] & (j < cols)[None, :],
            other=0.0,
        )
        product = tl.dot(a, c, product, input_precision=PRECISION)
    new = tl.fma(scale, product, old.to(tl.float32))
    tl.store(tile, new.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def _residual_kernel(
    weight,
    keys,
    values,
    residual,
    rows,
    cols,
    count,
    batch_stride,
    row_stride,
    PRECISION: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """E[b] = V[b] − K[b] W[b]ᵀ; one program some rows of one W and a block of keys."""
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    key_tiles = tl.cdiv(count, BLOCK_KEYS)
    program = tl.program_id(0)
    key_tile = program % key_tiles
    row_tile = (program // key_tiles) % row_tiles
    b = (program // (key_tiles * row_tiles)).to(tl.int64)

    n = key_tile.to(tl.int64) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)  # [BLOCK_KEYS]
    i = row_tile.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    weight += b * batch_stride
    keys += b * count * cols

    product = tl.zeros((BLOCK_KEYS, BLOCK_ROWS), tl.float32)
    for start in range(0, cols, BLOCK_COLS):
        j = start + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
        k = tl.load(
            keys + n[:, None] * cols + j[None, :], mask=(n < count)[:, None] & (j < cols)[None, :], other=0.0
        )
        w = tl.load(
            weight + i[:, None] * row_stride + j[None, :],
            mask=(i < rows)[:, None] & (j < cols)[None, :],
            other=0.0,
        )
        product = tl.dot(k, tl.trans(w.to(tl.float32)), product, input_precision=PRECISION)
    place = b * count * rows + n[:, None] * rows + i[None, :]
    inside = (n < count)[:, None] & (i < rows)[None, :]
    wanted = tl.load(values + place, mask=inside, other=0.0)
    tl.store(residual + place, wanted - product, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _precondition_kernel(
    keys,
    inverse,
    out,
    count,
    width,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """P[b] = K[b] Q[b] in fp64; one program some columns of one Q and a block of keys."""
    key_tiles = tl.cdiv(count, BLOCK_KEYS)
    col_tiles = tl.cdiv(width, BLOCK_COLS)
    program = tl.program_id(0)
    key_tile = program % key_tiles
    col_tile = (program // key_tiles) % col_tiles
    b = (program // (key_tiles * col_tiles)).to(tl.int64)

    n = key_tile.to(tl.int64) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)  # [BLOCK_KEYS]
    j = col_tile.to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
    keys += b * count * width
    inverse += b * width * width

    product = tl.zeros((BLOCK_KEYS, BLOCK_COLS), tl.float64)
    for start in range(0, width, BLOCK_ROWS):
        i = start + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        k = tl.load(
            keys + n[:, None] * width + i[None, :],
            mask=(n < count)[:, None] & (i < width)[None, :],
            other=0.0,
        )
        q = tl.load(
            inverse + i[:, None].to(tl.int64) * width + j[None, :],
            mask=(i < width)[:, None] & (j < width)[None, :],
            other=0.0,
        )
        k, q = k.to(tl.float64), q.to(tl.float64)
        product = tl.dot(k, q, product, input_precision="ieee", out_dtype=tl.float64)
    place = out + b * count * width + n[:, None] * width + j[None, :]
    tl.store(place, product, mask=(n < count)[:, None] & (j < width)[None, :])


def _declines(weight: Tensor, *args) -> str | None:
    if weight.dtype not in _HALVES_AND_FLOAT:
        return f"takes fp32, bf16 and fp16 weights, not {str(weight.dtype).removeprefix('torch.')}"
    return decline_strided_columns(weight)


@implements("apply_low_rank_", "triton", _declines)
def apply_low_rank_(weight: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    batch, rows, cols, batch_stride, row_stride = matrices(weight)
    launch = update_launch(cols, batch_stride, row_stride)
    tiles = batch * triton.cdiv(rows, launch["BLOCK_ROWS"]) * triton.cdiv(cols, launch["BLOCK_COLS"])
    with torch.cuda.device(weight.device):
        _apply_low_rank_kernel[(tiles,)](
            weight,
            left.contiguous(),
            right.contiguous(),
            rows,
            cols,
            left.shape[-1],
            batch_stride,
            row_stride,
            alpha,
            PRECISION=PRECISION,
            **launch,
        )


def _declines_precondition(keys: Tensor, inverse: Tensor) -> str | None:
    if keys.dtype != torch.float32 or inverse.dtype != torch.float32:
        return "takes fp32 keys and inverses"
    if keys.shape[1] > PRECONDITION_KEYS:
        return f"leaves {keys.shape[1]} > {PRECONDITION_KEYS} keys to the library's GEMM"
    return None


@implements("precondition", "triton", _declines_precondition)
def precondition(keys: Tensor, inverse: Tensor) -> Tensor:
    batch, count, width = keys.shape
    out = torch.empty_like(keys, dtype=torch.float64, memory_format=torch.contiguous_format)
    launch = PRECONDITION_LAUNCH
    tiles = batch * triton.cdiv(width, launch["BLOCK_COLS"]) * triton.cdiv(count, launch["BLOCK_KEYS"])
    with torch.cuda.device(keys.device):
        _precondition_kernel[(tiles,)](
            keys.contiguous(),
            inverse.contiguous(),
            out,
            count,
            width,
            **launch,
        )
    return out


@implements("residual_gram", "triton", _declines)
def residual_gram(
    weight: Tensor, keys: Tensor, values: Tensor, preconditioned: Tensor
) -> tuple[Tensor, Tensor]:
    batch, rows, cols = weight.shape
    count = keys.shape[1]
    residual = torch.empty_like(values, memory_format=torch.contiguous_format)
    launch = residual_launch(count)
    tiles = batch * triton.cdiv(rows, launch["BLOCK_ROWS"]) * triton.cdiv(count, launch["BLOCK_KEYS"])
    with torch.cuda.device(weight.device):
        _residual_kernel[(tiles,)](
            weight,
            keys.contiguous(),
            values.contiguous(),
            residual,
            rows,
            cols,
            count,
            weight.stride(0),
            weight.stride(1),
            PRECISION=PRECISION,
            **launch,
        )
    # The Gram matrix is n × n in fp64: a plain GEMM, so it is the library's.
    return residual, keys.double() @ preconditioned.mT
