"""Grafting's kernels in Triton: the masked blend, its gradient, the mask's step, packed masks.

All are bound by the bytes that they move. A program takes 8 · ROWS entries as rows of eight, each with one
byte of a packed mask. Whole blocks are read and written without a condition, which would keep the accesses
from being 16 bytes wide; the same code with a condition takes the rest.
"""

import triton
import triton.language as tl

# -- a row's entries, and the formulas -----------------------------------------------------------------------


@triton.jit
def _positions(begin, ROWS: tl.constexpr):
    """The bytes of a packed mask [ROWS, 1] and the entries [ROWS, 8] from entry `begin` on."""
    byte = begin // 8 + tl.arange(0, ROWS)[:, None]
    return byte, byte * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _load(pointer, at, size, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointer + at)
    else:
        return tl.load(pointer + at, mask=at < size, other=0)


@triton.jit
def _store(pointer, at, value, size, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointer + at, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=at < size)


@triton.jit
def _bits(mask, byte, size, WHOLE: tl.constexpr):
    """The bits of a packed mask [ROWS, 8]."""
    return ((_load(mask, byte, (size + 7) // 8, WHOLE).to(tl.int32) >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def _flips(base, byte, size, HAS_BASE: tl.constexpr, WHOLE: tl.constexpr):
    """Where s = −1."""
    if HAS_BASE:
        return _bits(base, byte, size, WHOLE)
    else:
        return tl.full((1, 1), 0, tl.int1)


@triton.jit
def _signed(value, flips):
    return tl.where(flips, -value, value)


@triton.jit
def _lesser_gate(x):
    """σ(−|x|), at most ½; NaN stays."""
    y = -tl.abs(x)
    y = tl.where(y < -104.0, -104.0, y)
    # One power of two. tl.exp alone loses digits in proportion to |x|, and upstream's gates lie around
    # |x| = 10: what rounding y / ln 2 leaves, 1 / ln 2's own rest too, multiplies the power afterwards.
    exponent = y * 1.44269502
    rest = tl.fma(y, 1.92596303e-8, tl.fma(y, 1.44269502, -exponent))
    power = tl.exp2(exponent)
    power = tl.fma(power, rest * 0.693147182, power)
    # power / (1 + power), by a Newton step from the approximate reciprocal: a third of an exact division.
    near = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, is_pure=True, pack=1
    )
    quotient = power * near
    return tl.fma(tl.fma(-(1.0 + power), quotient, power), near, quotient)


@triton.jit
def _blend(pre, ft, x):
    """θ = pre + γ (ft − pre), from the nearer end: a gate of 0 or 1 gives pre or ft bit for bit."""
    near = tl.where(x < 0, pre, ft)
    far = tl.where(x < 0, ft, pre)
    return tl.fma(_lesser_gate(x), far - near, near)


@triton.jit
def _slope(gradient, pre, ft, x, l1):
    """γ (1 − γ) (g (ft − pre) + l1)."""
    small = _lesser_gate(x)
    return small * (1.0 - small) * tl.fma(gradient, ft - pre, l1)


# -- one tensor ----------------------------------------------------------------------------------------------


@triton.jit
def _blend_rows(
    out, pre, ft, logits, base, bias, begin, size,
    HAS_BASE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    byte, i = _positions(begin, ROWS)
    x = _signed(_load(logits, i, size, WHOLE) - bias, _flips(base, byte, size, HAS_BASE, WHOLE))
    a = _load(pre, i, size, WHOLE).to(tl.float32)
    b = _load(ft, i, size, WHOLE).to(tl.float32)
    _store(out, i, _blend(a, b, x), size, WHOLE)


@triton.jit(do_not_specialize=["size"])
def blend_kernel(out, pre, ft, logits, base, bias, size, HAS_BASE: tl.constexpr, ROWS: tl.constexpr):
    """θ = pre + γ (ft − pre); one program a block of entries."""
    begin = tl.program_id(0).to(tl.int64) * (8 * ROWS)
    if begin + 8 * ROWS <= size:
        _blend_rows(out, pre, ft, logits, base, bias, begin, size, HAS_BASE, True, ROWS)
    else:
        _blend_rows(out, pre, ft, logits, base, bias, begin, size, HAS_BASE, False, ROWS)


@triton.jit
def _gradient_rows(
    out, gradient, pre, ft, logits, base, bias, begin, size,
    HAS_BASE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    byte, i = _positions(begin, ROWS)
    flips = _flips(base, byte, size, HAS_BASE, WHOLE)
    x = _signed(_load(logits, i, size, WHOLE) - bias, flips)
    g = _load(gradient, i, size, WHOLE).to(tl.float32)
    a = _load(pre, i, size, WHOLE).to(tl.float32)
    b = _load(ft, i, size, WHOLE).to(tl.float32)
    _store(out, i, _signed(_slope(g, a, b, x, 0.0), flips), size, WHOLE)


@triton.jit(do_not_specialize=["size"])
def gradient_kernel(
    out, gradient, pre, ft, logits, base, bias, size, HAS_BASE: tl.constexpr, ROWS: tl.constexpr
):
    """dS = s γ (1 − γ) g (ft − pre); one program a block of entries."""
    begin = tl.program_id(0).to(tl.int64) * (8 * ROWS)
    if begin + 8 * ROWS <= size:
        _gradient_rows(out, gradient, pre, ft, logits, base, bias, begin, size, HAS_BASE, True, ROWS)
    else:
        _gradient_rows(out, gradient, pre, ft, logits, base, bias, begin, size, HAS_BASE, False, ROWS)


@triton.jit
def _choose_rows(out, pre, ft, mask, begin, size, WHOLE: tl.constexpr, ROWS: tl.constexpr):
    byte, i = _positions(begin, ROWS)
    bits = _bits(mask, byte, size, WHOLE)
    _store(out, i, tl.where(bits, _load(ft, i, size, WHOLE), _load(pre, i, size, WHOLE)), size, WHOLE)


@triton.jit(do_not_specialize=["size"])
def choose_kernel(out, pre, ft, mask, size, ROWS: tl.constexpr):
    """ft where the mask's bit is 1, else pre, as integers; one program a block of entries."""
    begin = tl.program_id(0).to(tl.int64) * (8 * ROWS)
    if begin + 8 * ROWS <= size:
        _choose_rows(out, pre, ft, mask, begin, size, True, ROWS)
    else:
        _choose_rows(out, pre, ft, mask, begin, size, False, ROWS)


@triton.jit(do_not_specialize=["size"])
def unpack_kernel(out, packed, size, ROWS: tl.constexpr):
    """A byte, 0 or 1, for each bit; one program a block of entries."""
    begin = tl.program_id(0).to(tl.int64) * (8 * ROWS)
    byte, i = _positions(begin, ROWS)
    if begin + 8 * ROWS <= size:
        _store(out, i, _bits(packed, byte, size, True), size, True)
    else:
        _store(out, i, _bits(packed, byte, size, False), size, False)


# -- a list of tensors ---------------------------------------------------------------------------------------

# The columns of a table with one row for each tensor: the number of its first block, its size, whether its
# pointers are all multiples of 16, and the pointers.
COLUMNS = 9
FIRST, SIZE, ALIGNED, LOGITS, PRE, FT, BASE, GRADIENT, OUT = (tl.constexpr(i) for i in range(COLUMNS))
WIDTH = tl.constexpr(COLUMNS)


@triton.jit
def _find(table, count, block):
    """The row of the tensor that a block belongs to: the last that does not begin after it."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table + middle * WIDTH + FIRST) <= block:
            low = middle
        else:
            high = middle
    return table + low * WIDTH


@triton.jit
def _pointer(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    if WHOLE:
        return tl.multiple_of(pointer, 16)
    else:
        return pointer


@triton.jit
def _blend_listed(
    row, bias, begin, size,
    WEIGHT: tl.constexpr, HAS_BASE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    _blend_rows(
        _pointer(row, OUT, WEIGHT, WHOLE),
        _pointer(row, PRE, WEIGHT, WHOLE),
        _pointer(row, FT, WEIGHT, WHOLE),
        _pointer(row, LOGITS, tl.float32, WHOLE),
        _pointer(row, BASE, tl.uint8, WHOLE),
        bias, begin, size, HAS_BASE, WHOLE, ROWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def blend_all_kernel(table, count, bias, WEIGHT: tl.constexpr, HAS_BASE: tl.constexpr, ROWS: tl.constexpr):
    """`blend_kernel` over all tensors of a table."""
    block = tl.program_id(0).to(tl.int64)
    row = _find(table, count, block)
    begin = (block - tl.load(row + FIRST)) * (8 * ROWS)
    size = tl.load(row + SIZE)
    if (begin + 8 * ROWS <= size) & (tl.load(row + ALIGNED) != 0):
        _blend_listed(row, bias, begin, size, WEIGHT, HAS_BASE, True, ROWS)
    else:
        _blend_listed(row, bias, begin, size, WEIGHT, HAS_BASE, False, ROWS)


@triton.jit
def _step_listed(
    row, bias, lr, l1, begin, size,
    WEIGHT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_OUT: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    byte, i = _positions(begin, ROWS)
    logits = _pointer(row, LOGITS, tl.float32, WHOLE)
    old = _load(logits, i, size, WHOLE)
    g = _load(_pointer(row, GRADIENT, WEIGHT, WHOLE), i, size, WHOLE).to(tl.float32)
    a = _load(_pointer(row, PRE, WEIGHT, WHOLE), i, size, WHOLE).to(tl.float32)
    b = _load(_pointer(row, FT, WEIGHT, WHOLE), i, size, WHOLE).to(tl.float32)
    flips = _flips(_pointer(row, BASE, tl.uint8, WHOLE), byte, size, HAS_BASE, WHOLE)
    new = tl.fma(-lr, _signed(_slope(g, a, b, _signed(old - bias, flips), l1), flips), old)
    _store(logits, i, new, size, WHOLE)
    if HAS_OUT:
        theta = _blend(a, b, _signed(new - bias, flips))
        _store(_pointer(row, OUT, WEIGHT, WHOLE), i, theta, size, WHOLE)


@triton.jit(do_not_specialize=["count"])
def step_all_kernel(
    table, count, bias, lr, l1,
    WEIGHT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_OUT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """S −= lr · s γ (1 − γ) (g (ft − pre) + l1), then θ of the new S, over all tensors of a table."""
    block = tl.program_id(0).to(tl.int64)
    row = _find(table, count, block)
    begin = (block - tl.load(row + FIRST)) * (8 * ROWS)
    size = tl.load(row + SIZE)
    if (begin + 8 * ROWS <= size) & (tl.load(row + ALIGNED) != 0):
        _step_listed(row, bias, lr, l1, begin, size, WEIGHT, HAS_BASE, HAS_OUT, True, ROWS)
    else:
        _step_listed(row, bias, lr, l1, begin, size, WEIGHT, HAS_BASE, HAS_OUT, False, ROWS)
