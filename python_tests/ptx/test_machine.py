"""How the PTX machine runs warps, barriers, copies and launches, and what it forbids of them."""

import numpy as np
import pytest

from . import build
from .handwritten import WORD, Handwritten, zeros
from .library import Fault

pytestmark = pytest.mark.skipif(build.CXX is None, reason="no C++ compiler to build the PTX machine with")


# -- Asynchronous copies -------------------------------------------------------------------------------------

COPY = f"""{WORD}
cp.async.ca.shared.global [%r20], [%rd20], 4;
cp.async.commit_group;
{{}}
ld.shared.b32 %r3, [%r20];
st.global.b32 [%rd20], %r3;
"""


def test_copies_are_waited_for(ptx):
    array = np.arange(32, dtype=np.uint32)
    ptx.run(COPY.format("cp.async.wait_group 0;"), array)
    np.testing.assert_array_equal(array, np.arange(32))
    with pytest.raises(Fault, match=r"read of what a cp\.async is still writing"):
        ptx.run(COPY.format("cp.async.wait_group 1;"), array)
    with pytest.raises(Fault, match=r"a thread ended with a cp\.async that it did not wait for"):
        ptx.run(f"{WORD} cp.async.ca.shared.global [%r20], [%rd20], 4; cp.async.commit_group;", array)
    # What another thread has waited for is there after a barrier.
    other = COPY.replace("ld.shared.b32 %r3, [%r20]", "xor.b32 %r20, %r20, 4; ld.shared.b32 %r3, [%r20]")
    with pytest.raises(Fault, match="race: a read of byte"):
        ptx.run(other.format("cp.async.wait_group 0;"), array)
    ptx.run(other.format("cp.async.wait_group 0; bar.sync 0;"), array)
    np.testing.assert_array_equal(array, np.arange(32) ^ 1)


def test_copies_of_fewer_bytes_leave_zeros(ptx):
    source, result = np.arange(4, dtype=np.uint32) + 1, zeros(4)
    body = """mov.u32 %r2, buffer;
    cp.async.cg.shared.global [%r2], [%rd0], 16, 8; cp.async.commit_group; cp.async.wait_group 0;
    ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2]; st.global.v4.b32 [%rd1], {%r3, %r4, %r5, %r6};"""
    source, result = (np.zeros(64, np.uint32) for _ in range(2))
    offset = -source.ctypes.data % 16 // 4, -result.ctypes.data % 16 // 4
    source, result = source[offset[0] :][:4], result[offset[1] :][:4]
    source[:] = [1, 2, 3, 4]
    ptx.run(body, source, result, threads=1)
    np.testing.assert_array_equal(result, [1, 2, 0, 0])


# -- Warps and barriers --------------------------------------------------------------------------------------


