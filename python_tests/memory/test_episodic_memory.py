"""`EpisodicMemory` against least squares in fp64 NumPy."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch

import engram_kernels as ek
from engram_kernels._hashing import digest
from engram_kernels.memory import EpisodicMemory, episodic
from engram_kernels.memory.episodic import FP32_CONDITION, HELD_SHARE
from engram_kernels.memory.ridge import candidates, choose_ridge, leave_one_out

pytestmark = pytest.mark.usefixtures("one_thread")

K, C = 48, 64
STATE = ("gram", "cross", "count", "energy", "ridges")


def latents(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def least_squares(memory, values, keys=None, ridge=None):
    """M by NumPy: the augmented system [W; √λ I] M = [Z; 0], with W = keys · pinv(M₀)."""
    values = values.double().numpy()
    keys = values if keys is None else keys.double().numpy()
    weights = keys @ np.linalg.pinv(memory.m0.double().numpy())
    ridge = memory.ridge if ridge is None else ridge
    slots = memory.slots
    system = np.concatenate([weights, np.sqrt(ridge) * np.eye(slots)])
    right = np.concatenate([values, np.zeros((slots, values.shape[1]))])
    return np.linalg.lstsq(system, right, rcond=None)[0]


def apart(got, expected):
    got, expected = (np.asarray(x, dtype=np.float64) for x in (got, expected))
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def frozen(memory):
    """All that must not change when a call is refused."""
    ledger = [(name, *entry) for name, entry in memory.ledger.items()]
    return {name: getattr(memory, name).clone() for name in STATE}, ledger


def assert_unchanged(memory, before):
    state, ledger = before
    for name, tensor in state.items():
        assert torch.equal(getattr(memory, name), tensor), name
    now = [(name, *entry) for name, entry in memory.ledger.items()]
    assert [(row[0], row[1], row[4]) for row in now] == [(row[0], row[1], row[4]) for row in ledger]
    assert all(torch.equal(a[2], b[2]) and torch.equal(a[3], b[3]) for a, b in zip(now, ledger, strict=True))


# -- writing and reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_memory_is_the_least_squares_solution(dtype):
    memory = EpisodicMemory(K, C, ridge=0.1)
    values, keys = latents(30, C, dtype=dtype), latents(30, C, dtype=dtype, seed=1)
    memory.write(values, keys=keys)
    assert apart(memory.matrix()[0], least_squares(memory, values, keys)) < 1e-12
    assert len(memory) == 30 and memory.gram.dtype == torch.float64
    narrow = EpisodicMemory(K, C, ridge=0.1, state_dtype=torch.float32)
    narrow.write(values, keys=keys)
    assert {buffer.dtype for buffer in narrow.buffers()} == {torch.float32, torch.int64}
    readout = memory.read(keys, addressing="prior")
    assert readout.dtype == dtype and readout.shape == (30, C)


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


def test_reading_by_content_projects_onto_what_is_held():
    memory, values, queries = EpisodicMemory(K, C), latents(10, C), latents(5, C, seed=1)
    memory.write(values)
    basis = np.linalg.svd(values.numpy(), full_matrices=False)[2]
    assert apart(memory.read(queries), queries.numpy() @ basis.T @ basis) < 1e-9
    assert apart(memory.read(values), values) < 1e-9


@pytest.mark.parametrize("slots", [40, 64, 90])
def test_reading_by_content_keeps_its_digits_where_rows_are_alike(slots):
    """As latents of sentences are, which share a large mean: one singular value is far above the rest."""
    values = 0.05 * latents(30, C) + latents(1, C, seed=1)
    memory, queries = EpisodicMemory(slots, C, ridge=0.1), latents(5, C, seed=2)
    memory.write(values)
    basis = np.linalg.svd(values.numpy(), full_matrices=False)[2]
    assert apart(memory.read(queries), queries.numpy() @ basis.T @ basis) < 1e-8


def test_reading_by_the_prior_answers_a_key_with_its_value():
    memory, values, keys = EpisodicMemory(K, C, ridge=1e-9), latents(10, C), latents(10, C, seed=1)
    memory.write(values, keys=keys)
    assert apart(memory.read(keys, addressing="prior"), values) < 1e-6


def test_readouts_are_differentiable_in_the_queries():
    memory = EpisodicMemory(8, 6)
    memory.write(latents(4, 6))
    with torch.inference_mode():
        memory.read(latents(2, 6))  # What is kept must be of use where gradients are wanted.
    for addressing in ("memory", "prior"):
        queries = latents(3, 6, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(lambda z, a=addressing: memory.read(z, addressing=a), queries)


def test_no_call_is_recorded_but_reading():
    memory, values = filled(), latents(2, C, seed=1).requires_grad_()
    memory.write(values)
    memory.overwrite(["a"], values[:1])
    assert not memory.leverage(values).requires_grad
    memory.forget(values)
    assert not any(buffer.requires_grad for buffer in memory.buffers())
    assert memory.read(values).requires_grad


def test_noise_is_on_the_weights_and_from_the_generator():
    memory, queries = EpisodicMemory(4, 6), latents(20_000, 6, seed=1)
    memory.write(latents(9, 6))
    noisy = [memory.read(queries, noise=0.5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])
    difference = noisy[0] - memory.read(queries)
    matrix = memory.matrix()[0]
    # The covariance of n M with n of variance 0.25; twenty thousand samples show it to some percent.
    assert apart(difference.mT @ difference / len(queries), 0.25 * matrix.mT @ matrix) < 0.05
    assert memory.read(queries[:2].bfloat16(), noise=0.5).dtype == torch.bfloat16
    state = torch.get_rng_state()
    memory.read(queries)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_memory_reads_zeros():
    memory = EpisodicMemory(K, C)
    for addressing in ("memory", "prior"):
        assert torch.equal(memory.read(latents(3, C), addressing=addressing), torch.zeros(3, C).double())
    assert memory.leverage(latents(2, C)).isfinite().all() and len(memory) == 0 and memory


def test_solutions_are_kept_until_the_next_change():
    memory = filled()
    for seed, solved in enumerate((memory.matrix, memory.inverse)):
        first = solved()
        assert solved() is first
        memory.overwrite(["a"], latents(1, C, seed=3 + seed))
        assert not torch.equal(solved(), first)


def test_the_ledger_has_copies_of_single_rows():
    """Not views: they would change with the caller's tensors, and keep all of them alive."""
    memory, values, keys, fresh = EpisodicMemory(K, C), latents(4, C), latents(4, C, seed=1), latents(2, C)
    written = values.clone(), keys.clone(), fresh.clone()
    memory.write(values.requires_grad_(), keys=keys.requires_grad_(), ids=range(4), texts=iter("abcd"))
    memory.write(fresh, ids=[4, 5])
    memory.overwrite([0], fresh[1:])
    for tensor in (values, keys, fresh):
        tensor.detach().zero_()
    assert [memory.ledger[name].text for name in (0, 1, 2, 3)] == [None, "b", "c", "d"]
    for latent, expected in (
        (memory.ledger[2].value, written[0][2]),
        (memory.ledger[2].key, written[1][2]),
        (memory.ledger[4].value, written[2][0]),
        (memory.ledger[0].value, written[2][1]),
    ):
        assert torch.equal(latent, expected)
    for _, entry in memory.ledger.items():
        for latent in (entry.key, entry.value):
            assert latent.untyped_storage().nbytes() == 8 * C and not latent.requires_grad


