"""`EpisodicMemory` against least squares in fp64 NumPy: writing, reading, overwriting, merging."""

import numpy as np
import pytest
import torch
from memory_helpers import C, K, apart, assert_unchanged, filled, frozen, largest, latents, least_squares

import engram_kernels as ek
from engram_kernels.memory import EpisodicMemory
from engram_kernels.memory.addressing import ADDRESSINGS

pytestmark = pytest.mark.usefixtures("one_thread")


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
    readout = memory.read(keys, addressing="key")
    assert readout.dtype == dtype and readout.shape == (30, C)


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


def test_reading_by_key_answers_a_key_with_its_value():
    memory, values, keys = EpisodicMemory(K, C, ridge=1e-9), latents(10, C), latents(10, C, seed=1)
    memory.write(values, keys=keys)
    assert apart(memory.read(keys, addressing="key"), values) < 1e-6


def read_by(held, queries, **options):
    """Which addressing gives what is read without being told."""
    found = held.read(queries, **options)
    same = {way: apart(found, held.read(queries, addressing=way, **options)) < 1e-12 for way in ADDRESSINGS}
    assert sum(same.values()) == 1
    return next(way for way, equal in same.items() if equal)


def test_rows_with_keys_of_their_own_are_read_by_key_without_being_told():
    values, keys, queries = latents(10, C), latents(10, C, seed=1), latents(5, C, seed=2)
    memory = EpisodicMemory(K, C)
    memory.write(values[:4], ids=range(4))
    memory.write(values[4:6], keys=values[4:6].float(), ids=[4, 5])  # To fp32 only, so another key.
    memory.forget(ids=[4, 5])
    memory.write(values[4:6], keys=values[4:6].clone(), ids=[4, 5])  # The value again, to the bit.
    assert read_by(memory, queries) == "content" and memory.keyed.tolist() == [0]
    memory.write(values[6:], keys=keys[6:], ids=range(6, 10))
    assert read_by(memory, queries) == "key" and memory.keyed.tolist() == [4]
    memory.forget(ids=[6, 7, 8])
    assert read_by(memory, queries) == "key"
    memory.overwrite([9], keys[9:])
    assert read_by(memory, queries) == "content"
    memory.overwrite([0], keys[:1])
    assert read_by(memory, queries) == "key"
    memory.reset()
    memory.write(values)
    assert read_by(memory, queries) == "content"


def test_each_of_many_memories_is_read_as_its_rows_ask_for():
    values, keys, queries = latents(2, 4, C), latents(2, 4, C, seed=1), latents(2, 3, C, seed=2)
    memory = EpisodicMemory(K, C, batch=2)
    memory.write(values[0], memory=0)
    memory.write(values[1], keys=keys[1], memory=1)
    assert [read_by(memory, queries[i], memory=i) for i in range(2)] == ["content", "key"]
    expected = [memory.read(queries[i], memory=i) for i in range(2)]
    assert apart(memory.read(queries), torch.stack(expected)) < 1e-12


def test_keys_of_rows_without_ids_are_counted_too():
    values, keys = latents(4, C), latents(4, C, seed=1)
    memory, other = EpisodicMemory(K, C), EpisodicMemory(K, C)
    memory.write(values[:2])
    other.write(values[2:], keys=keys[2:])
    memory.merge(other)
    assert memory.keyed.tolist() == [2] and read_by(memory, keys) == "key"
    other.load_state_dict(memory.state_dict())
    assert read_by(other, keys) == "key"
    memory.forget(values[2:], keys=keys[2:])
    assert memory.keyed.tolist() == [0] and read_by(memory, keys) == "content"


def test_readouts_are_differentiable_in_the_queries():
    memory = EpisodicMemory(8, 6)
    memory.write(latents(4, 6))
    with torch.inference_mode():
        memory.read(latents(2, 6))  # What is kept must be of use where gradients are wanted.
    for addressing in ("content", "key"):
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
    for addressing in ("content", "key"):
        assert torch.equal(memory.read(latents(3, C), addressing=addressing), torch.zeros(3, C).double())
    assert memory.leverage(latents(2, C)).isfinite().all() and len(memory) == 0 and memory


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
        (memory.ledger[2].value, written[0][2:3]),
        (memory.ledger[2].key, written[1][2:3]),
        (memory.ledger[4].value, written[2][:1]),
        (memory.ledger[0].value, written[2][1:2]),
    ):
        assert torch.equal(latent, expected)
    for _, entry in memory.ledger.items():
        for latent in (entry.key, entry.value):
            assert latent.untyped_storage().nbytes() == 8 * C and not latent.requires_grad


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
    with pytest.raises(ValueError, match=r"^addressing: expected 'key' or 'content', got 'x'"):
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
    assert torch.equal(memory.ledger["b"].value[0], fresh[1])
    assert torch.equal(memory.ledger["b"].key[0], values[1])
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
    assert all(torch.equal(memory.ledger[name].value[0], expected[name]) for name in range(6))


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


def test_leverages():
    memory, values = filled(ridge=0.5), latents(6, C)
    weights = (values @ memory.m0_pinv).numpy()
    precision = memory.gram[0].numpy() + 0.5 * np.eye(K)
    expected = np.diag(weights @ np.linalg.inv(precision) @ weights.T)
    assert apart(memory.leverage(values), expected) < 1e-12
    assert 0 < expected.min() and expected.max() < 1
    assert apart(memory.leverage(latents(6, C, seed=2), keys=values), expected) < 1e-12


def test_reset():
    memory = filled()
    assert repr(memory) == (
        "EpisodicMemory(slots=48, latent=64, batch=1, ridge=0.01, state_dtype=torch.float64, rows=[6])"
    )
    memory.matrix()
    memory.reset()
    assert len(memory) == 0 and memory.ids == [] and not memory.read(latents(2, C)).any()


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
    by_bounds = ragged.read(queries, cu_seqlens=bounds, addressing="key")
    expected = [one.read(q, addressing="key") for one, q in zip(alone, queries.split(sizes), strict=True)]
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


def test_large_latents_are_read_by_content():
    values = 1e80 * latents(4, C)
    memory = EpisodicMemory(K, C, ridge=1e158)
    memory.write(values)
    assert memory.read(values).norm() > 0.5 * values.norm()


def test_a_memory_made_in_inference_mode_is_one_for_later_too(tmp_path):
    with torch.inference_mode():
        made = EpisodicMemory(K, C, labels=["a"])
        made.write(latents(3, C), ids=range(3))
        made.save_pretrained(tmp_path / "memory")
        read = EpisodicMemory.from_pretrained(tmp_path / "memory")
        grown = EpisodicMemory.from_pretrained(tmp_path / "memory").grow(K + 1)
        for memory in (made, read, grown):
            memory.add_memory("b")
    for memory in (made, read, grown):
        memory.write(latents(2, C, seed=1), ids=[3, 4], memory="b")
        memory.forget(ids=[0, 3])
        queries = latents(1, C).requires_grad_()
        memory.read(queries, memory="a").sum().backward()
        assert queries.grad.any() and memory.ids == [1, 2, 4]
