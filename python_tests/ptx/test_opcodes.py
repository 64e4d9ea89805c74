"""Every group of PTX instructions that the machine knows, against numpy and torch."""

import numpy as np
import pytest
import torch

from . import build

pytestmark = pytest.mark.skipif(build.CXX is None, reason="no C++ compiler to build the PTX machine with")

U8, U16, U32, U64, S16, S32, S64, F32, F64 = (
    np.dtype(name) for name in ("u1", "u2", "u4", "u8", "i2", "i4", "i8", "f4", "f8")
)
BOOL = np.dtype(bool)


def integers(dtype: np.dtype, seed: int = 0) -> np.ndarray:
    """32 integers of all sizes, the extremes among them."""
    generator = np.random.default_rng(seed)
    bits = 8 * dtype.itemsize
    values = [0, 1, 2, bits - 1, bits, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1]
    values += [
        int(generator.integers(1 << 62)) >> int(generator.integers(62)) for _ in range(32 - len(values))
    ]
    values = np.array([value % 2**bits for value in values], np.dtype(f"u{dtype.itemsize}")).view(dtype)
    return np.roll(values, seed)


def floats(dtype: np.dtype, seed: int = 0) -> np.ndarray:
    """32 floats: zeros, infinities, NaN, subnormals, and numbers of many magnitudes."""
    generator = np.random.default_rng(seed)
    tiny = np.finfo(dtype).smallest_subnormal
    special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        np.inf,
        -np.inf,
        np.nan,
        tiny,
        -3 * tiny,
        0.5,
        1.5,
        2.5,
        np.finfo(dtype).max,
    ]
    ordinary = generator.standard_normal(32 - len(special)) * 10.0 ** generator.integers(
        -8, 8, 32 - len(special)
    )
    return np.roll(np.array([*special, *ordinary], dtype), seed)


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Bit by bit, but for NaN, of which one is like another, and with the sign of zero."""
    expected = np.asarray(expected, got.dtype)
    np.testing.assert_array_equal(got, expected)
    if got.dtype.kind == "f":
        real = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(got[real]), np.signbit(expected[real]))


def arithmetic(function):
    """Wrap where numpy would warn."""

    def quiet(*arrays):
        with np.errstate(all="ignore"):
            return function(*arrays)

    return quiet


def truncated(a, b):  # numpy's rounds down
    quotients = [
        abs(int(x)) // abs(int(y)) * (-1 if (x < 0) != (y < 0) else 1) for x, y in zip(a, b, strict=True)
    ]
    return np.array([q & 2 ** (8 * a.itemsize) - 1 for q in quotients], f"u{a.itemsize}").view(a.dtype)


def high(a, b):
    bits = 8 * a.itemsize
    products = [int(x) * int(y) >> bits & 2**bits - 1 for x, y in zip(a, b, strict=True)]
    return np.array(products, f"u{a.itemsize}").view(a.dtype)


TYPES = {"s16": S16, "u16": U16, "s32": S32, "u32": U32, "s64": S64, "u64": U64}
TWO = {
    "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("opcode", TWO)
def test_integers(ptx, opcode, name):
    a, b = integers(TYPES[name]), integers(TYPES[name], 5)
    form = name.replace("s", "b").replace("u", "b") if opcode in ("and", "or", "xor") else name
    same(ptx.lanes(f"{opcode}.{form} {{d}}, {{a}}, {{b}}", a.dtype, a, b), arithmetic(TWO[opcode])(a, b))


@pytest.mark.parametrize("name", ["s32", "u32", "s64", "u64"])
def test_division(ptx, name):
    a, b = integers(TYPES[name]), integers(TYPES[name], 5)
    b[b == 0] = 3
    quotient = truncated(a, b)
    same(ptx.lanes(f"div.{name} {{d}}, {{a}}, {{b}}", a.dtype, a, b), quotient)
    remainder = arithmetic(lambda: a - quotient * b)()
    same(ptx.lanes(f"rem.{name} {{d}}, {{a}}, {{b}}", a.dtype, a, b), remainder)


@pytest.mark.parametrize("name", ["s16", "u16", "s32", "u32"])
def test_high_products(ptx, name):
    a, b = integers(TYPES[name]), integers(TYPES[name], 5)
    same(ptx.lanes(f"mul.hi.{name} {{d}}, {{a}}, {{b}}", a.dtype, a, b), high(a, b))


@pytest.mark.parametrize("name, wide", [("s16", S32), ("u16", U32), ("s32", S64), ("u32", U64)])
def test_wide_products(ptx, name, wide):
    a, b, c = integers(TYPES[name]), integers(TYPES[name], 5), integers(wide)
    product = a.astype(wide) * b.astype(wide)
    same(ptx.lanes(f"mul.wide.{name} {{d}}, {{a}}, {{b}}", wide, a, b), product)
    same(
        ptx.lanes(f"mad.wide.{name} {{d}}, {{a}}, {{b}}, {{c}}", wide, a, b, c),
        arithmetic(np.add)(product, c),
    )


@pytest.mark.parametrize("name", ["s32", "s64"])
def test_multiply_add_negate_absolute(ptx, name):
    a, b, c = (integers(TYPES[name], seed) for seed in (0, 5, 9))
    expected = arithmetic(lambda: a * b + c)()
    same(ptx.lanes(f"mad.lo.{name} {{d}}, {{a}}, {{b}}, {{c}}", a.dtype, a, b, c), expected)
    same(ptx.lanes(f"neg.{name} {{d}}, {{a}}", a.dtype, a), arithmetic(np.negative)(a))
    same(ptx.lanes(f"abs.{name} {{d}}, {{a}}", a.dtype, a), arithmetic(np.abs)(a))


@pytest.mark.parametrize("name", TYPES)
def test_shifts(ptx, name):
    a = integers(TYPES[name])
    by = np.array([0, 1, 5, 8 * a.itemsize - 1, 8 * a.itemsize, 200, 2**31, 3] * 4, U32)
    bits = 8 * a.itemsize
    left = np.array(
        [(int(x) << min(int(n), bits)) & 2**bits - 1 for x, n in zip(a, by, strict=True)], f"u{a.itemsize}"
    )
    right = np.array([int(x) >> min(int(n), bits) for x, n in zip(a, by, strict=True)], object).astype(
        a.dtype
    )
    same(ptx.lanes(f"shl.b{bits} {{d}}, {{a}}, {{b}}", a.dtype, a, by), left.view(a.dtype))
    same(ptx.lanes(f"shr.{name} {{d}}, {{a}}, {{b}}", a.dtype, a, by), right)


def field(value: int, bits: int, signed: bool, start: int, length: int) -> int:
    pattern = value & 2**bits - 1
    result = pattern >> start & 2**length - 1 if start < bits else 0
    sign = signed and length and pattern >> min(start + length - 1, bits - 1) & 1
    return result | (2**bits - 2 ** min(length, max(bits - start, 0)) if sign else 0)


@pytest.mark.parametrize("name", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("start, length", [(0, 8), (3, 5), (28, 8), (0, 0), (31, 1), (70, 4)])
def test_fields(ptx, name, start, length):
    a, b = integers(TYPES[name]), integers(TYPES[name], 5)
    bits, mask = 8 * a.itemsize, 2 ** (8 * a.itemsize) - 1
    expected = [field(int(x), bits, name[0] == "s", start, length) & mask for x in a]
    got = ptx.lanes(f"bfe.{name} {{d}}, {{a}}, {start}, {length}", a.dtype, a)
    same(got, np.array(expected, f"u{a.itemsize}").view(a.dtype))
    place = (2**length - 1 << start) & mask
    inserted = [(int(y) & mask & ~place) | (int(x) << start & place) for x, y in zip(a, b, strict=True)]
    got = ptx.lanes(f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {start}, {length}", a.dtype, a, b)
    same(got, np.array(inserted, f"u{a.itemsize}").view(a.dtype))


def test_bits(ptx):
    a, b = integers(U32), integers(U32, 5)
    same(ptx.lanes("not.b32 {d}, {a}", U32, a), ~a)
    same(ptx.lanes("popc.b32 {d}, {a}", U32, a), [int(x).bit_count() for x in a])
    # Bytes 1, 6, the sign of 3, and 4.
    bytes_of = [
        int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little") for x, y in zip(a, b, strict=True)
    ]
    expected = [s[1] | s[6] << 8 | (255 if s[3] > 127 else 0) << 16 | s[4] << 24 for s in bytes_of]
    same(ptx.lanes("prmt.b32 {d}, {a}, {b}, 0x4B61", U32, a, b), expected)


FLOATS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div.rn": np.divide}


@pytest.mark.parametrize("dtype, name", [(F32, "f32"), (F64, "f64")])
@pytest.mark.parametrize("opcode", FLOATS)
def test_floats(ptx, opcode, dtype, name):
    a, b = floats(dtype), floats(dtype, 7)
    same(ptx.lanes(f"{opcode}.{name} {{d}}, {{a}}, {{b}}", dtype, a, b), arithmetic(FLOATS[opcode])(a, b))


@pytest.mark.parametrize("dtype, name", [(F32, "f32"), (F64, "f64")])
def test_floats_of_one_and_three(ptx, dtype, name):
    a, b, c = floats(dtype), floats(dtype, 7), floats(dtype, 3)
    same(ptx.lanes(f"sqrt.rn.{name} {{d}}, {{a}}", dtype, a), arithmetic(np.sqrt)(a))
    same(ptx.lanes(f"rcp.rn.{name} {{d}}, {{a}}", dtype, a), arithmetic(np.divide)(dtype.type(1), a))
    same(ptx.lanes(f"neg.{name} {{d}}, {{a}}", dtype, a), -a)
    same(ptx.lanes(f"abs.{name} {{d}}, {{a}}", dtype, a), np.abs(a))
    same(ptx.lanes(f"min.{name} {{d}}, {{a}}, {{b}}", dtype, a, b), np.fmin(a, b))
    same(ptx.lanes(f"max.{name} {{d}}, {{a}}, {{b}}", dtype, a, b), np.fmax(a, b))
    got = ptx.lanes(f"fma.rn.{name} {{d}}, {{a}}, {{b}}, {{c}}", dtype, a, b, c)
    exact = arithmetic(lambda: (a.astype(np.longdouble) * b + c).astype(dtype))()
    if dtype == F32:  # 64 bits of mantissa hold the products of fp32
        same(got, exact)
    one = dtype.type(1) + np.finfo(dtype).eps
    lost = ptx.lanes(
        f"fma.rn.{name} {{d}}, {{a}}, {{a}}, {{b}}", dtype, np.array([one]), np.array([-one * one])
    )
    assert lost[0] == np.finfo(dtype).eps ** 2


def test_zeros_are_ordered_and_nan_is_one(ptx):
    a, b = np.array([0.0, -0.0, np.nan, 1.0], F32), np.array([-0.0, 0.0, 1.0, np.nan], F32)
    same(ptx.lanes("min.f32 {d}, {a}, {b}", F32, a, b), [-0.0, -0.0, 1, 1])
    same(ptx.lanes("max.f32 {d}, {a}, {b}", F32, a, b), [0.0, 0.0, 1, 1])
    bits = ptx.lanes("add.f32 {d}, {a}, {b}", F32, a, b).view(U32)
    assert bits[2] == bits[3] == 0x7FFFFFFF


def test_pairs_and_mixed_sums(ptx):
    a, b, c = (floats(F32, seed) for seed in (0, 7, 3))
    wide = [np.stack([x, np.roll(x, 1)], 1).copy().view(U64)[:, 0] for x in (a, b, c)]
    pairs = [x.view(F32).reshape(-1, 2) for x in wide]
    for opcode, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        got = ptx.lanes(f"{opcode}.f32x2 {{d}}, {{a}}, {{b}}", U64, *wide[:2]).view(F32).reshape(-1, 2)
        same(got, arithmetic(function)(*pairs[:2]))
    fused = ptx.lanes("fma.rn.f32x2 {d}, {a}, {b}, {c}", U64, *wide).view(F32).reshape(-1, 2)
    same(fused, arithmetic(lambda: (pairs[0].astype(F64) * pairs[1] + pairs[2]).astype(F32))())
    half = arithmetic(lambda: a.astype(np.float16))()
    same(
        ptx.lanes("sub.rn.f32.f16 {d}, {a}, {b}", F32, half.view(U16), b),
        arithmetic(np.subtract)(half.astype(F32), b),
    )


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip


@pytest.mark.parametrize("opcode", COMPARISONS)
def test_comparisons(ptx, opcode):
    compare = COMPARISONS[opcode]
    for name in ("s32", "u32", "s64", "u16"):
        a, b = integers(TYPES[name]), integers(TYPES[name], 1)
        b[::3] = a[::3]
        same(ptx.lanes(f"setp.{opcode}.{name} {{d}}, {{a}}, {{b}}", BOOL, a, b), compare(a, b))
    a, b = floats(F32), floats(F32, 1)
    b[::3] = a[::3]
    unordered = np.isnan(a) | np.isnan(b)
    same(ptx.lanes(f"setp.{opcode}.f32 {{d}}, {{a}}, {{b}}", BOOL, a, b), compare(a, b) & ~unordered)
    same(ptx.lanes(f"setp.{opcode}u.f32 {{d}}, {{a}}, {{b}}", BOOL, a, b), compare(a, b) | unordered)
    same(ptx.lanes("setp.num.f32 {d}, {a}, {b}", BOOL, a, b), ~unordered)
    same(ptx.lanes("setp.nan.f32 {d}, {a}, {b}", BOOL, a, b), unordered)


def test_predicates(ptx):
    p, q = np.arange(32) % 2 == 0, np.arange(32) % 3 == 0
    for opcode in ("and", "or", "xor"):
        same(ptx.lanes(f"{opcode}.pred {{d}}, {{a}}, {{b}}", BOOL, p, q), TWO[opcode](p, q))
        same(ptx.lanes(f"{opcode}.pred {{d}}, {{a}}, -1", BOOL, p), TWO[opcode](p, True))
    same(ptx.lanes("not.pred {d}, {a}", BOOL, p), ~p)
    same(ptx.lanes("mov.pred {d}, -1", BOOL, p), np.ones(32, bool))
    a, b = integers(U32), integers(U32, 5)
    same(ptx.lanes("selp.b32 {d}, {a}, {b}, {c}", U32, a, b, p), np.where(p, a, b))


# -- Conversions ---------------------------------------------------------------------------------------------


def rounded(x: np.ndarray, bits: int, rounding: str) -> np.ndarray:
    """Floats without their last bits, as bits: by exact fractions of the last bit that stays."""
    pattern = x.view(U32).astype(np.int64)
    unit = 1 << bits
    low, kept = pattern & unit - 1, pattern & ~(unit - 1)
    up = {
        "rn": (low > unit // 2) | ((low == unit // 2) & (kept & unit != 0)),
        "rna": low >= unit // 2,
        "rz": np.zeros_like(low, bool),
    }[rounding]
    return (kept + unit * up).astype(np.uint32)


def many_floats() -> np.ndarray:
    """Floats that lie between bf16, fp16 and tf32 values, ties to even and to odd among them."""
    bits = [
        0x3F800000,
        0x3F808000,
        0x3F818000,
        0x3F808001,
        0x3F817FFF,
        0x3F801000,
        0x3F803000,
        0xBF803001,
        0x7F7FFFFF,
    ]
    bits += [0x3F802000, 0x3F806000, 0x477FF000, 0x38801000, 0x33000001, 0xC2F78765]
    special = np.array(bits, U32).view(F32)
    return np.concatenate([special, np.random.default_rng(1).standard_normal(32 - len(special)).astype(F32)])


def test_to_bf16(ptx):
    x = many_floats()
    nearest = torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()
    same(ptx.lanes("cvt.rn.bf16.f32 {d}, {a}", U16, x), nearest)
    same(ptx.lanes("cvt.rn.bf16.f32 {d}, {a}", U16, x), rounded(x, 16, "rn") >> 16)
    same(ptx.lanes("cvt.rz.bf16.f32 {d}, {a}", U16, x), rounded(x, 16, "rz") >> 16)
    pair = ptx.lanes("cvt.rn.bf16x2.f32 {d}, {a}, {b}", U32, x, np.roll(x, 1))
    same(pair, nearest.astype(U32) << 16 | np.roll(nearest, 1))
    same(ptx.lanes("cvt.f32.bf16 {d}, {a}", F32, nearest), (nearest.astype(U32) << 16).view(F32))
    assert (ptx.lanes("cvt.rn.bf16.f32 {d}, {a}", U16, np.array([np.nan, -np.nan], F32)) == 0x7FFF).all()


def test_to_f16(ptx):
    x = many_floats()
    nearest = arithmetic(lambda: x.astype(np.float16))()
    same(ptx.lanes("cvt.rn.f16.f32 {d}, {a}", U16, x).view(np.float16), nearest)
    pair = ptx.lanes("cvt.rn.f16x2.f32 {d}, {a}, {b}", U32, x, np.roll(x, 1))
    same(pair, nearest.view(U16).astype(U32) << 16 | np.roll(nearest.view(U16), 1))
    same(ptx.lanes("cvt.f32.f16 {d}, {a}", F32, nearest.view(U16)), nearest.astype(F32))
    cut = ptx.lanes("cvt.rz.f16.f32 {d}, {a}", U16, x).view(np.float16)
    assert (np.abs(cut.astype(F64)) <= np.abs(x.astype(F64))).all() and np.isfinite(cut).all()
    inside = np.abs(x) < 60000
    gap = np.abs(x[inside].astype(F64)) - np.abs(cut[inside].astype(F64))
    assert (gap < np.spacing(np.abs(cut[inside])).astype(F64)).all()


def test_to_tf32(ptx):
    x = many_floats()[:-1][:31]
    same(ptx.lanes("cvt.rna.tf32.f32 {d}, {a}", U32, x), rounded(x, 13, "rna"))


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("target", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_floats_to_integers(ptx, source, target):
    x, result = floats({"f32": F32, "f64": F64}[source]), TYPES[target]
    limits = np.iinfo(result)
    for mode, function in (("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)):
        whole = [0 if np.isnan(v) else v for v in function(x).astype(F64)]
        expected = [
            max(limits.min, min(limits.max, int(v)))
            if np.isfinite(v)
            else limits.max
            if v > 0
            else limits.min
            for v in whole
        ]
        # NaN: the highest bit alone in 64 bits and from fp64, else 0.
        special = 2 ** (8 * result.itemsize - 1) if source == "f64" or result.itemsize == 8 else 0
        expected = [
            special - 2 ** (8 * result.itemsize) * (special > limits.max) if np.isnan(v) else e
            for v, e in zip(x, expected, strict=True)
        ]
        got = ptx.lanes(f"cvt.{mode}.{target}.{source} {{d}}, {{a}}", result, x)
        same(got, np.array(expected, object).astype(result))


@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64"])
def test_integers_to_floats(ptx, source):
    a = integers(TYPES[source])
    same(ptx.lanes(f"cvt.rn.f32.{source} {{d}}, {{a}}", F32, a), a.astype(F32))
    same(ptx.lanes(f"cvt.rn.f64.{source} {{d}}, {{a}}", F64, a), a.astype(F64))


def test_between_floats(ptx):
    x = floats(F32)
    same(ptx.lanes("cvt.f64.f32 {d}, {a}", F64, x), x.astype(F64))
    wide = floats(F64)
    wide[20] = 1 + 2.0**-24 + 2.0**-50
    same(ptx.lanes("cvt.rn.f32.f64 {d}, {a}", F32, wide), arithmetic(lambda: wide.astype(F32))())
    same(ptx.lanes("cvt.rmi.f32.f32 {d}, {a}", F32, x), np.floor(x))
    flushed = np.where(np.abs(x) < np.finfo(F32).tiny, np.copysign(F32.type(0), x), x)
    same(ptx.lanes("cvt.rmi.ftz.f32.f32 {d}, {a}", F32, x), np.floor(flushed))


def test_between_integers(ptx):
    a = integers(U32)
    same(ptx.lanes("cvt.u64.u32 {d}, {a}", U64, a), a)
    same(ptx.lanes("cvt.s64.s32 {d}, {a}", S64, a.view(S32)), a.view(S32))
    same(ptx.lanes("cvt.u16.u32 {d}, {a}", U16, a), a & 0xFFFF)
    same(ptx.lanes("cvt.s16.s8 {d}, {a}", S16, a.astype(U16)), a.astype(np.int8))
    same(ptx.lanes("cvt.u32.u64 {d}, {a}", U32, integers(U64)), integers(U64) & 0xFFFFFFFF)


def test_packing(ptx):
    a, b = integers(U32), integers(U32, 5)
    wide = a.astype(U64) | b.astype(U64) << np.uint64(32)
    same(ptx.lanes("mov.b64 {d}, {{{a}, {b}}}", U64, a, b), wide)
    same(ptx.lanes("mov.b64 {{_, {d}}}, {a}", U32, wide), b)
    same(ptx.lanes("mov.b64 {{{d}, _}}, {a}", U32, wide), a)


# -- Approximate instructions --------------------------------------------------------------------------------

APPROXIMATE = {
    "ex2.approx.ftz.f32 {d}, {a}": (np.exp2, 1, 2),
    "rcp.approx.ftz.f32 {d}, {a}": (lambda a: 1 / a, 1, 1),
    "sqrt.approx.f32 {d}, {a}": (np.sqrt, 1, 1),
    "div.full.f32 {d}, {a}, {b}": (np.divide, 2, 2),
    "div.approx.f32 {d}, {a}, {b}": (np.divide, 2, 2),
}


@pytest.mark.parametrize("instruction", APPROXIMATE)
def test_approximations_stay_within_their_bounds(ptx, instruction):
    function, count, ulps = APPROXIMATE[instruction]
    inputs = [np.random.default_rng(i).uniform(0.5, 90, 32).astype(F32) for i in range(count)]
    exact = function(*(x.astype(F64) for x in inputs)).astype(F32)
    same(ptx.lanes(instruction, F32, *inputs), exact)
    off = set()
    for seed in range(8):
        ptx.machine.set_options(approximation=1, seed=seed)
        got = ptx.lanes(instruction, F32, *inputs)
        same(got, ptx.lanes(instruction, F32, *inputs))  # one value for one input, as a GPU has
        off |= set((got.view(S32) - exact.view(S32)).tolist())
    assert off == set(range(-ulps, ulps + 1))