# -- exact unlearning ----------------------------------------------------------------------------------------


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
        for addressing in ("memory", "prior"):
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


def test_the_order_of_writing_does_not_matter():
    values = latents(40, C)
    at_once, one_by_one = EpisodicMemory(K, C), EpisodicMemory(K, C)
    at_once.write(values)
    for row in torch.randperm(40, generator=torch.Generator().manual_seed(1)):
        one_by_one.write(values[row : row + 1])
    for name in ("gram", "cross"):
        assert apart(getattr(one_by_one, name), getattr(at_once, name)) < 1e-14
    assert apart(one_by_one.matrix(), at_once.matrix()) < 1e-9


def test_merging_equals_writing_both():
    first, second, joint = (EpisodicMemory(K, C) for _ in range(3))
    values = latents(30, C)
    first.write(values[:12], ids=range(12))
    second.write(values[12:], ids=range(12, 30), texts=["x"] * 18)
    joint.write(values, ids=range(30))
    before = frozen(second)
    assert first.merge(second) is first
    assert apart(first.gram, joint.gram) < 1e-14 and apart(first.matrix(), joint.matrix()) < 1e-9
    assert apart(first.energy, joint.energy) < 1e-14
    assert first.ids == list(range(30)) and first.ledger[20].text == "x" and len(first) == 30
    assert_unchanged(second, before)
    first.forget(ids=range(12, 30))
    joint.forget(ids=range(12, 30))
    assert apart(first.matrix(), joint.matrix()) < 1e-9


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
    assert apart(memory.read(values, addressing="prior"), (values @ memory.m0_pinv).numpy() @ expected) < 1e-9


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


# -- refusals ------------------------------------------------------------------------------------------------


def filled(**settings):
    memory = EpisodicMemory(K, C, **settings)
    memory.write(latents(6, C), ids=list("abcdef"), texts=[f"fact {i}" for i in range(6)])
    return memory


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


