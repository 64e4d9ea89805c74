"""Sparse differences in Triton: a packed mask of what changed, then its positions and values in order.

A program takes the same block of entries in both kernels; how many of them changed, summed up over the blocks
before, says where its first one goes. So the order is that of the entries, whichever program comes first.
"""

import triton
import triton.language as tl

from .graft_kernels import _bits, _find, _load, _positions, _store

# The columns of a table with one row for each tensor, as wide as that of `graft_kernels`: the number of its
# first block, its size, whether its pointers are all multiples of 16, the pointers, and how many entries
# changed.
FIRST, SIZE, ALIGNED, OLD, NEW, MASK, INDICES, VALUES, CHANGED = (tl.constexpr(i) for i in range(9))


@triton.jit
def _at(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    if WHOLE:
        return tl.multiple_of(pointer, 16)
    else:
        return pointer


@triton.jit
def _changed(a, b, threshold, FLOAT: tl.constexpr):
    """Where bits differ and, with a type of floats, the difference in fp32 is above the threshold or NaN."""
    differs = a != b
    if FLOAT is not None:
        change = b.to(FLOAT, bitcast=True).to(tl.float32) - a.to(FLOAT, bitcast=True).to(tl.float32)
        differs = differs & ((tl.abs(change) <= threshold) == 0)
    return differs


@triton.jit
def _mark(
    row, threshold, begin, size,
    BITS: tl.constexpr, FLOAT: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write a block's part of the packed mask, and return how many of its entries changed."""
    byte, i = _positions(begin, ROWS)
    old = _load(_at(row, OLD, BITS, WHOLE), i, size, WHOLE)
    new = _load(_at(row, NEW, BITS, WHOLE), i, size, WHOLE)
    # Beyond the end both are 0.
    bits = _changed(old, new, threshold, FLOAT).to(tl.int32)
    packed = tl.sum(bits << tl.arange(0, 8)[None, :], axis=1, keep_dims=True)
    _store(_at(row, MASK, tl.uint8, WHOLE), byte, packed, (size + 7) // 8, WHOLE)
    return tl.sum(tl.sum(bits, axis=1), axis=0)


@triton.jit(do_not_specialize=["count"])
def diff_kernel(table, count, threshold, found, BITS: tl.constexpr, FLOAT: tl.constexpr, ROWS: tl.constexpr):
    """Packed masks of what changed, and how many entries of each block did; one program a block."""
    block = tl.program_id(0).to(tl.int64)
    row = _find(table, count, block)
    begin = (block - tl.load(row + FIRST)) * (8 * ROWS)
    size = tl.load(row + SIZE)
    if (begin + 8 * ROWS <= size) & (tl.load(row + ALIGNED) != 0):
        here = _mark(row, threshold, begin, size, BITS, FLOAT, True, ROWS)
    else:
        here = _mark(row, threshold, begin, size, BITS, FLOAT, False, ROWS)
    tl.store(found + block, here)


@triton.jit(do_not_specialize=["count"])
def select_kernel(table, count, ends, BITS: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr):
    """Positions and values of the mask's ones; `ends` are the sums of `found` up to and with each block."""
    block = tl.program_id(0).to(tl.int64)
    row = _find(table, count, block)
    first = tl.load(row + FIRST)
    begin = (block - first) * (8 * ROWS)
    size = tl.load(row + SIZE)
    byte, i = _positions(begin, ROWS)
    bits = _bits(_at(row, MASK, tl.uint8, False), byte, size, False)
    ones = bits.to(tl.int32)
    before = tl.load(ends + block - 1, mask=block > 0, other=0)
    before -= tl.load(ends + first - 1, mask=first > 0, other=0)
    rows = tl.sum(ones, axis=1)
    in_block = (tl.cumsum(rows, axis=0) - rows)[:, None] + tl.cumsum(ones, axis=1) - ones
    to = before + in_block
    chosen = bits & (to < tl.load(row + CHANGED))
    values = tl.load(_at(row, NEW, BITS, False) + i, mask=chosen)
    tl.store(_at(row, INDICES, INDEX, False) + to, i.to(INDEX), mask=chosen)
    tl.store(_at(row, VALUES, BITS, False) + to, values, mask=chosen)
