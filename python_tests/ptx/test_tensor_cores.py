"""Fragments of matrices in a warp's registers: loads, stores, products, against the PTX ISA's layouts."""

import numpy as np
import pytest
import torch

from . import build
from .library import Fault

pytestmark = pytest.mark.skipif(build.CXX is None, reason="no C++ compiler to build the PTX machine with")


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of 16 bytes."""
    room = np.zeros(array.nbytes + 16, np.uint8)
    begin = -room.ctypes.data % 16
    copy = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def registers(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def words(opcode: str, base: str, first: int, count: int) -> str:
    """Load or store words of a lane's part of an array from or to registers."""
    return "\n".join(
        f"ld.global.b32 %r{first + i}, [{base}+{4 * i}];"
        if opcode == "ld"
        else f"st.global.b32 [{base}+{4 * i}], %r{first + i};"
        for i in range(count)
    )


def part(base: str, size: int) -> str:
    """Where a lane's part of an array begins."""
    return f"mad.wide.u32 {base}, %r0, {size}, {base};"


# Row `lane` of four matrices of 16-byte rows in shared memory.
ROW = "mov.u32 %r20, buffer; mad.lo.s32 %r20, %r0, 16, %r20;"


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_from_shared_memory(ptx, count, trans):
    rows, got = aligned(np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)), np.zeros((32, 4), np.uint32)
    ptx.run(
        f"""{part("%rd0", 16)} {part("%rd1", 16)} {ROW} {words("ld", "%rd0", 2, 4)}
        st.shared.v4.b32 [%r20], {registers(2, 4)};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers(6, count)}, [%r20];
        {words("st", "%rd1", 6, count)}""",
        rows,
        got,
    )
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(count):
            matrix = rows[i].T if trans else rows[i]
            assert got[lane, i] == int(matrix[g, 2 * t]) | int(matrix[g, 2 * t + 1]) << 16


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_to_shared_memory(ptx, count, trans):
    values = np.random.default_rng(0).integers(0, 1 << 32, (32, 4), np.uint32)
    got = np.zeros((4, 8, 8), np.uint16)
    ptx.machine.set_device("H100", 4)
    ptx.run(
        f"""{part("%rd0", 16)} {part("%rd1", 16)} {ROW} {words("ld", "%rd0", 2, 4)}
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r20], {registers(2, count)};
        bar.warp.sync -1;
        setp.lt.u32 %p1, %r0, {8 * count};
        @!%p1 bra end;
        ld.shared.v4.b32 {registers(6, 4)}, [%r20];
        {words("st", "%rd1", 6, 4)}
        end:""",
        values,
        got,
        architecture="90",
    )
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(count):
            matrix = got[i].T if trans else got[i]
            assert values[lane, i] == int(matrix[g, 2 * t]) | int(matrix[g, 2 * t + 1]) << 16


def test_matrices_are_loaded_by_the_whole_warp(ptx):
    load = "mov.u32 %r20, buffer; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r20];"
    with pytest.raises(Fault, match="undefined memory"):
        ptx.run(load)
    with pytest.raises(Fault, match="a warp that is not whole"):
        ptx.run(load, threads=16)
    with pytest.raises(Fault, match="misaligned read: 16 bytes"):
        ptx.run(load.replace("[%r20]", "[%r20+8]"))


# -- Products ------------------------------------------------------------------------------------------------


def bits_of(values: np.ndarray, kind: str) -> np.ndarray:
    """Entries as the bits of their type."""
    if kind == "tf32":
        return values.astype(np.float32).view(np.uint32)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    return torch.from_numpy(values).to(dtype).view(torch.uint16).numpy().astype(np.uint32)


