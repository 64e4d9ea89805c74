"""The state of a memory: its addresses, its precision, devices, dtypes, state dicts."""

import copy
import warnings

import numpy as np
import pytest
import torch
from memory_helpers import STATE, C, K, apart, assert_unchanged, filled, frozen, latents, least_squares

import engram_kernels as ek
from engram_kernels.memory import EpisodicMemory
from engram_kernels.memory.state import FP32_CONDITION

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("m0", ["random", "identity", "given"])
@pytest.mark.parametrize("slots", [1, 20, 64, 80])
def test_every_addressing_matrix(m0, slots):
    given = latents(slots, C, seed=7) if m0 == "given" else m0
    memory = EpisodicMemory(slots, C, ridge=0.1, m0=given)
    assert apart(memory.m0_pinv, np.linalg.pinv(memory.m0.numpy())) < 1e-10
    values = latents(12, C)
    memory.write(values)
    assert apart(memory.matrix()[0], least_squares(memory, values)) < 1e-10


def test_random_addresses_come_from_the_seed_alone():
    state = torch.get_rng_state()
    first, second, other = (EpisodicMemory(K, C, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.m0, second.m0) and not torch.equal(first.m0, other.m0)


def test_solutions_are_kept_until_the_next_change():
    memory = filled()
    for seed, solved in enumerate((memory.matrix, memory.inverse)):
        first = solved()
        assert solved() is first
        memory.overwrite(["a"], latents(1, C, seed=3 + seed))
        assert not torch.equal(solved(), first)


def test_a_ridge_that_is_lost_in_the_rounding_says_so():
    memory = EpisodicMemory(K, C)
    memory.write(latents(4, C) * 1e20)
    for read in (memory.read, memory.leverage):
        with pytest.raises(
            ek.EngramError, match=r"^ridge: expected one that shows beside the state, such as"
        ):
            read(latents(1, C))


def test_an_fp32_state_keeps_the_digits_that_its_condition_allows():
    """The relative error of M stays under the rounding of all sums, times the condition number."""
    values = latents(200, C)
    for ridge in (10.0, 1.0, 0.1):
        memory = EpisodicMemory(K, C, ridge=ridge, state_dtype=torch.float32)
        memory.write(values[:30], ids=range(30))
        memory.write(values[30:], ids=range(30, 200))
        memory.forget(ids=range(30, 200))
        condition = memory.condition()
        assert condition < FP32_CONDITION
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            matrix = memory.matrix()
        error = apart(matrix[0], least_squares(memory, values[:30]))
        trace = float(memory.energy[0, 0]) / float(memory.gram[0].diagonal().sum())
        assert error < K * torch.finfo(torch.float32).eps * trace * condition


def test_an_fp32_state_of_high_condition_warns_once():
    memory = EpisodicMemory(K, C, ridge=1e-4, state_dtype=torch.float32)
    with pytest.warns(
        UserWarning, match=r"^state_dtype: a condition number of .* fp32 state more than half"
    ) as seen:
        for seed in range(3):
            memory.write(latents(4, C, seed=seed))
            memory.matrix()
    assert len(seen) == 1 and seen[0].filename == __file__ and memory.condition() > FP32_CONDITION
    memory.reset()
    memory.write(latents(4, C))
    with pytest.warns(UserWarning, match=r"^state_dtype: a condition number of"):
        memory.matrix()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled(ridge=1e-4).matrix()


def test_rounding_is_not_read_as_content():
    """What forgetting leaves behind in an fp32 state of high condition must not turn up in readouts."""
    kept, gone = latents(8, C), latents(24, C, seed=1)
    memory = EpisodicMemory(K, C, ridge=1e-3, state_dtype=torch.float32)
    memory.write(kept, ids=range(8))
    memory.write(gone, ids=range(8, 32))
    memory.forget(ids=range(8, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        readout = memory.read(gone)
    assert memory.condition() > 5e4
    basis = np.linalg.svd(kept.numpy(), full_matrices=False)[2]
    assert apart(readout, gone.numpy() @ basis.T @ basis) < 0.05


def test_the_condition_number():
    memory = filled(ridge=0.5)
    expected = np.linalg.cond(memory.gram[0].numpy() + 0.5 * np.eye(K))
    assert memory.condition() == pytest.approx(expected, rel=1e-9)
    assert EpisodicMemory(K, C).condition() == 1


def test_a_model_in_half_precision_leaves_the_state_alone():
    memory = filled()
    before, plain = frozen(memory), memory.read(latents(3, C))
    model = torch.nn.ModuleDict({"memory": memory, "linear": torch.nn.Linear(2, 2)})
    for convert in (lambda: model.to(torch.bfloat16), model.half, model.float, model.bfloat16):
        convert()
        assert {buffer.dtype for buffer in memory.buffers()} == {torch.float64, torch.int64}
        assert_unchanged(memory, before)
    assert model["linear"].weight.dtype == torch.bfloat16
    assert torch.equal(memory.read(latents(3, C)), plain)


def test_a_memory_moves_to_other_devices_in_its_own_dtype():
    memory = filled(ridge=1.0, state_dtype=torch.float32)
    first = memory.matrix()
    assert memory.to("cpu") is memory
    assert memory.matrix() is not first  # It may lie on another device now.
    assert {buffer.dtype for buffer in memory.buffers()} == {torch.float32, torch.int64}
    memory.to("meta", torch.float64)
    assert {(buffer.device.type, buffer.dtype) for buffer in memory.buffers()} == {
        ("meta", torch.float32),
        ("meta", torch.int64),
    }
    memory.to_empty(device="cpu")
    assert {buffer.device.type for buffer in memory.buffers()} == {"cpu"}


def test_autocast_does_not_reach_the_state():
    memories = [EpisodicMemory(K, C, ridge="loo", state_dtype=torch.float32) for _ in range(2)]
    values, fresh, queries = latents(30, C), latents(5, C, seed=1), latents(4, C, seed=2).float()
    readouts = []
    for memory, enabled in zip(memories, (False, True), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            memory.write(values, ids=range(30))
            memory.overwrite(iter(range(5)), fresh)
            memory.forget(ids=iter(range(20, 30)))
            noisy = {"noise": 0.1, "generator": torch.Generator().manual_seed(0)}
            readouts.append((memory.read(queries), memory.read(queries, addressing="key", **noisy)))
    for name in STATE:
        assert torch.equal(*(getattr(memory, name) for memory in memories)), name
    assert all(torch.equal(*pair) for pair in zip(*readouts, strict=True))
    assert len(memories[0]) == 20
    exact = EpisodicMemory(K, C)
    exact.write(values[:20], ids=range(20))
    exact.overwrite(range(5), fresh)
    # The rounding of sums of thirty terms; bf16 would leave ten thousand times that.
    assert apart(memories[1].cross, exact.cross) < 30 * torch.finfo(torch.float32).eps


def test_a_deep_copy_is_its_own():
    memory = filled()
    memory.matrix()
    before, other = frozen(memory), copy.deepcopy(memory)
    assert_unchanged(other, before)
    other.forget(ids=["a"])
    other.write(latents(2, C, seed=4), ids=[1, 2])
    assert_unchanged(memory, before)
    assert not torch.equal(other.matrix(), memory.matrix())


def test_state_dicts_carry_the_state_without_the_ledger(tmp_path):
    memory, other = filled(), EpisodicMemory(K, C, seed=5)
    other.write(latents(1, C), ids=["mine"])
    other.matrix()
    torch.save(memory.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.read(latents(3, C)), memory.read(latents(3, C)))
    assert len(other) == 6 and other.ids == []
    # Without the ledger the rows are as if written without ids.
    other.forget(latents(6, C)[:2])
    memory.forget(ids=["a", "b"])
    assert apart(other.matrix(), memory.matrix()) < 1e-12


def test_a_state_is_loaded_whole_or_not_at_all():
    memory = EpisodicMemory(K, C)
    memory.write(latents(3, C), ids=[1, 2, 3])
    before = frozen(memory)
    memory.load_state_dict({}, strict=False)
    assert_unchanged(memory, before)
    with pytest.raises(RuntimeError, match=r'Missing key.*"gram", "cross"'):
        memory.load_state_dict({})
    other = EpisodicMemory(K // 2, C)
    with pytest.raises(RuntimeError, match="gram: expected"):
        memory.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"ridges: expected 0.01, got \[5.0\]"):
        memory.load_state_dict(EpisodicMemory(K, C, ridge=5.0).state_dict())
    assert_unchanged(memory, before)


@pytest.mark.parametrize("ridge", [1.0, "loo"])
def test_a_state_is_loaded_into_another_dtype_and_with_its_chosen_ridge(ridge):
    memory, other = filled(ridge=ridge), EpisodicMemory(K, C, ridge=ridge, state_dtype=torch.float32)
    memory.matrix()
    other.load_state_dict(memory.state_dict())
    for name in STATE:
        loaded = getattr(other, name)
        assert loaded.dtype in (torch.float32, torch.int64)
        assert torch.equal(loaded, getattr(memory, name).to(loaded.dtype)), name
    other.matrix()
    assert torch.equal(other.ridges, memory.ridges.float())  # There is no ledger to choose it anew from.
