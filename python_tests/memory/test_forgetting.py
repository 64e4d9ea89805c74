"""What is forgotten leaves a memory as if it had never been written."""

import warnings

import pytest
import torch
from memory_helpers import C, K, apart, assert_unchanged, filled, frozen, latents, least_squares

import engram_kernels as ek
from engram_kernels.memory import EpisodicMemory, forgetting
from engram_kernels.memory.forgetting import HELD_SHARE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("by", ["ids", "values"])
def test_forgetting_equals_never_having_written(dtype, bound, by):
    kept, gone, queries = (latents(n, C, dtype=dtype, seed=n) for n in (20, 15, 9))
    memory, never = EpisodicMemory(K, C), EpisodicMemory(K, C)
    named = by == "ids"
    memory.write(kept[:10], ids=range(10) if named else None)
    memory.write(gone, ids=range(100, 115) if named else None)
    memory.write(kept[10:], ids=range(10, 20) if named else None)
    never.write(kept)
    knew = memory.read(gone)
    if named:
        memory.forget(ids=range(100, 115))
    else:
        memory.forget(gone)
    assert apart(memory.gram, never.gram) < bound and apart(memory.cross, never.cross) < bound
    assert apart(memory.matrix(), never.matrix()) < bound
    for rows in (kept, gone, queries):
        for addressing in ("content", "key"):
            readouts = (each.read(rows, addressing=addressing) for each in (memory, never))
            assert apart(*readouts) < bound
    # And it did know before.
    assert apart(knew, gone) < 1e-5 and apart(memory.read(gone), gone) > 0.5
    assert memory.count.tolist() == [20]


def test_forgetting_the_last_row_leaves_exactly_nothing():
    memory, values = EpisodicMemory(K, C, batch=2), latents(30, C)
    memory.write(values, ids=range(30), memory=0)
    memory.write(values[:3], memory=1)
    memory.forget(ids=range(30))
    for buffer in (memory.gram, memory.cross, memory.energy):
        assert not buffer[0].any() and buffer[1].any()
    assert len(memory.ledger) == 0 and memory.count.tolist() == [0, 3]


def test_ten_thousand_mixed_writes_and_forgets_stay_least_squares():
    """Occupancy 0.9 K, one to sixteen rows at a time."""
    generator, full = torch.Generator().manual_seed(0), round(0.9 * K)
    memory, held, operations, name = EpisodicMemory(K, C, ridge=0.1), {}, 0, 0
    while operations < 10_000:
        size = int(torch.randint(1, 17, (), generator=generator))
        if len(held) + size <= full:
            rows = torch.randn(size, C, generator=generator, dtype=torch.float64)
            ids = list(range(name, name + size))
            memory.write(rows, ids=ids)
            held |= dict(zip(ids, rows, strict=True))
            name += size
        else:
            order = torch.randperm(len(held), generator=generator)[:size].tolist()
            ids = [list(held)[i] for i in order]
            memory.forget(ids=ids)
            for each in ids:
                del held[each]
        operations += size
    values = torch.stack(list(held.values()))
    expected = least_squares(memory, values)
    assert len(memory) == len(held) and memory.ids == list(held)
    assert apart(memory.matrix()[0], expected) < 1e-3
    # In truth far nearer: what is left is the rounding of sums that the rows have passed through.
    assert apart(memory.matrix()[0], expected) < 1e-9
    assert apart(memory.read(values, addressing="key"), (values @ memory.m0_pinv).numpy() @ expected) < 1e-9


def test_equal_rows_are_written_and_forgotten_one_by_one():
    memory, once = EpisodicMemory(K, C), EpisodicMemory(K, C)
    values = latents(1, C)
    memory.write(values, ids=["first"])
    memory.write(values, ids=["second"])
    assert memory.leverage(values).item() == pytest.approx(0.5, rel=1e-2)
    memory.forget(values)
    once.write(values)
    assert memory.ids == ["first"] and apart(memory.matrix(), once.matrix()) < 1e-9
    memory.forget(values)
    assert len(memory) == 0 and not memory.gram.any()