def fragments(A, B, C, kind: str):
    """Registers of each lane as the ISA's tables of mma.m16n8k* place them."""
    depth, per = A.shape[1], 1 if kind == "tf32" else 2
    a, b = bits_of(A, kind), bits_of(B, kind)
    lanes = []
    for lane in range(32):
        g, t = divmod(lane, 4)
        columns = [[t * per + e + half * 4 * per for e in range(per)] for half in range(depth // (4 * per))]
        of_a = [[a[row, k] for k in ks] for ks in columns for row in (g, g + 8)]
        of_b = [[b[k, g] for k in ks] for ks in columns]
        words = [sum(int(entry) << 16 * e for e, entry in enumerate(entries)) for entries in of_a + of_b]
        of_c = [C[row, column] for row in (g, g + 8) for column in (2 * t, 2 * t + 1)]
        lanes.append([*words, *np.array(of_c, np.float32).view(np.uint32)])
    return np.array(lanes, np.uint32)


def product(ptx, A, B, C, kind: str) -> np.ndarray:
    inputs, got = fragments(A, B, C, kind), np.zeros((32, 4), np.float32)
    count = inputs.shape[1]
    of_b = (count - 4) // 3
    places = (30, 4), (2, 2 * of_b), (2 + 2 * of_b, of_b), (2 + 3 * of_b, 4)
    operands = ", ".join(registers(*place) for place in places)
    ptx.run(
        f"""{part("%rd0", 4 * count)} {part("%rd1", 16)} {words("ld", "%rd0", 2, count)}
        mma.sync.aligned.m16n8k{A.shape[1]}.row.col.f32.{kind}.{kind}.f32 {operands};
        {words("st", "%rd1", 30, 4)}""",
        inputs,
        got,
    )
    result = np.zeros((16, 8), np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            result[g + 8 * (i // 2), 2 * t + i % 2] = got[lane, i]
    return result


FORMS = [("tf32", 4), ("tf32", 8), ("bf16", 8), ("bf16", 16), ("f16", 8), ("f16", 16)]


@pytest.mark.parametrize("kind, depth", FORMS)
def test_products(ptx, kind, depth):
    generator = np.random.default_rng(0)
    A, B, C = (
        generator.integers(-8, 8, shape).astype(np.float32) for shape in ((16, depth), (depth, 8), (16, 8))
    )
    np.testing.assert_array_equal(product(ptx, A, B, C, kind), A @ B + C)


@pytest.mark.parametrize("rows, depth", [(8, 4), (16, 4), (16, 8), (16, 16)])
def test_products_in_fp64(ptx, rows, depth):
    generator = np.random.default_rng(0)
    A, B, C = (generator.integers(-8, 8, shape) / 8 for shape in ((rows, depth), (depth, 8), (rows, 8)))
    halves = range(0, rows, 8)
    inputs, got = [], np.zeros((32, rows // 4))
    for lane in range(32):
        g, t = divmod(lane, 4)
        of_a = [A[g + half, 4 * step + t] for step in range(depth // 4) for half in halves]
        of_b = [B[4 * step + t, g] for step in range(depth // 4)]
        of_c = [C[g + half, 2 * t + i] for half in halves for i in range(2)]
        inputs.append([*of_a, *of_b, *of_c])
    inputs = np.array(inputs)
    count, outputs, steps = inputs.shape[1], rows // 4, depth // 4
    names = [f"%d{i}" for i in range(count + outputs)]
    ends = np.cumsum([outputs, len(halves) * steps, steps, outputs])
    operands = ", ".join("{" + ", ".join(some) + "}" for some in np.split(np.array(names), ends[:-1]))
    loads = "\n".join(f"ld.global.f64 {names[outputs + i]}, [%rd0+{8 * i}];" for i in range(count))
    stores = "\n".join(f"st.global.f64 [%rd1+{8 * i}], {names[i]};" for i in range(outputs))
    ptx.machine.set_device("H100", 4)
    ptx.run(
        f"""{part("%rd0", 8 * count)} {part("%rd1", 8 * outputs)} {loads}
        mma.sync.aligned.m{rows}n8k{depth}.row.col.f64.f64.f64.f64 {operands};
        {stores}""",
        inputs,
        got,
        architecture="90",
    )
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(outputs):
            row, column = g + 8 * (i // 2), 2 * t + i % 2
            assert got[lane, i] == A[row] @ B[:, column] + C[row, column]


def test_products_ignore_the_last_bits_of_tf32(ptx):
    A, B, C = np.full((16, 8), 1 + 2.0**-11), np.eye(8), np.zeros((16, 8))
    np.testing.assert_array_equal(product(ptx, A, B, C, "tf32"), np.ones((16, 8)))


@pytest.mark.parametrize("kind, depth", FORMS)
def test_sums_in_any_order_and_rounding(ptx, kind, depth):
    """Others than the exact one, within the error of as many fp32 additions, towards zero."""
    generator = np.random.default_rng(1)
    A, B = (generator.standard_normal(shape).astype(np.float32) for shape in ((16, depth), (depth, 8)))
    cut = lambda x: (bits_of(x, kind) & (0xFFFFE000 if kind == "tf32" else 0xFFFF)).astype(np.uint32)  # noqa: E731
    widen = {
        "tf32": lambda x: x.view(np.float32),
        "bf16": lambda x: (x << 16).view(np.float32),
        "f16": lambda x: x.astype(np.uint16).view(np.float16),
    }[kind]
    A, B = widen(cut(A)).astype(np.float32), widen(cut(B)).astype(np.float32)
    C = generator.standard_normal((16, 8)).astype(np.float32)
    A[8:], C[8:] = A[:8], C[:8]
    truth = A.astype(np.float64) @ B.astype(np.float64) + C
    size = np.abs(A).astype(np.float64) @ np.abs(B) + np.abs(C)
    exact = product(ptx, A, B, C, kind)
    np.testing.assert_array_equal(exact, truth.astype(np.float32))
    results = []
    for seed in (1, 2):
        ptx.machine.set_options(sums=1, seed=seed)
        results.append(product(ptx, A, B, C, kind))
        np.testing.assert_array_equal(results[-1][8:], results[-1][:8])  # of the same terms
        assert (np.abs(results[-1] - truth) <= (depth + 1) * 2.0**-23 * size).all()
    assert (results[0] != exact).any() and (results[0] != results[1]).any()