def test_divergence_and_reconvergence(ptx):
    body = f"""{WORD} mov.u32 %r3, 0; mov.u32 %r4, %r0;
    loop: setp.eq.u32 %p1, %r4, 0; @%p1 bra done; add.u32 %r3, %r3, %r4; sub.u32 %r4, %r4, 1; bra loop;
    done: shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1; st.global.b32 [%rd20], %r5;"""
    expected = [(n ^ 1) * ((n ^ 1) + 1) // 2 for n in range(32)]
    for seed in range(4):
        ptx.machine.set_options(seed=seed, divergence=0.5, quantum=3)
        ptx.run(body, array := zeros())
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("mode, by, expected", [
    ("idx", 3, lambda n: 3), ("up", 2, lambda n: n - 2 if n >= 2 else n),
    ("down", 5, lambda n: n + 5 if n + 5 < 32 else n), ("bfly", 9, lambda n: n ^ 9),
])  # fmt: skip
def test_shuffles(ptx, mode, by, expected):
    bound = 0 if mode == "up" else 31
    body = f"{WORD} shfl.sync.{mode}.b32 %r3|%p1, %r0, {by}, {bound}, -1; st.global.b32 [%rd20], %r3;"
    ptx.run(body, array := zeros())
    np.testing.assert_array_equal(array, [expected(n) for n in range(32)])


def test_sums_of_a_warp(ptx):
    body = f"{WORD} redux.sync.add.s32 %r3, %r0, -1; st.global.b32 [%rd20], %r3;"
    ptx.run(body, array := zeros())
    np.testing.assert_array_equal(array, [sum(range(32))] * 32)
    with pytest.raises(Fault, match="names lanes that have ended"):
        ptx.run("setp.lt.u32 %p1, %r0, 16; @!%p1 ret; redux.sync.add.s32 %r3, %r0, -1;")


def test_lanes_that_a_shuffle_names(ptx):
    shuffle = "shfl.sync.bfly.b32 %r3, %r0, 1, 31, {};"
    ptx.run(shuffle.format(-1))
    ptx.run("setp.lt.u32 %p1, %r0, 16; @!%p1 bra end;" + shuffle.format(65535) + "end:")
    for broken, words in {
        "setp.lt.u32 %p1, %r0, 16; @!%p1 ret;" + shuffle.format(-1): "names lanes that have ended",
        "setp.lt.u32 %p1, %r0, 16; @%p1 " + shuffle.format(-1): "a predicate takes lanes out",
        shuffle.format(65535): "does not name this lane",
        "setp.lt.u32 %p1, %r0, 15; @!%p1 bra end;"
        + shuffle.format(32767)
        + "end:": "from lane 15, which takes no part",
    }.items():
        with pytest.raises(Fault, match=words):
            ptx.run(broken)


def test_barriers(ptx):
    ptx.run(
        "setp.lt.u32 %p1, %r0, 32; @!%p1 ret; bar.sync 0;", threads=64
    )  # those that have ended do not count
    with pytest.raises(Fault, match="lanes of one warp wait at different barriers"):
        ptx.run("setp.lt.u32 %p1, %r0, 16; @%p1 bra one; bar.sync 0; bra end; one: bar.sync 0; end:")
    with pytest.raises(Fault, match="a predicate divides a warp at a barrier"):
        ptx.run("setp.lt.u32 %p1, %r0, 16; @%p1 bar.sync 0;")
    with pytest.raises(Fault, match=r"(?s)deadlock.*threads 0x1 of warp 0 at PTX line \d+: bar.warp.sync"):
        ptx.run(
            "setp.eq.u32 %p1, %r0, 0; @!%p1 bra wait; bar.warp.sync 3; bra end; wait: bar.sync 0; end:",
            threads=64,
        )
    ptx.machine.set_options(limit=1000)
    with pytest.raises(Fault, match="no end after 1000 instructions"):
        ptx.run("loop: bra loop;")


# -- Launches ------------------------------------------------------------------------------------------------


def test_limits_of_launches(ptx):
    def refused(words, body="", launch=None, **text):
        with pytest.raises(Fault, match="launch refused: .*" + words):
            ptx.launch(ptx.load(body, **text), **launch or {})

    refused("1056 threads a block", launch={"threads": 1056})
    refused("64 threads a block, compiled for 32", bounds=".reqntid 32", launch={"threads": 64})
    ptx.run("", bounds=".reqntid 32, 1, 1")
    refused("64 threads a block, compiled for at most 32", bounds=".maxntid 32", launch={"threads": 64})
    ptx.run("", bounds=".maxntid 32\n.minnctapersm 2", threads=1)
    refused("a grid of 0 x 1 x 1", launch={"grid": 0})
    refused("code for sm_90, the device is sm_80", architecture="90")
    ptx.machine.set_device("H100", 4)
    ptx.run("", architecture="80")
    ptx.run("", architecture="90a")
    refused("code for sm_80", architecture="80a")
    with pytest.raises(Fault, match="no device V100"):
        ptx.machine.set_device("V100", 4)


@pytest.mark.parametrize("name, optin, architecture, resident", [
    ("A100", 163, 80, 2), ("H100", 227, 90, 2), ("B200", 227, 100, 2), ("RTX 4090", 99, 89, 1),
    ("RTX 5090", 99, 120, 1),
])  # fmt: skip
def test_devices(ptx, name, optin, architecture, resident):
    ptx.machine.set_device(name, 3)
    assert ptx.machine.attribute("shared_optin") == optin << 10
    assert ptx.machine.attribute("architecture") == architecture
    fixed = 1024  # of static shared memory
    ptx.run("", shared=(optin << 10) - fixed, allowed=1 << 20)
    with pytest.raises(Fault, match="bytes of shared memory"):
        ptx.run("", shared=(optin << 10) - fixed + 1, allowed=1 << 20)
    with pytest.raises(Fault, match="49153 bytes of shared memory, of the 49152 asked for"):
        ptx.run("", shared=(48 << 10) - fixed + 1)
    ptx.run("", grid=3 * resident, threads=1024, cooperative=True)
    with pytest.raises(
        Fault, match=f"cooperative grid of {3 * resident + 1} blocks, of which {3 * resident} fit"
    ):
        ptx.run("", grid=3 * resident + 1, threads=1024, cooperative=True)


@pytest.mark.parametrize("body, words", [
    ("frobnicate.b32 %r2, %r0;", "an opcode that is not known, frobnicate.b32"),
    ("add.sat.s32 %r2, %r0, 1;", "a modifier that is not known, .sat"),
    ("add.s32 %r2, %r99, 1;", "a register that is not known, %r99"),
    ("add.s32 %rd2, %r0, 1;", "operand 0 has 8 bytes, not 4"),
    ("add.s32 %r2, %r0;", "2 operands where 3 are expected"),
    ("bra nowhere;", "no label nowhere"),
    ("mov.u32 %r2, elsewhere;", "an operand that is not known, elsewhere"),
    (".local .b32 spilled[4];", "a directive that is not known"),
    ("bar.sync 1;", "a barrier other than 0"),
    ("cvt.rn.bf16.f64 %h1, %rd1;", "this conversion"),
])  # fmt: skip
def test_unknown_ptx_names_its_line(ptx, body, words):
    line = 1 + Handwritten.text("HERE").splitlines().index("HERE")
    with pytest.raises(Fault, match=f"PTX line {line}: {words}.*: {body[:4]}"):
        ptx.load(body)


# -- Random orders -------------------------------------------------------------------------------------------


def test_seeds_choose_the_order_and_repeat_it(ptx):
    body = f"{WORD} atom.global.add.u32 %r5, [%rd1], 1; mad.lo.s32 %r6, %r1, 64, %r0; " \
        "mad.wide.u32 %rd3, %r6, 4, %rd0; st.global.b32 [%rd3], %r5;"  # fmt: skip
    orders = []
    for seed in (1, 2, 1):
        ptx.machine.set_options(seed=seed)
        ptx.run(body, array := zeros(256), zeros(1), grid=4, threads=64)
        assert sorted(array) == list(range(256))
        orders.append(array.tolist())
    assert orders[0] == orders[2] != orders[1]


def test_atomics(ptx):
    array = np.array([5], np.uint32)
    ptx.run("red.global.add.u32 [%rd0], %r0;", array)
    assert array[0] == 5 + 496
    sums = np.zeros(1, np.float32)
    ptx.run("atom.global.add.f32 %r2, [%rd0], 0f3F800000;", sums)
    assert sums[0] == 32


# -- Fusion by the assembler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode, exact, fused", [
    ("add.f32 %r5, %r4, %r3;", 0.0, 2.0**-46), ("add.f32 %r5, %r3, %r4;", 0.0, 2.0**-46),
    ("sub.f32 %r5, %r4, %r6;", 0.0, 2.0**-46), ("sub.f32 %r5, %r6, %r4;", 0.0, -(2.0**-46)),
    ("add.rn.f32 %r5, %r4, %r3;", 0.0, 0.0),
])  # fmt: skip
def test_fusion(ptx, opcode, exact, fused):
    x = np.float32(1 + 2.0**-23)
    square = np.float32(x * x)
    bits = lambda f: f"0f{np.float32(f).view(np.uint32):08X}"  # noqa: E731
    body = f"mov.f32 %r2, {bits(x)}; mov.f32 %r3, {bits(-square)}; mov.f32 %r6, {bits(square)}; " \
        f"{{}} %r4, %r2, %r2; {{}} {opcode} st.global.b32 [%rd0], %r5;"  # fmt: skip
    for fusion, may_fuse, product, between, result in (
        (0, True, "mul.f32", "", exact), (1, True, "mul.f32", "", fused), (1, False, "mul.f32", "", exact),
        (1, True, "mul.rn.f32", "", exact), (1, True, "mul.f32", "mov.f32 %r2, 0f00000000;", exact),
        (1, True, "mul.f32", "bra next; next:", exact),
    ):  # fmt: skip
        ptx.machine.set_options(fusion=fusion)
        ptx.run(body.format(product, between), array := np.zeros(1, np.float32), threads=1, may_fuse=may_fuse)
        assert array[0] == result