def test_forgetting_twice_is_refused():
    memory = filled()
    memory.forget(ids=["a"])
    before = frozen(memory)
    for arguments in ({"ids": ["b", "a"]}, {"values": latents(6, C)[:1]}):
        with pytest.raises(ek.EngramError, match=r"^(ids|values): expected (ones|rows) that were written"):
            memory.forget(**arguments)
        assert_unchanged(memory, before)


def test_forgetting_the_unknown_is_refused():
    memory = EpisodicMemory(K, C)
    memory.write(latents(6, C))
    before, unknown = frozen(memory), latents(2, C, seed=9)
    for there, said in ((0, "none were"), (1, "1 was"), (2, "2 were")):
        few = EpisodicMemory(K, C)
        few.write(latents(there, C))
        with pytest.raises(ek.EngramError, match=rf"got 3 that .* where {said} written without ids$"):
            few.forget(latents(3, C, seed=9))
    with pytest.raises(ek.EngramError, match=r"^w: expected rows that the memory holds"):
        memory.forget(unknown)
    assert_unchanged(memory, before)
    with pytest.raises(ek.EngramError, match=r"^values: expected rows that were written, got 7"):
        memory.forget(latents(7, C))
    assert_unchanged(memory, before)
    for ids, said in ((["x"], "'x'"), (["x", "y"], "'x' and 1 more")):
        with pytest.raises(ek.EngramError, match=rf"^ids: expected ones that were written, got {said}$"):
            memory.forget(ids=ids)
    assert_unchanged(memory, before)


def test_one_memory_that_refuses_spares_the_others():
    memory, values = EpisodicMemory(K, C, batch=2), latents(2, 4, C)
    memory.write(values)
    before = frozen(memory)
    with pytest.raises(ek.EngramError, match=r"^w: expected rows that the memory holds"):
        memory.forget(torch.stack([values[0], latents(4, C, seed=9)]))
    assert_unchanged(memory, before)