def largest(entry):
    """A row of small entries but one."""
    row = latents(1, C) / 10
    row[0, 3] = entry
    return row


BAD_WRITES = {
    "taken id": ({"ids": ["a"]}, ek.EngramError, "ids: expected new ones, got 'a'"),
    "id twice": ({"values": latents(2, C), "ids": ["x", "x"]}, ValueError, "ids: expected different ones"),
    "too few ids": ({"values": latents(2, C), "ids": ["x"]}, ValueError, "ids: expected 2"),
    "one text as ids": ({"ids": "x"}, TypeError, "ids: expected a sequence"),
    "id of another type": ({"ids": [1.5]}, TypeError, "ids: expected texts or integers, got float"),
    "truth as an id": ({"ids": [True]}, TypeError, "ids: expected texts or integers, got bool"),
    "texts without ids": ({"texts": ["x"]}, ValueError, "texts: expected ids with them"),
    "too few texts": ({"ids": ["x"], "texts": []}, ValueError, "texts: expected 1"),
    "no text": ({"ids": ["x"], "texts": [3]}, TypeError, "texts: expected texts or None, got int"),
    "width": ({"values": latents(1, C + 1)}, ValueError, "values: expected shape"),
    "one dimension": ({"values": latents(C)}, ValueError, "values: expected shape"),
    "integers": ({"values": torch.ones(1, C).long()}, TypeError, "values: expected a tensor of"),
    "nan": ({"values": latents(1, C) * torch.nan}, ValueError, "values: expected finite"),
    "infinite key": ({"keys": latents(1, C) * torch.inf}, ValueError, "keys: expected finite"),
    "keys of another shape": ({"keys": latents(2, C)}, ValueError, "keys: expected shape"),
    "huge": (
        {"values": largest(-3e200)},
        ValueError,
        "values: expected rows whose squares fit float64, got a largest entry of 3e.200$",
    ),
    "huge, at another key": (
        {"values": largest(-3e200), "keys": largest(2.0)},
        ValueError,
        "values: expected rows whose squares fit float64, got a largest entry of 3e.200$",
    ),
    "huge key": (
        {"values": largest(2.0), "keys": largest(-3e200)},
        ValueError,
        "values: expected rows whose squares fit float64, got a largest entry of 3e.200$",
    ),
    "memory": ({"memory": 1}, ValueError, "memory: expected from 0 to 0"),
    "memory's type": ({"memory": True}, TypeError, "memory: expected an integer"),
    "bounds": ({"cu_seqlens": torch.tensor([0, 2])}, ValueError, "cu_seqlens: expected bounds that rise"),
    "bounds' type": ({"cu_seqlens": torch.tensor([0.0, 1.0])}, TypeError, "cu_seqlens: expected int64"),
    "bounds' shape": ({"cu_seqlens": torch.tensor([0, 1, 1])}, ValueError, "cu_seqlens: expected shape"),
}


@pytest.mark.parametrize("case", BAD_WRITES)
def test_bad_writes_change_nothing(case):
    change, error, message = BAD_WRITES[case]
    memory = filled()
    before = frozen(memory)
    with pytest.raises(error, match=rf"^{message.replace('(', '.')}"):
        memory.write(**{"values": latents(1, C, seed=5), **change})
    assert_unchanged(memory, before)


BAD_OVERWRITES = {
    "unknown": ((["a", "x"], latents(2, C)), ek.EngramError, "ids: expected ones that were written, got 'x'"),
    "twice": ((["a", "a"], latents(2, C)), ValueError, "ids: expected different ones"),
    "too few": ((["a", "b"], latents(1, C)), ValueError, "values: expected shape"),
    "integers": ((["a"], torch.ones(1, C).long()), TypeError, "values: expected a tensor of"),
    "nan": ((["a"], latents(1, C) * torch.nan), ValueError, "values: expected finite"),
    "huge": ((["a"], latents(1, C) * 1e200), ValueError, "values: expected rows whose squares fit"),
}


@pytest.mark.parametrize("case", BAD_OVERWRITES)
def test_bad_overwrites_change_nothing(case):
    arguments, error, message = BAD_OVERWRITES[case]
    memory = filled()
    before = frozen(memory)
    with pytest.raises(error, match=rf"^{message}"):
        memory.overwrite(*arguments)
    assert_unchanged(memory, before)