# -- Listing, coverage, faults -------------------------------------------------------------------------------


def test_listing_and_patches(ptx):
    module = ptx.load(f"{WORD} .loc 1 7 0\nsetp.lt.u32 %p1, %r0, 16;\n@%p1 st.global.b32 [%rd20], 1;", 1)
    number = len(ptx.machine.kernels()) - 1
    assert ptx.machine.kernels()[number] == "kernel"
    ptx.machine.reset_counts()
    ptx.launch(module, array := zeros())
    listing = ptx.machine.listing(number)
    at = {line.text.split()[0]: i for i, line in enumerate(listing)}
    assert listing[at["setp.lt.u32"]].runs == 1 and listing[at["setp.lt.u32"]].source == "kernel.cu:7"
    assert array.sum() == 16
    assert ptx.machine.patch(number, at["setp.lt.u32"], "setp.le.u32")
    ptx.launch(module, array := zeros())
    assert array.sum() == 17
    assert ptx.machine.patch(number, at["@%p1"], shift=4)
    ptx.launch(module, array := zeros())
    assert array[0] == 0 and array.sum() == 17
    assert not ptx.machine.patch(number, at["setp.lt.u32"], "setp.lt.f64")
    assert not ptx.machine.patch(number, at["setp.lt.u32"], shift=4)
    assert ptx.machine.patch(number, at["@%p1"], "nop")
    ptx.launch(module, array := zeros())
    assert array.sum() == 0
    ptx.machine.restore()
    ptx.launch(module, array := zeros())
    assert array.sum() == 16 and array[0] == 1
