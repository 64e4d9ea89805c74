"""The ridge: checked, changed, chosen by leave-one-out."""

import numpy as np
import pytest
import torch
from memory_helpers import C, K, apart, latents, least_squares

from engram_kernels.memory import EpisodicMemory, state
from engram_kernels.memory.ridge import candidates, choose_ridge, leave_one_out

pytestmark = pytest.mark.usefixtures("one_thread")


def test_leave_one_out_equals_leaving_out_one_by_one():
    memory, values, keys = EpisodicMemory(8, 6), latents(10, 6), latents(10, 6, seed=1)
    memory.write(values, keys=keys)
    weights = keys @ memory.m0_pinv
    ridges = torch.tensor([1e-3, 0.1, 2.0]).double()
    errors = leave_one_out(memory.gram[0], memory.cross[0], weights, values, ridges)
    for ridge, error in zip(ridges.tolist(), errors.tolist(), strict=True):
        squares = []
        for row in range(10):
            others = [i for i in range(10) if i != row]
            without = least_squares(memory, values[others], keys[others], ridge)
            squares.append(np.square(values[row].numpy() - weights[row].numpy() @ without).sum())
        assert error == pytest.approx(np.mean(squares), rel=1e-9)


def test_the_ridge_is_chosen_anew_once_after_a_change(monkeypatch):
    keys = latents(40, C)
    values = keys @ latents(C, C, seed=1) / 8 + 2 * latents(40, C, seed=2)  # A rule under much noise.
    memory = EpisodicMemory(K, C, ridge="loo")
    memory.write(values[:20], keys=keys[:20], ids=range(20))
    memory.matrix()
    first = float(memory.ridges)
    memory.write(values[20:], keys=keys[20:], ids=range(20, 40))
    with monkeypatch.context() as patched:
        calls = []
        patched.setattr(state, "choose_ridge", lambda *rows: calls.append(1) or choose_ridge(*rows))
        memory.matrix()
        memory.leverage(keys)
        assert len(calls) == 1
    weights = keys @ memory.m0_pinv
    chosen = choose_ridge(memory.gram[0], memory.cross[0], weights, values)
    grid = candidates(float(torch.linalg.eigvalsh(memory.gram[0])[-1]), K, torch.float64)
    errors = leave_one_out(memory.gram[0], memory.cross[0], weights, values, grid)
    assert float(memory.ridges) == chosen == float(grid[errors.argmin()]) != first
    assert 0 < int(errors.argmin()) < len(grid) - 1
    assert apart(memory.matrix()[0], least_squares(memory, values, keys, chosen)) < 1e-9
    memory.forget(ids=range(40))
    assert not memory.read(keys).any()


def test_an_fp32_state_chooses_the_ridge_that_an_fp64_state_does():
    keys = latents(40, C)
    values = keys @ latents(C, C, seed=1) / 8 + 2 * latents(40, C, seed=2)
    low, full = (EpisodicMemory(K, C, ridge="loo", state_dtype=d) for d in (torch.float32, torch.float64))
    for memory in (low, full):
        memory.write(values, keys=keys, ids=range(40))
        memory.matrix()
    assert float(low.ridges) == pytest.approx(float(full.ridges), rel=1e-5)
    # Rows that are alone, whose leverages in fp32 are 1 at small ridges.
    low.forget(ids=range(3, 40))
    assert low.read(keys, addressing="key").isfinite().all()


def test_without_ids_nothing_can_be_left_out():
    memory = EpisodicMemory(K, C, ridge="loo")
    with pytest.raises(
        ValueError, match=r"^ids: expected one for each row, as the ridge is chosen over the rows"
    ):
        memory.write(latents(2, C))
    assert len(memory) == 0


def test_a_chosen_ridge_goes_with_the_rows_it_was_chosen_for():
    values = 30 * latents(3, C)
    for empty in (lambda memory: memory.forget(ids=range(3)), EpisodicMemory.reset):
        memory, new = EpisodicMemory(K, C, ridge="loo"), EpisodicMemory(K, C, ridge="loo")
        memory.write(values, ids=range(3))
        memory.matrix()
        assert not torch.equal(memory.ridges, new.ridges)
        empty(memory)
        assert torch.equal(memory.leverage(values), new.leverage(values))
        assert torch.equal(memory.ridges, new.ridges)


def test_the_ridge_can_be_changed():
    memory, other = EpisodicMemory(K, C), EpisodicMemory(K, C, ridge=3.0)
    for written in (memory, other):
        written.write(latents(5, C), ids=range(5))
    memory.matrix()
    memory.ridge = 3.0
    assert torch.equal(memory.matrix(), other.matrix())
    with pytest.raises(ValueError, match=r"^ridge: expected a number above 0"):
        memory.ridge = 0
    assert memory.ridge == 3.0
    memory.ridge = "loo"
    chosen = EpisodicMemory(K, C, ridge="loo")
    chosen.write(latents(5, C), ids=range(5))
    assert torch.equal(memory.matrix(), chosen.matrix()) and float(memory.ridges) != 3.0
    memory.ridge = 3.0
    memory.write(latents(1, C, seed=1))
    with pytest.raises(ValueError, match=r"^ridge: expected a number, as there are rows without ids"):
        memory.ridge = "loo"
    memory.ridge = 0.5
    assert memory.ridges.tolist() == [0.5]


def test_a_ridge_must_show_in_the_states_type_and_an_encoder_is_a_name():
    with pytest.raises(ValueError, match=r"^ridge: expected a number that fits float32, got 1e-60"):
        EpisodicMemory(K, C, ridge=1e-60, state_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^ridge: expected a number that fits float32, got 1e.60"):
        EpisodicMemory(K, C, ridge=1e60, state_dtype=torch.float32)
    with pytest.raises(TypeError, match=r"^encoder: expected its name, or None, got Linear"):
        EpisodicMemory(K, C, encoder=torch.nn.Linear(1, 1))