def test_what_is_asked_of_forget_and_read_is_checked():
    memory = filled()
    before = frozen(memory)
    for arguments, got in (({}, "neither"), ({"ids": ["a"], "values": latents(1, C)}, "both")):
        with pytest.raises(ValueError, match=rf"^ids: expected ids or values, got {got}$"):
            memory.forget(**arguments)
    with pytest.raises(ValueError, match=r"^memory: expected None with ids"):
        memory.forget(ids=["a"], memory=0)
    with pytest.raises(ValueError, match=r"^addressing: expected one of memory, prior, got 'x'"):
        memory.read(latents(1, C), addressing="x")
    with pytest.raises(ValueError, match=r"^noise: expected a finite number of at least 0"):
        memory.read(latents(1, C), noise=-1)
    with pytest.raises(ValueError, match=r"^queries: expected finite"):
        memory.read(latents(1, C) * torch.nan)
    assert_unchanged(memory, before)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ridge": 0}, ValueError, "ridge: expected a number above 0, or 'loo', got 0 .without a ridge"),
        ({"ridge": -1.0}, ValueError, "ridge: expected a number above 0"),
        ({"ridge": float("nan")}, ValueError, "ridge: expected a number above 0"),
        ({"ridge": float("inf")}, ValueError, "ridge: expected a number above 0"),
        ({"ridge": True}, TypeError, "ridge: expected a number above 0, or 'loo', got True"),
        ({"ridge": "cv"}, TypeError, "ridge: expected a number above 0, or 'loo', got 'cv'"),
        ({"slots": 0}, ValueError, "slots: expected at least 1"),
        ({"latent": 1.0}, TypeError, "latent: expected an integer"),
        ({"seed": 1.0}, TypeError, "seed: expected an integer"),
        ({"batch": 0}, ValueError, "batch: expected at least 1"),
        ({"state_dtype": torch.bfloat16}, TypeError, "state_dtype: expected float64 or float32"),
        ({"m0": "zeros"}, ValueError, "m0: expected 'random', 'identity' or a tensor"),
        ({"m0": latents(K, 3)}, ValueError, "m0: expected shape"),
        ({"m0": torch.ones(K, C)}, ValueError, "m0: expected a matrix of rank 48, got rank 1"),
        ({"m0": latents(K, C) * torch.nan}, ValueError, "m0: expected finite"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=rf"^{message}"):
        EpisodicMemory(**{"slots": K, "latent": C, **settings})


def test_what_lies_on_another_device_is_refused():
    memory = filled().to("meta")
    for call in (
        lambda: memory.write(latents(1, C)),
        lambda: memory.forget(latents(6, C)),
        lambda: memory.overwrite(["a"], latents(1, C)),
        lambda: memory.read(latents(1, C)),
        lambda: memory.leverage(latents(1, C)),
    ):
        with pytest.raises(
            ValueError, match=r"^(values|queries): expected a tensor on meta, got one on cpu$"
        ):
            call()
    assert memory.ids == list("abcdef")


# -- overwriting, edges --------------------------------------------------------------------------------------


def test_overwriting_is_forgetting_and_writing_at_the_same_key():
    memory, anew = filled(), EpisodicMemory(K, C)
    values, fresh = latents(6, C), latents(2, C, seed=3)
    energy = memory.energy.clone()
    memory.overwrite(["e", "b"], fresh, texts=["new e", None])
    weights = values[[4, 1]] @ memory.m0_pinv
    assert apart(memory.energy - energy, [[weights.square().sum(), fresh.square().sum()]]) < 1e-12
    expected = values.clone()
    expected[[4, 1]] = fresh
    anew.write(expected, keys=values)
    assert torch.equal(memory.gram, filled().gram)
    assert apart(memory.cross, anew.cross) < 1e-14 and apart(memory.matrix(), anew.matrix()) < 1e-12
    assert memory.ids == list("abcdef") and memory.ledger["e"].text == "new e"
    assert torch.equal(memory.ledger["b"].value, fresh[1]) and torch.equal(memory.ledger["b"].key, values[1])
    memory.forget(ids=list("abcdef"))
    assert not memory.cross.any()


def test_rows_of_several_memories_are_overwritten_in_any_order():
    values, fresh, ids = latents(2, 3, C), latents(4, C, seed=3), [5, 0, 4, 1]
    memory, anew = EpisodicMemory(K, C, batch=2), EpisodicMemory(K, C, batch=2)
    memory.write(values, ids=range(6))
    memory.overwrite(ids, fresh)
    expected = values.clone().reshape(6, C)
    expected[ids] = fresh
    anew.write(expected.reshape(2, 3, C), keys=values)
    assert apart(memory.cross, anew.cross) < 1e-14
    assert all(torch.equal(memory.ledger[name].value, expected[name]) for name in range(6))


