"""The PTX machine's memory: a kernel that leaves bounds, or reads what nobody wrote, is caught."""

import numpy as np
import pytest

from . import build
from .handwritten import WORD, first_undefined, host_bytes, zeros
from .library import Fault

pytestmark = pytest.mark.skipif(build.CXX is None, reason="no C++ compiler to build the PTX machine with")


# -- Bounds and alignment ------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset, passes", [(0, True), (4, False), (-4, False), (1 << 30, False)])
def test_bounds_of_global_memory(ptx, offset, passes):
    beside = zeros(4096)  # one array of the host, of which the kernel has the middle
    address = ptx.machine.map(*host_bytes(beside[1024:1056]), "weight")
    body = f"{WORD} st.global.b32 [%rd20+{offset}], %r0;"
    if passes:
        ptx.run(body, address)
        np.testing.assert_array_equal(beside[1024:1056], np.arange(32))
    else:
        where = r"4 bytes at byte -?\d+ of weight, which has 128\n  kernel kernel, block 0, thread \d+\n"
        with pytest.raises(
            Fault, match=rf"write out of bounds: {where}  PTX line \d+: st\.global\.b32 \[%rd20"
        ):
            ptx.run(body, address)
    ptx.machine.unmap(address)


def test_an_overrun_into_a_live_tensor_is_seen(ptx):
    memory = zeros(64)
    first, second = (
        ptx.machine.map(*host_bytes(half), name) for half, name in ((memory[:32], "a"), (memory[32:], "b"))
    )
    body = f"{WORD} ld.global.b32 %r2, [%rd20]; st.global.b32 [%rd1], 1;"
    ptx.run(f"{WORD} st.global.b32 [%rd20], %r0;", second)
    with pytest.raises(Fault, match="read out of bounds: 4 bytes at byte 128 of a, which has 128"):
        ptx.run(body.replace("[%rd20]", "[%rd20+4]"), first, second)
    ptx.run(body, first, second)
    # Maps that overlap are one memory.
    ptx.run("setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%rd0+128], 7;", whole := ptx.map(memory))
    assert memory[32] == 7
    for address in (first, second, whole):
        ptx.machine.unmap(address)


def test_memory_that_is_freed_or_of_the_host(ptx):
    array = zeros()
    address = ptx.map(array)
    ptx.run(f"{WORD} ld.global.b32 %r2, [%rd20];", address)
    ptx.machine.unmap(address)
    for wrong in (address, 0, array.ctypes.data):
        with pytest.raises(Fault, match="out of bounds"):
            ptx.run(f"{WORD} ld.global.b32 %r2, [%rd20];", wrong)


def test_bounds_of_shared_memory_and_parameters(ptx):
    ptx.run("mov.u32 %r2, buffer; st.shared.b32 [%r2+1020], 1;", threads=1)
    with pytest.raises(
        Fault, match="write out of bounds: 4 bytes at byte 1024 of shared memory, which has 1024"
    ):
        ptx.run("mov.u32 %r2, buffer; st.shared.b32 [%r2+1024], 1;", threads=1)
    with pytest.raises(Fault, match="parameter access out of bounds"):
        ptx.run("ld.param.u64 %rd1, [p0+8];", zeros())


@pytest.mark.parametrize("instruction", ["ld.global.v2.b32 {%r2, %r3}", "ld.global.b64 %rd3"])
def test_alignment(ptx, instruction):
    ptx.run(f"{instruction}, [%rd0+8];", zeros(), threads=1)
    with pytest.raises(Fault, match="misaligned read: 8 bytes at byte 4 of array"):
        ptx.run(f"{instruction}, [%rd0+4];", zeros(), threads=1)


# -- Definedness ---------------------------------------------------------------------------------------------


def test_undefined_registers(ptx):
    for use in (
        "st.global.b32 [%rd0], %r3;",
        "@%p2 st.global.b32 [%rd0], 1;",
        "setp.eq.u32 %p1, %r3, 0; @%p1 bra end;",
    ):
        with pytest.raises(Fault, match="undefined"):
            ptx.run(f"add.s32 %r3, %r2, 1; {use} end:", zeros(), threads=1)
        ptx.run(
            f"mov.u32 %r2, 0; setp.eq.u32 %p2, %r2, 0; add.s32 %r3, %r2, 1; {use} end:", zeros(), threads=1
        )
    # What is not selected need not be defined.
    select = "setp.eq.u32 %p1, %r0, 0; selp.b32 %r4, %r0, %r3, %p1; st.global.b32 [%rd0], %r4;"
    ptx.run(select, zeros(), threads=1)
    with pytest.raises(Fault, match="undefined value is used, operand 2"):
        ptx.run(select.replace("eq", "ne"), zeros(), threads=1)


