"""The PTX machine's races: of each pair of kernels, the one that lacks an order is caught."""

import functools
import re

import pytest

from . import build
from .handwritten import WORD, zeros
from .library import Fault

pytestmark = pytest.mark.skipif(build.CXX is None, reason="no C++ compiler to build the PTX machine with")


# -- Races ---------------------------------------------------------------------------------------------------

# Each thread writes its word, and reads that of a thread of another warp.
EXCHANGE = f"""{WORD}
st.shared.b32 [%r20], 0;
bar.sync 0;
st.shared.b32 [%r20], %r0;
{{}}
xor.b32 %r21, %r20, {{}};
ld.shared.b32 %r3, [%r21];
"""


def test_a_missing_barrier(ptx):
    ptx.run(EXCHANGE.format("bar.sync 0;", 128), threads=64)
    for seed in range(4):
        ptx.machine.set_options(seed=seed)
        with pytest.raises(Fault) as caught:
            ptx.run(EXCHANGE.format("", 128), threads=64)
        # Whichever comes first, the read or the write: both threads, both lines.
        threads = re.fullmatch(
            r"race: a (?:read|write) of byte \d+ of shared memory in no order with a (?:read|write) "
            r"of block 0, thread (\d+)\n  by PTX line \d+: (?:ld|st).shared.*\n"
            r"  kernel kernel, block 0, thread (\d+)\n  PTX line \d+: (?:ld|st).shared.*",
            str(caught.value),
        ).groups()
        assert abs(int(threads[0]) - int(threads[1])) == 32


def test_lanes_of_a_warp_are_not_in_step(ptx):
    with pytest.raises(Fault, match="race: a read of byte"):
        ptx.run(EXCHANGE.format("", 4))
    with pytest.raises(Fault, match="race: a read of byte"):
        ptx.run(EXCHANGE.format("shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;", 4))
    ptx.run(EXCHANGE.format("bar.warp.sync -1;", 4))


def test_every_reader_counts(ptx):
    """The last reader is ordered before the write, an earlier one is not."""
    body = """mov.u32 %r2, buffer; mov.u32 %r3, 0;
    setp.eq.u32 %p1, %r0, 0; setp.lt.u32 %p2, %r0, 32;
    @%p1 st.shared.b32 [%r2], 7;
    bar.sync 0;
    {other} ld.shared.b32 %r3, [%r2];
    {barrier}
    @%p1 ld.shared.b32 %r3, [%r2];
    @%p1 st.shared.b32 [%r2], 8;"""
    for seed in range(6):
        ptx.machine.set_options(seed=seed)
        ptx.run(body.format(other="@!%p2", barrier="bar.sync 0;"), threads=64)
        ptx.run(body.format(other="@%p1", barrier=""), threads=64)
        with pytest.raises(Fault, match=r"race: a (write|read) of byte 0 of shared memory"):
            ptx.run(body.format(other="@!%p2", barrier=""), threads=64)


def test_bytes_of_one_word_are_no_race(ptx):
    body = "mov.u32 %r2, buffer; add.s32 %r2, %r2, %r0; cvt.u16.u32 %h1, %r0; st.shared.b8 [%r2], %h1;"
    ptx.run(body + "bar.sync 0; and.b32 %r2, %r2, -4; ld.shared.b32 %r3, [%r2];", threads=64)
    with pytest.raises(Fault, match=r"race|undefined"):
        ptx.run(body + "and.b32 %r2, %r2, -4; ld.shared.b32 %r3, [%r2];", threads=64)


def test_blocks_are_in_no_order(ptx):
    body = "setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%rd0], {};"
    with pytest.raises(
        Fault, match=r"race: a write of byte 0 of array, which has 128 in no order with a write of block \d"
    ):
        ptx.run(body.format("%r1"), zeros(), grid=8)
    array = zeros()
    ptx.run(body.format(7), array, grid=8)  # one value
    assert array[0] == 7
    ptx.run("setp.eq.u32 %p1, %r0, 0; @%p1 red.global.add.u32 [%rd0], 1;", array, grid=8)
    assert array[0] == 15
    with pytest.raises(Fault, match="race"):  # an atomic and an ordinary access
        ptx.run("red.global.add.u32 [%rd0], 1; ld.global.b32 %r2, [%rd0];", array, grid=2)
    ptx.run("red.global.add.u32 [%rd0], 1; ld.volatile.global.b32 %r2, [%rd0];", array, grid=2)


GRID_BARRIER = """
setp.eq.u32 %p1, %r0, 0;
mad.wide.u32 %rd20, %r1, 4, %rd1;
@%p1 st.global.b32 [%rd20], %r1;
{barrier}
@!%p1 bra waited;
{fence}
atom.global.add.u32 %r5, [%rd0], 1;
again: ld.volatile.global.u32 %r6, [%rd0];
setp.lt.u32 %p2, %r6, 4;
@%p2 bra again;
{second}
waited:
{barrier}
xor.b32 %r7, %r1, 1;
mad.wide.u32 %rd21, %r7, 4, %rd1;
@%p1 ld.global.b32 %r8, [%rd21];
"""


def test_a_barrier_of_the_grid(ptx):
    parts = {"barrier": "bar.sync 0;", "fence": "membar.gl;", "second": "membar.gl;"}
    for seed in range(3):
        ptx.machine.set_options(seed=seed)
        ptx.run(GRID_BARRIER.format(**parts), zeros(), zeros(), grid=4, threads=64, cooperative=True)
        for missing in parts:
            with pytest.raises(Fault, match="race: a read of byte"):
                body = GRID_BARRIER.format(**parts | {missing: ""})
                ptx.run(body, zeros(), zeros(), grid=4, threads=64, cooperative=True)


def test_a_barrier_of_the_grid_by_release_and_acquire(ptx):
    orders = {"atom.global": "atom.release.gpu.global", "ld.volatile": "ld.acquire.gpu"}
    for missing in ("", *orders):
        body = GRID_BARRIER.format(barrier="bar.sync 0;", fence="", second="")
        for weak, strong in orders.items():
            body = body.replace(weak, strong if weak != missing else weak)
        launch = functools.partial(ptx.run, body, zeros(), zeros(), grid=4, threads=64, cooperative=True)
        if missing:
            with pytest.raises(Fault, match="race: a read of byte"):
                launch()
        else:
            launch()


def test_lanes_of_one_store_that_disagree(ptx):
    body = "st.global.b32 [%rd0], {};"
    ptx.run(body.format(5), zeros())
    with pytest.raises(Fault, match="in no order with a store of another value by the same instruction"):
        ptx.run(body.format("%r0"), zeros())
    ptx.machine.set_options(conflicts=0)
    winners = set()
    for seed in range(20):
        ptx.machine.set_options(seed=seed)
        ptx.run(body.format("%r0"), array := zeros())
        winners.add(int(array[0]))
    assert len(winners) > 3
    assert ptx.machine.counts().conflicts > 0


def test_source_lines(ptx):
    with pytest.raises(Fault) as caught:
        ptx.run(".loc 1 42 0\nst.global.b32 [%rd0], %r0;", zeros())
    assert str(caught.value).count("(kernel.cu:42): st.global.b32 [%rd0], %r0") == 2