def test_autocast_does_not_reach_the_check_of_rows_without_ids():
    memory = EpisodicMemory(K, C, ridge=0.1, state_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        memory.write(latents(8, C), ids=range(8))
        memory.write(latents(3, C, seed=1))
        memory.forget(latents(3, C, seed=1))
    assert memory.ids == list(range(8)) and len(memory) == 8


@pytest.mark.parametrize("scale", [1e4, 1e8, 1e10])
def test_a_large_row_does_not_drown_the_others_when_it_is_forgotten(scale):
    """The rounding of a large row's term is larger than the others' terms: they are summed anew."""
    kept, large = latents(8, C), scale * latents(1, C, seed=1)
    memory, never = EpisodicMemory(K, C), EpisodicMemory(K, C)
    for written in (memory, never):
        written.write(kept, ids=range(8))
    memory.write(large, ids=["large"])
    memory.forget(ids=["large"])
    assert apart(memory.matrix(), never.matrix().numpy()) < 1e-12
    memory.overwrite([3], large)
    memory.overwrite([3], kept[3:4])
    assert apart(memory.matrix(), never.matrix().numpy()) < 1e-12
    assert torch.equal(memory.energy, never.energy)


def test_rows_without_ids_cannot_be_summed_anew_which_is_said_once():
    memory = EpisodicMemory(K, C)
    memory.write(latents(8, C))
    with pytest.warns(UserWarning, match="memory 0: what was forgotten has left rounding of about") as seen:
        for _ in range(2):
            memory.write(1e3 * latents(1, C, seed=1), ids=["large"])
            memory.forget(ids=["large"])
    assert len(seen) == 1 and seen[0].filename == __file__


@pytest.mark.parametrize(("scale", "ridge"), [(30, 0.01), (1e3, 1e4)])
def test_rounding_far_under_the_ridge_is_not_worth_a_word(scale, ridge):
    memory = EpisodicMemory(K, C, ridge=ridge)
    memory.write(latents(8, C))
    memory.write(scale * latents(1, C, seed=1), ids=["large"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.forget(ids=["large"])


def test_a_sum_that_fails_leaves_the_state_of_what_is_held(monkeypatch):
    memory, never, values = EpisodicMemory(K, C), EpisodicMemory(K, C), latents(10, C)
    memory.write(values, ids=range(10))
    never.write(values[9:], ids=[9])

    def full(*_arguments, **_options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(forgetting, "memory_accumulate_", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        memory.forget(ids=range(9))
    assert memory.ids == [9] and len(memory) == 1
    assert apart(memory.gram, never.gram) < 1e-12 and apart(memory.cross, never.cross) < 1e-12


def test_a_memory_is_summed_anew_once_most_of_it_is_gone():
    """However small the steps, and down to a single row; before that, forgetting is a subtraction."""
    memory = EpisodicMemory(K, C)
    keys, values = latents(30, C), 100 * latents(30, C, seed=1)
    memory.write(values, keys=keys, ids=range(30))
    whole, sums = memory.energy.clone(), 0
    for name in range(29):
        before = memory.energy.clone()
        memory.forget(ids=[name])
        held = float(memory.gram[0].diagonal().sum())
        assert held >= HELD_SHARE * float(memory.energy[0, 0])
        if not torch.equal(memory.energy, before):
            sums += 1
            assert held < 2 * HELD_SHARE * float(whole[0, 0])
            anew = EpisodicMemory(K, C)
            anew.write(values[name + 1 :], keys=keys[name + 1 :])
            assert torch.equal(memory.energy, anew.energy) and torch.equal(memory.gram, anew.gram)
    assert 1 <= sums <= 3
    memory.write(1e8 * values[:1], keys=1e8 * keys[:1], ids=["large"])
    memory.forget(ids=["large"])
    anew = EpisodicMemory(K, C)
    anew.write(values[29:], keys=keys[29:])
    assert torch.equal(memory.matrix(), anew.matrix())


def test_the_last_rows_without_ids_must_be_those_that_are_there():
    memory = EpisodicMemory(K, C)
    memory.write(latents(1, C))
    before = frozen(memory)
    with pytest.raises(ek.EngramError, match=r"^values: expected the last 1 rows that were written without"):
        memory.forget(0.1 * latents(1, C))
    with pytest.raises(ek.EngramError, match=r"^values: expected the last 1 rows that were written without"):
        memory.forget(torch.zeros(1, C))
    assert_unchanged(memory, before)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("named", [0, 2])
def test_the_last_rows_without_ids_leave_neither_address_nor_value(named, scale):
    """What is left is measured against what keys and values were, whatever the scale of either."""
    keys, values = latents(5, C), scale * latents(5, C, seed=1)
    memory = EpisodicMemory(K, C, ridge=0.1)
    memory.write(scale * latents(named, C, seed=2), keys=latents(named, C, seed=3), ids=range(named))
    for row in range(5):
        memory.write(values[row : row + 1], keys=keys[row : row + 1])
    before = frozen(memory)
    for wrong in ({"values": values / 2, "keys": keys}, {"values": 2 * values, "keys": keys / 2}):
        with pytest.raises(ek.EngramError, match=r"^values: expected the last 5 rows that were written with"):
            memory.forget(**wrong)
        assert_unchanged(memory, before)
    memory.forget(values, keys=keys)
    assert memory.ids == list(range(named)) and len(memory) == named


def test_rows_without_ids_are_forgotten_from_several_memories():
    memory, values = EpisodicMemory(K, C, batch=2), latents(2, 4, C)
    memory.write(values)
    memory.forget(values[:, :2])
    for number in range(2):
        alone = EpisodicMemory(K, C)
        alone.write(values[number, 2:])
        assert apart(memory.matrix()[number], alone.matrix()[0]) < 1e-9


def test_rows_of_the_ledger_do_not_vouch_for_rows_without_ids():
    named, memory = latents(1, C), EpisodicMemory(K, C)
    memory.write(named, ids=["a"])
    memory.write(latents(3, C, seed=1))
    before = frozen(memory)
    with pytest.raises(ek.EngramError, match=r"^w: expected rows that the memory holds"):
        memory.forget(0.999 * named)
    assert_unchanged(memory, before)
    memory.forget(ids=["a"])
    assert len(memory) == 3 and torch.linalg.eigvalsh(memory.gram[0])[0] > -1e-12