def test_undefined_halves_of_registers(ptx):
    """What is packed with something undefined is still defined when it comes out again."""
    body = "{} mov.b64 %rd2, %rd1; mov.b64 {{%r3, %r4}}, %rd2; st.global.b32 [%rd0], {};"
    ptx.run(body.format("mov.b64 %rd1, {%r2, %r0};", "%r4"), zeros(), threads=1)
    ptx.run(body.format("mov.b64 %rd1, {%r0, %r2};", "%r3"), zeros(), threads=1)
    for pack, half in (("{%r2, %r0}", "%r3"), ("{%r0, %r2}", "%r4")):
        with pytest.raises(Fault, match="undefined value is used, operand 2"):
            ptx.run(body.format(f"mov.b64 %rd1, {pack};", half), zeros(), threads=1)
    with pytest.raises(Fault, match="undefined value is used, operand 2"):
        ptx.run("mov.b64 %rd1, {%r0, %r2}; st.global.b64 [%rd0], %rd1;", zeros(), threads=1)
    cut = "mov.b64 %rd1, {}; cvt.u32.u64 %r3, %rd1; st.global.b32 [%rd0], %r3;"
    ptx.run(cut.format("{%r0, %r2}"), zeros(), threads=1)
    with pytest.raises(Fault, match="undefined value is used, operand 2"):
        ptx.run(cut.format("{%r2, %r0}"), zeros(), threads=1)


def test_undefined_lanes_of_a_shuffle(ptx):
    """A lane hands on what it has; only where that is used must it be defined."""
    body = "setp.eq.u32 %p1, %r0, {}; @%p1 mov.u32 %r2, 7; shfl.sync.idx.b32 %r3, %r2, 5, 31, -1; "
    ptx.run(body.format(5) + "st.global.b32 [%rd0], %r3;", zeros())
    with pytest.raises(Fault, match="undefined value is used, operand 2"):
        ptx.run(body.format(6) + "st.global.b32 [%rd0], %r3;", zeros())
    with pytest.raises(Fault, match="undefined value is used, operand 3"):
        ptx.run("shfl.sync.idx.b32 %r3, %r0, %r2, 31, -1;")


def test_undefined_bytes(ptx):
    """A byte that a permutation drops, or a zero masks, need not be defined."""
    store = " st.global.b32 [%rd0], %r4;"
    for body, sound in {
        "prmt.b32 %r4, %r0, %r2, 0x3210;": True,
        "prmt.b32 %r4, %r0, %r2, 0x3214;": False,
        "prmt.b32 %r3, %r0, %r2, 0x3214; and.b32 %r4, %r3, 0xffffff00;": True,
        "prmt.b32 %r3, %r0, %r2, 0x3214; and.b32 %r4, %r3, 0xffffff01;": False,
        "prmt.b32 %r3, %r0, %r2, 0x3214; prmt.b32 %r4, %r3, %r0, 0x3217;": True,
        "prmt.b32 %r3, %r0, %r2, 0x3214; prmt.b32 %r4, %r3, %r0, 0x3210;": False,
        "and.b32 %r4, %r2, 0;": True,
        "and.b32 %r4, %r2, %r2;": False,
    }.items():
        if sound:
            ptx.run(body + store, zeros(), threads=1)
        else:
            with pytest.raises(Fault, match="undefined value is used, operand 2"):
                ptx.run(body + store, zeros(), threads=1)


def test_undefined_shared_memory(ptx):
    with pytest.raises(Fault, match="read of undefined memory: byte 4 of shared memory"):
        ptx.run("mov.u32 %r2, buffer; st.shared.b32 [%r2], 1; ld.shared.b64 %rd1, [%r2];", threads=1)
    ptx.run("mov.u32 %r2, buffer; st.shared.b32 [%r2], 1; ld.shared.b32 %r3, [%r2];", threads=1)


def test_undefined_global_memory(ptx):
    array = zeros()
    ptx.machine.undefine(*host_bytes(array))
    read = f"{WORD} ld.global.b32 %r2, [%rd20];"
    with pytest.raises(Fault, match=r"read of undefined memory: byte \d+ of array"):
        ptx.run(read, array)
    ptx.run("st.global.b32 [%rd0], 1; ld.global.b32 %r2, [%rd0];", array, threads=1)
    assert first_undefined(array) == 4
    ptx.run(f"{WORD} st.global.b32 [%rd20], 1;", array)
    ptx.run(read, array)
    ptx.machine.undefine(*host_bytes(array))
    ptx.machine.define(*host_bytes(array))
    ptx.run(read, array)