@pytest.mark.parametrize("ridge", [0.01, "loo"])
def test_no_rows_change_nothing(ridge):
    memory = filled(ridge=ridge)
    memory.matrix()
    before = frozen(memory)
    none = latents(0, C)
    memory.write(none)
    memory.write(none, ids=[])
    memory.forget(none)
    memory.forget(ids=[])
    memory.overwrite([], none)
    assert_unchanged(memory, before)
    assert memory.read(none).shape == (0, C) and memory.leverage(none).shape == (0,)


def test_one_slot_holds_the_weighted_mean():
    memory, values = EpisodicMemory(1, C, ridge=0.1), latents(5, C)
    memory.write(values, ids=range(5))
    weights = values @ memory.m0_pinv
    expected = (weights * values).sum(0) / (weights.square().sum() + 0.1)
    assert apart(memory.matrix()[0, 0], expected) < 1e-12
    memory.forget(ids=range(1, 5))
    assert apart(memory.read(values[:1]), values[:1]) < 1e-9


@pytest.mark.parametrize("scale", [1e-60, 1e-6, 1e6])
def test_small_and_large_latents(scale):
    """The solution is still that of least squares, however far the ridge weighs; and forgetting is exact."""
    memory, values = EpisodicMemory(K, C, ridge=0.1), latents(K + 20, C) * scale
    memory.write(values[:-5], ids=range(K + 15))
    memory.write(values[-5:], ids=["x", 1000, 1001, 1002, 1003])
    memory.forget(ids=["x"])
    rest = torch.cat([values[:-5], values[-4:]])
    weights, rest = (rest @ memory.m0_pinv).numpy(), rest.numpy()
    expected = np.linalg.solve(weights.T @ weights + 0.1 * np.eye(K), weights.T @ rest)
    assert apart(memory.matrix()[0], expected) < 1e-9


def test_a_ridge_that_is_lost_in_the_rounding_says_so():
    memory = EpisodicMemory(K, C)
    memory.write(latents(4, C) * 1e20)
    for read in (memory.read, memory.leverage):
        with pytest.raises(
            ek.EngramError, match=r"^ridge: expected one that shows beside the state, such as"
        ):
            read(latents(1, C))


def test_bf16_latents_are_written_as_they_are():
    memory, wide = EpisodicMemory(K, C), EpisodicMemory(K, C)
    values = latents(8, C, dtype=torch.bfloat16)
    memory.write(values, ids=range(8))
    wide.write(values.double())
    assert torch.equal(memory.gram, wide.gram) and torch.equal(memory.cross, wide.cross)
    assert memory.ledger[3].value.dtype == torch.bfloat16
    memory.forget(values[3:4].float())  # The same row, whatever the dtype that it is given in.
    assert memory.ids == [0, 1, 2, 4, 5, 6, 7]
    never = EpisodicMemory(K, C)
    never.write(torch.cat([values[:3], values[4:]]))
    assert apart(memory.matrix(), never.matrix()) < 1e-9


# -- precision of the state ----------------------------------------------------------------------------------


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


def test_leverages():
    memory, values = filled(ridge=0.5), latents(6, C)
    weights = (values @ memory.m0_pinv).numpy()
    precision = memory.gram[0].numpy() + 0.5 * np.eye(K)
    expected = np.diag(weights @ np.linalg.inv(precision) @ weights.T)
    assert apart(memory.leverage(values), expected) < 1e-12
    assert 0 < expected.min() and expected.max() < 1
    assert apart(memory.leverage(latents(6, C, seed=2), keys=values), expected) < 1e-12


# -- as a module ---------------------------------------------------------------------------------------------


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
            readouts.append((memory.read(queries), memory.read(queries, addressing="prior", **noisy)))
    for name in STATE:
        assert torch.equal(*(getattr(memory, name) for memory in memories)), name
    assert all(torch.equal(*pair) for pair in zip(*readouts, strict=True))
    assert len(memories[0]) == 20
    exact = EpisodicMemory(K, C)
    exact.write(values[:20], ids=range(20))
    exact.overwrite(range(5), fresh)
    # The rounding of sums of thirty terms; bf16 would leave ten thousand times that.
    assert apart(memories[1].cross, exact.cross) < 30 * torch.finfo(torch.float32).eps


