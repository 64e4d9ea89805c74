"""Episodic memory on GPUs, in Triton: the streaming write to many small memories, and the write of few rows.

Neither uses `tl.dot`: the streaming write is a chain of matrix-vector products on a state that stays in
registers, and a few rows are bound by the bytes of the state that they are added to. All sums are taken in
the state's type.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import implements
from ..order import STREAM_SLOTS
from .launch import OPTIONS

# Entries of a latent whose places in M fit 32 bits.
STREAM_WIDTH = 2**24

# Above this many rows a memory the product is a GEMM, which is cuBLAS's. Not yet measured on a GPU.
GEMM_ROWS = 16
ACCUMULATE_LAUNCH = {"BLOCK_ROWS": 32, "BLOCK_COLS": 64, "num_warps": 4, **OPTIONS}


def stream_launch(slots: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the launch configuration of the streaming write for K, C and the state's type."""
    block = max(16, triton.next_power_of_2(slots))
    columns = min(64, max(16, triton.next_power_of_2(width)))
    # P and the block of M take 16 registers each of a thread, in fp64 8: what comes of them needs many more.
    warps = max(2, block * max(block, columns) * dtype.itemsize // (2048 if dtype == torch.float32 else 1024))
    return {"BLOCK_SLOTS": block, "BLOCK_WIDTH": columns, "num_warps": warps, **OPTIONS}


@triton.jit
def _entries(row, at, size, n, count):
    """A row's entries, or zeros if it is not one of the `count` rows."""
    return tl.load(row + at, mask=(at < size) & (n + 0 * at < count), other=0.0)


@triton.jit
def _reciprocal(x):
    """1 / x, rounded once. A division in fp64 is a call, for which assemblers put registers on a stack."""
    if x.dtype == tl.float64:
        return tl.inline_asm_elementwise("rcp.rn.f64 $0, $1;", "=d,d", [x], tl.float64, is_pure=True, pack=1)
    else:
        return 1.0 / x


# Of its own for 1 row and for multiples of 16, a kernel would save nothing, and be compiled at first use.
@triton.jit(do_not_specialize=["count"])
def stream_kernel(
    precision_inverse, memory, weights, latents, new_precision_inverse, new_memory, readouts, leverages,
    slots, width, count,
    BLOCK_SLOTS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """For every row: u = P w, g = w u; P −= u uᵀ/(1 + g), M += u (z − w M)/(1 + g); one program a block of M.

    All programs of a memory compute its P; the first stores it.
    """
    blocks = tl.cdiv(width, BLOCK_WIDTH)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    i = tl.arange(0, BLOCK_SLOTS)  # [BLOCK_SLOTS]
    c = tl.arange(0, BLOCK_WIDTH)  # [BLOCK_WIDTH], from the block's first column on
    first = block.to(tl.int64) * BLOCK_WIDTH
    columns = width - block * BLOCK_WIDTH
    # Within a memory 32 bits are enough for a place, and 64 would fill the registers.
    square = i[:, None] * slots + i[None, :]
    wide = i[:, None] * width + c[None, :]
    in_square = (i < slots)[:, None] & (i < slots)[None, :]
    in_wide = (i < slots)[:, None] & (c < columns)[None, :]

    before_square = b * slots * slots
    before_wide = b * slots * width + first
    p = tl.load(precision_inverse + before_square + square, mask=in_square, other=0.0)
    m = tl.load(memory + before_wide + wide, mask=in_wide, other=0.0)
    weights += b * count * slots
    latents += b * count * width + first
    readouts += b * count * width + first
    leverages += b * count
    # A row is asked for while the one before it is written.
    w = _entries(weights, i, slots, 0, count)
    z = _entries(latents, c, columns, 0, count)
    for n in range(count):
        weights += slots
        latents += width
        w_next = _entries(weights, i, slots, n + 1, count)
        z_next = _entries(latents, c, columns, n + 1, count)
        u = tl.sum(p * w[None, :], axis=1)
        gain = tl.sum(u * w, axis=0)
        share = _reciprocal(1.0 + gain)  # one a row: in fp64 each takes many registers
        step = (z - tl.sum(w[:, None] * m, axis=0)) * share
        p = tl.fma(u[:, None], (-u * share)[None, :], p)
        m = tl.fma(u[:, None], step[None, :], m)
        tl.store(readouts + c, z - step, mask=c < columns)
        if block == 0:
            tl.store(leverages + n, gain * share)
        readouts += width
        w = w_next
        z = z_next
    if block == 0:
        tl.store(new_precision_inverse + before_square + square, p, mask=in_square)
    tl.store(new_memory + before_wide + wide, m, mask=in_wide)


@triton.jit
def _add_products(
    state, left, alpha, right, i, rows, j, columns, slots, begin, end, state_row, state_column,
    HAS_ALPHA: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """state[i, j] += Σ αₙ leftₙᵢ rightₙⱼ over the rows from `begin` to `end`."""
    kind: tl.constexpr = state.dtype.element_ty
    place = state + i[:, None] * state_row + j[None, :] * state_column
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    old = tl.load(place, mask=inside, other=0.0)  # asked for before the rows, so that it travels with them
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), kind)
    for n in range(begin, end):
        a = tl.load(left + n * slots + i, mask=i < rows, other=0.0).to(kind)
        if HAS_ALPHA:
            a *= tl.load(alpha + n)
        c = tl.load(right + n * columns + j, mask=j < columns, other=0.0).to(kind)
        total = tl.fma(a[:, None], c[None, :], total)
    tl.store(place, old + total, mask=inside)


@triton.jit(do_not_specialize=["count"])
def accumulate_kernel(
    gram, cross, weights, latents, alpha, ends, slots, width, count,
    gram_batch, gram_row, gram_column, cross_batch, cross_row, cross_column,
    HAS_ALPHA: tl.constexpr, RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """A += Σ αₙ wₙᵀwₙ, B += Σ αₙ wₙᵀzₙ; one program a tile of one A or of one B."""
    row_tiles = tl.cdiv(slots, BLOCK_ROWS)
    gram_tiles = tl.cdiv(slots, BLOCK_COLS)
    tiles = gram_tiles + tl.cdiv(width, BLOCK_COLS)
    program = tl.program_id(0)
    tile = program % tiles
    i = ((program // tiles) % row_tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    b = (program // (tiles * row_tiles)).to(tl.int64)
    if RAGGED:
        begin = tl.load(ends + b).to(tl.int64)
        end = tl.load(ends + b + 1).to(tl.int64)
    else:
        begin = b * count
        end = begin + count
    if tile < gram_tiles:
        j = tile.to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
        _add_products(
            gram + b * gram_batch, weights, alpha, weights, i, slots, j, slots, slots, begin, end,
            gram_row, gram_column, HAS_ALPHA, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
    else:
        j = (tile - gram_tiles).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        _add_products(
            cross + b * cross_batch, weights, alpha, latents, i, slots, j, width, slots, begin, end,
            cross_row, cross_column, HAS_ALPHA, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip


def _declines_stream(precision_inverse: Tensor, memory: Tensor, *args) -> str | None:
    slots, limit = precision_inverse.shape[-1], STREAM_SLOTS[memory.dtype]
    if slots > limit:
        return f"leaves {slots} > {limit} slots, which it has no registers for"
    if memory.shape[-1] > STREAM_WIDTH:
        return f"leaves latents of {memory.shape[-1]} > {STREAM_WIDTH} entries to the reference"
    return None


def _declines_accumulate(
    gram: Tensor, cross: Tensor, weights: Tensor, latents: Tensor, alpha: Tensor | None, ends: Tensor | None
) -> str | None:
    rows = weights.shape[-2] / gram.shape[0] if ends is not None else weights.shape[-2]
    return f"leaves {rows:g} > {GEMM_ROWS} rows a memory to the library's GEMM" if rows > GEMM_ROWS else None


@implements("memory_stream", "triton", _declines_stream)
def memory_stream(
    precision_inverse: Tensor, memory: Tensor, weights: Tensor, latents: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = [tensor.contiguous() for tensor in (precision_inverse, memory, weights, latents)]
    batch, slots, width = memory.shape
    count = weights.shape[1]
    outputs = (
        torch.empty_like(inputs[0]),
        torch.empty_like(inputs[1]),
        torch.empty_like(inputs[3]),
        inputs[2].new_empty(batch, count),
    )
    launch = stream_launch(slots, width, memory.dtype)
    programs = batch * triton.cdiv(width, launch["BLOCK_WIDTH"])
    with torch.cuda.device(memory.device):
        stream_kernel[(programs,)](*inputs, *outputs, slots, width, count, **launch)
    return outputs


@implements("memory_accumulate_", "triton", _declines_accumulate)
def memory_accumulate_(
    gram: Tensor,
    cross: Tensor,
    weights: Tensor,
    latents: Tensor,
    alpha: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    batch, slots, width = cross.shape
    rows, columns = ACCUMULATE_LAUNCH["BLOCK_ROWS"], ACCUMULATE_LAUNCH["BLOCK_COLS"]
    tiles = triton.cdiv(slots, rows) * (triton.cdiv(slots, columns) + triton.cdiv(width, columns))
    with torch.cuda.device(gram.device):
        accumulate_kernel[(batch * tiles,)](
            gram,
            cross,
            weights.contiguous(),
            latents.contiguous(),
            None if alpha is None else alpha.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            slots,
            width,
            weights.shape[-2],
            *gram.stride(),
            *cross.stride(),
            HAS_ALPHA=alpha is not None,
            RAGGED=cu_seqlens is not None,
            **ACCUMULATE_LAUNCH,
        )