def test_autocast_does_not_reach_the_check_of_rows_without_ids():
    memory = EpisodicMemory(K, C, ridge=0.1, state_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        memory.write(latents(8, C), ids=range(8))
        memory.write(latents(3, C, seed=1))
        memory.forget(latents(3, C, seed=1))
    assert memory.ids == list(range(8)) and len(memory) == 8


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


def test_reset():
    memory = filled()
    assert repr(memory) == (
        "EpisodicMemory(slots=48, latent=64, batch=1, ridge=0.01, state_dtype=torch.float64)"
    )
    memory.matrix()
    memory.reset()
    assert len(memory) == 0 and memory.ids == [] and not memory.read(latents(2, C)).any()


# -- many memories -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.1, "loo"])
def test_batched_memories_are_memories_of_their_own(ridge):
    sizes, values = (3, 0, 5), latents(8, C)
    bounds = torch.tensor([0, 3, 3, 8])
    ragged, numbered = (EpisodicMemory(K, C, batch=3, ridge=ridge) for _ in range(2))
    ragged.write(values, ids=range(8), cu_seqlens=bounds.int())
    numbered.write(values[3:], ids=range(3, 8), memory=2)
    numbered.write(values[:3], ids=range(3), memory=0)
    alone = []
    for number, (start, size) in enumerate(zip(bounds.tolist(), sizes, strict=False)):
        alone.append(EpisodicMemory(K, C, ridge=ridge))
        rows = values[start : start + size]
        alone[number].write(rows, ids=range(size))
        for memory in (ragged, numbered):
            assert memory.count.tolist() == list(sizes)
            if size:
                assert apart(memory.read(rows, memory=number), alone[number].read(rows)) < 1e-12
                assert apart(memory.leverage(rows, memory=number), alone[number].leverage(rows)) < 1e-9
    queries = latents(8, C, seed=2)
    by_bounds = ragged.read(queries, cu_seqlens=bounds, addressing="prior")
    expected = [one.read(q, addressing="prior") for one, q in zip(alone, queries.split(sizes), strict=True)]
    assert apart(by_bounds, torch.cat(expected)) < 1e-12
    leverages = [one.leverage(q) for one, q in zip(alone, queries.split(sizes), strict=True)]
    assert apart(ragged.leverage(queries, cu_seqlens=bounds), torch.cat(leverages)) < 1e-9
    ragged.forget(ids=[0, 7])
    assert ragged.count.tolist() == [2, 0, 4]


def test_blocks_go_to_each_memory():
    memory, values = EpisodicMemory(K, C, batch=3), latents(3, 4, C)
    memory.write(values, ids=range(12))
    assert memory.ledger[4].memory == 1 and memory.read(values).shape == (3, 4, C)
    alone = EpisodicMemory(K, C)
    alone.write(values[1])
    assert apart(memory.read(values)[1], alone.read(values[1])) < 1e-12
    assert memory.leverage(values).shape == (3, 4)
    memory.forget(values)
    assert not memory.gram.any()
    with pytest.raises(ValueError, match=r"^memory: expected a number, as there are 3 memories, got None"):
        memory.write(values[0])
    with pytest.raises(ValueError, match=r"^values: expected shape \[N, 64\] or \[3, N, 64\]"):
        memory.write(values[:2])
    with pytest.raises(ValueError, match=r"^memory: expected None for values with a block for each memory"):
        memory.write(values, memory=0)


# -- the ridge by leave-one-out ------------------------------------------------------------------------------


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
        patched.setattr(episodic, "choose_ridge", lambda *rows: calls.append(1) or choose_ridge(*rows))
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
    assert low.read(keys, addressing="prior").isfinite().all()


def test_without_ids_nothing_can_be_left_out():
    memory = EpisodicMemory(K, C, ridge="loo")
    with pytest.raises(
        ValueError, match=r"^ids: expected one for each row, as the ridge is chosen over the rows"
    ):
        memory.write(latents(2, C))
    assert len(memory) == 0


# -- merging and files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (lambda: filled(), ek.EngramError, "other: expected a memory of other ids, got one that has 'a' too"),
        (lambda: EpisodicMemory(K, C, seed=1), ValueError, "other: expected a memory of the same m0"),
        (
            lambda: EpisodicMemory(K, C, ridge=1.0),
            ValueError,
            "other: expected a memory of ridge 0.01, got 1.0",
        ),
        (lambda: EpisodicMemory(K, C, batch=2), ValueError, "other: expected a memory of batch 1, got 2"),
        (lambda: EpisodicMemory(K + 1, C), ValueError, "other: expected a memory of slots"),
        (lambda: EpisodicMemory(K, C, encoder="x"), ValueError, "other: expected a memory of encoder"),
        (lambda: torch.nn.Linear(1, 1), TypeError, "other: expected an EpisodicMemory, got Linear"),
    ],
)
def test_memories_of_another_kind_do_not_merge(other, error, message):
    memory = filled()
    before = frozen(memory)
    with pytest.raises(error, match=rf"^{message}"):
        memory.merge(other())
    assert_unchanged(memory, before)


def test_memories_of_nearly_the_same_addresses_merge():
    """A machine's QR decomposition may round otherwise; no more than that is let through."""
    given = torch.linalg.qr(latents(C, C)).Q[:K]
    for step, merged in ((1e-15, True), (1e-12, False)):
        memory, other = EpisodicMemory(K, C, m0=given), EpisodicMemory(K, C, m0=given + step)
        before = frozen(memory)
        other.write(latents(3, C), ids=range(3))
        if merged:
            assert memory.merge(other).ids == [0, 1, 2]
        else:
            with pytest.raises(ValueError, match=r"^other: expected a memory of the same m0, got another$"):
                memory.merge(other)
            assert_unchanged(memory, before)


def test_memories_whose_sum_overflows_do_not_merge():
    memory, other = (EpisodicMemory(K, C, ridge=1e300) for _ in range(2))
    for each, name in ((memory, "a"), (other, "b")):
        each.write(largest(1.2e154), ids=[name])
    before = frozen(memory)
    with pytest.raises(ValueError, match=r"^other: expected finite values, got"):
        memory.merge(other)
    assert_unchanged(memory, before)


def mixed(**settings):
    """Two memories, three dtypes, keys of their own."""
    memory = EpisodicMemory(8, 6, batch=2, ridge="loo", encoder="minilm", **settings)
    memory.write(latents(2, 3, 6, dtype=torch.bfloat16), ids=["é", 1, "1", 2, 3, 4], texts=["Paris"] * 6)
    memory.write(latents(4, 6, seed=1).float(), latents(4, 6, seed=2).float(), ids=range(10, 14), memory=1)
    return memory


@pytest.mark.parametrize("state_dtype", [torch.float64, torch.float32])
def test_files_hold_a_memory_to_the_bit(tmp_path, state_dtype):
    memory = mixed(state_dtype=state_dtype)
    memory.matrix()
    memory.save_pretrained(str(tmp_path / "memory"))
    assert "é" in (tmp_path / "memory" / "config.json").read_text(encoding="utf-8")
    other = EpisodicMemory.from_pretrained(str(tmp_path / "memory"))
    for name, buffer in memory.named_buffers():
        assert torch.equal(other.get_buffer(name), buffer), name
    assert_unchanged(other, frozen(memory))
    assert other.ledger["é"].key is other.ledger["é"].value
    assert {other.ledger[name].value.dtype for name in other.ids} == {torch.bfloat16, torch.float32}
    for _, entry in other.ledger.items():
        assert entry.value.untyped_storage().nbytes() == 6 * entry.value.element_size()
    assert (other.ridge, other.encoder) == ("loo", "minilm")
    assert torch.equal(other.read(latents(2, 3, 6)), memory.read(latents(2, 3, 6)))
    other.forget(ids=other.ids)
    assert not other.gram.any()


def test_files_are_replaced_only_when_asked(tmp_path):
    memory, folder = mixed(), tmp_path / "memory"
    memory.save_pretrained(folder)
    with pytest.raises(ek.EngramError, match=r"^directory: expected a new or empty one"):
        memory.save_pretrained(folder)
    memory.forget(ids=[1])
    for _ in range(2):  # The second time, by a memory that is the same.
        memory.save_pretrained(folder, replace=True)
        assert EpisodicMemory.from_pretrained(folder).ids == memory.ids and len(list(folder.iterdir())) == 2
    next(folder.glob("*.safetensors")).unlink()
    memory.forget(ids=[2])
    memory.save_pretrained(str(folder), replace=True)
    memory.save_pretrained(tmp_path / "new", replace=True)
    for saved in (folder, tmp_path / "new"):
        assert EpisodicMemory.from_pretrained(saved).ids == memory.ids
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ek.EngramError, match=r"^directory: expected a saved memory"):
        memory.save_pretrained(tmp_path / "other", replace=True)
    assert (tmp_path / "other" / "config.json").read_text() == "{}"


def test_a_change_that_this_memory_has_not_seen_is_not_replaced(tmp_path):
    folder, ours, theirs = tmp_path / "memory", mixed(), latents(1, 6).float()
    ours.save_pretrained(folder)
    other = EpisodicMemory.from_pretrained(folder)
    other.write(theirs, ids=["theirs"], memory=0)
    other.save_pretrained(folder, replace=True)
    other.overwrite(["theirs"], theirs, texts=["only another text"])
    other.save_pretrained(str(folder), replace=True)  # Again, by another name of the same folder.
    ours.write(theirs, ids=["ours"], memory=0)
    with pytest.raises(ek.EngramError, match=r"^directory: expected .* load it .*again"):
        ours.save_pretrained(folder, replace=True)
    kept = EpisodicMemory.from_pretrained(folder)
    assert "theirs" in kept.ids and kept.ledger["theirs"].text == "only another text"
    ours.save_pretrained(tmp_path / "aside")
    # A memory that never saw what is there replaces it, as it was asked to.
    mixed().save_pretrained(folder, replace=True)
    assert "theirs" not in EpisodicMemory.from_pretrained(folder).ids


def damage(folder, kind):
    config = folder / "config.json"
    (weights,) = folder.glob("*.safetensors")
    content = json.loads(config.read_text())
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif kind == "flipped":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        config.unlink()
    elif kind == "no kind":
        config.write_text("{}")
    elif kind == "no JSON":
        config.write_text(config.read_text()[:40])
    else:
        config.write_text(json.dumps(content | kind))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("cut", "is incomplete or was changed"),
        ("flipped", "is incomplete or was changed"),
        ("no weights", r"\(No such file or directory\)$"),
        ("no config", r"\(No such file or directory\)$"),
        ("no kind", r"\(no 'kind'\)$"),
        ("no JSON", "Unterminated string"),
        ({"slots": 9}, "config.json was changed"),
        ({"format": 2}, "its format is 2, not 1"),
        ({"kind": "bert"}, "its kind is 'bert'"),
        ({"ledger": []}, "config.json was changed"),
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, kind, reason):
    mixed().save_pretrained(tmp_path / "memory")
    damage(tmp_path / "memory", kind)
    with pytest.raises(ek.EngramError, match=rf"^directory: expected a saved memory, got .*{reason}"):
        EpisodicMemory.from_pretrained(tmp_path / "memory")


def forge(folder, **changes):
    """Another configuration, with the checksum that belongs to it."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    del config["checksum"]
    path.write_text(json.dumps(config | {"checksum": digest(config)}), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ledger: {"slots": 9}, "gram has another shape or type than its configuration says"),
        (lambda ledger: {"state_dtype": "float32"}, "gram has another shape or type"),
        # One memory with the rows of both, and one id for two rows.
        (lambda ledger: {"ledger": [{**row, "memory": 0} for row in ledger]}, "its ledger has other rows"),
        (lambda ledger: {"ledger": [*ledger[:-1], {**ledger[-1], "id": 1}]}, "its ledger has other rows"),
    ],
)
def test_files_that_contradict_each_other_are_refused(tmp_path, change, reason):
    memory = mixed()
    memory.save_pretrained(tmp_path / "memory")
    lines = json.loads((tmp_path / "memory" / "config.json").read_text(encoding="utf-8"))["ledger"]
    forge(tmp_path / "memory", **change(lines))
    with pytest.raises(ek.EngramError, match=rf"^directory: expected a saved memory, got .*{reason}"):
        EpisodicMemory.from_pretrained(tmp_path / "memory")


def test_a_write_that_fails_on_its_way_leaves_the_old_files(tmp_path, monkeypatch):
    memory, folder = mixed(), tmp_path / "memory"
    memory.save_pretrained(folder)
    ids = memory.ids
    memory.forget(ids=[1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engram_kernels._io.os.replace", full)
    with pytest.raises(
        ek.EngramError, match=r"^directory: expected one that can be written.* \(No space left on device\)$"
    ):
        memory.save_pretrained(folder, replace=True)
    assert EpisodicMemory.from_pretrained(folder).ids == ids
    monkeypatch.undo()
    memory.save_pretrained(folder, replace=True)  # Nor does this memory take its own attempt for another's.
    assert EpisodicMemory.from_pretrained(folder).ids == memory.ids


# -- what is forgotten leaves nothing ------------------------------------------------------------------------


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
    accumulate, calls = episodic.memory_accumulate_, []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return accumulate(*arguments, **options)

    monkeypatch.setattr(episodic, "memory_accumulate_", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        memory.forget(ids=range(9))
    assert memory.ids == [9] and len(memory) == 1
    assert apart(memory.gram, never.gram) < 1e-12 and apart(memory.cross, never.cross) < 1e-12


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


def test_large_latents_are_read_by_content():
    values = 1e80 * latents(4, C)
    memory = EpisodicMemory(K, C, ridge=1e158)
    memory.write(values)
    assert memory.read(values).norm() > 0.5 * values.norm()


def test_a_folder_names_no_file_outside(tmp_path):
    memory = EpisodicMemory(K, C)
    memory.save_pretrained(tmp_path / "memory")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    forge(tmp_path / "memory", weights="../victim")
    with pytest.raises(ek.EngramError, match=r"^directory: expected a saved memory, .*its tensors are in"):
        memory.save_pretrained(tmp_path / "memory", replace=True)
    assert victim.read_text() == "mine"
