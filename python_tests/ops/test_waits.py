"""Checks that do not wait: none of an operator's steps reads the device, and what was wrong is said later."""

import math
import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import engram_kernels as ek

# What brings a value from the device to the host.
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}
# What torch looks at in LAPACK's results on CPUs; on GPUs, in a debug build alone.
LAPACK = {"aten::cholesky_solve"}


def by_lapack(event) -> bool:
    return event.name in LAPACK or (event.cpu_parent is not None and by_lapack(event.cpu_parent))


@pytest.fixture
def waits(monkeypatch):
    """Count what waits inside a call: by torch's dispatcher, and `tolist`, which on CPUs goes around it."""
    lists = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor) or tolist(tensor))

    def count(call):
        lists.clear()
        with profile(activities=[ProfilerActivity.CPU]) as ran:
            call()
        found = [event for event in ran.events() if event.name in WAITS and not by_lapack(event)]
        return len(found) + len(lists)

    return count


def calls() -> dict:
    """Every public operator but those whose results have sizes that depend on data, and sequences, whose
    lengths are the host's; as the reference serves them, on GPUs too. On the default device."""
    weight, keys, values = torch.randn(2, 5, 7), torch.randn(2, 1, 7), torch.randn(2, 1, 5)
    left, right, inverse = values.mT, keys, torch.eye(7, dtype=torch.float64)
    pre, ft, logits = ([torch.randn(5, 4), torch.randn(3)] for _ in range(3))
    masks, out = [ek.pack_mask(x > 0) for x in pre], [torch.zeros_like(x) for x in pre]
    at = [torch.tensor([3, 7]), torch.tensor([1])]
    taken = [torch.ones(2), torch.ones(1)]
    w, z = torch.randn(5, 3) / 3, torch.randn(5, 4)
    A, B = w.double().mT @ w.double() + torch.eye(3), w.double().mT @ z.double()
    P, M = torch.eye(3), torch.randn(3, 4)
    plan = ek.GraftPlan([x.clone() for x in logits], pre, ft, masks, 0.5, [torch.zeros_like(x) for x in pre])
    return {
        "apply_low_rank_": lambda: ek.apply_low_rank_(weight, left, right),
        **{
            f"low_rank_factors {mode}": lambda mode=mode: ek.low_rank_factors(
                weight, keys, values, inverse_covariance=inverse, mode=mode
            )
            for mode in ("independent", "sequential", "joint")
        },
        "low_rank_update": lambda: ek.low_rank_update(weight, keys, values, inverse_covariance=inverse),
        "second_moment_": lambda: ek.second_moment_(torch.zeros(7, 7), weight),
        "graft_blend": lambda: ek.graft_blend(pre[0], ft[0], logits[0], masks[0]),
        "graft_blend_packed": lambda: ek.graft_blend_packed(pre[0], ft[0], masks[0]),
        "_foreach_graft_blend_": lambda: ek._foreach_graft_blend_(out, pre, ft, logits, masks),
        "graft_mask_step_": lambda: ek.graft_mask_step_(logits, pre, pre, ft, masks, out=out),
        "pack_mask": lambda: ek.unpack_mask(ek.pack_mask(pre[0] > 0), (5, 4)),
        "graft_top_k": lambda: ek.graft_top_k(pre, ft, 4),
        "top_k_mask": lambda: ek.top_k_mask(pre, 0),
        "sparse_apply_": lambda: ek.sparse_apply_(out, at, taken),
        "memory_accumulate_": lambda: ek.memory_accumulate_(A, B, w, z),
        "memory_solve": lambda: ek.memory_solve(A, B, ridge=0.1),
        "memory_stream": lambda: ek.memory_stream(P, M, w, z),
        "pseudo_inverse": lambda: ek.pseudo_inverse(z),
        "a plan's step": lambda: plan.step_(pre),
    }


CALLS = list(calls())


@pytest.mark.parametrize("name", CALLS)
def test_no_call_waits(waits, name):
    call = calls()[name]
    with ek.use_backend("torch"), ek.checks("async"):
        assert waits(call) == 0
        ek.synchronize_checks()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CALLS)
def test_no_call_waits_on_a_gpu(name):
    with torch.device("cuda"):
        call = calls()[name]
        call()  # what is compiled or allocated at first
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    ek.synchronize_checks()


def test_the_count_sees_what_waits(waits):
    """As much as the same calls did when they waited."""
    with ek.use_backend("torch"), ek.checks("sync"):
        assert waits(calls()["apply_low_rank_"]) == 2
        assert waits(calls()["low_rank_factors independent"]) >= 4
        assert waits(calls()["sparse_apply_"]) == 1


def test_a_forget_always_says_at_once_whether_it_forgot(waits):
    """It waits for its eigenvalues anyway."""
    w, z = torch.randn(5, 3) / 3, torch.randn(5, 4)
    A, B = w.mT @ w + torch.eye(3), w.mT @ z
    kept = A.clone()
    with ek.use_backend("torch"), ek.checks("async"):
        with pytest.raises(ek.EngramError, match="w: expected rows that the memory holds"):
            ek.memory_forget_(A, B, 9 * w, z)
        assert torch.equal(A, kept)


def bad_calls() -> dict:
    """In-place calls with data that cannot be used: (call, tensors that must stay as they are)."""
    weight, factor, nan = torch.randn(4, 6), torch.ones(4, 1), torch.full((1, 6), math.nan)
    rows, latents = torch.randn(5, 3), torch.full((5, 4), math.inf)
    A, B, moment = torch.eye(3), torch.randn(3, 4), torch.eye(6)
    weights = [torch.randn(9), torch.randn(2, 2)]
    outside = [torch.tensor([1, 8]), torch.tensor([4])]
    ones, mask = [torch.ones(2), torch.ones(1)], torch.tensor([True])
    return {
        "apply_low_rank_": (lambda: ek.apply_low_rank_(weight, factor, nan), [weight]),
        "memory_accumulate_": (lambda: ek.memory_accumulate_(A, B, rows, latents), [A, B]),
        "second_moment_": (lambda: ek.second_moment_(moment, nan, mask), [moment]),
        "sparse_apply_": (lambda: ek.sparse_apply_(weights, outside, ones), weights),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_what_cannot_be_used_changes_nothing_and_is_said_later(device, name):
    call, kept = bad_calls()[name]
    before = [tensor.clone() for tensor in kept]
    with ek.checks("async"):
        call()
        assert all(torch.equal(tensor, was) for tensor, was in zip(kept, before, strict=True))
        with pytest.raises(ek.EngramError, match=f"^{name}: expected .* got "):
            ek.synchronize_checks()
        ek.synchronize_checks()  # said once


def test_results_without_an_answer_are_said_later():
    weight, keys, values = torch.randn(4, 6), torch.zeros(1, 6), torch.randn(1, 4)
    with ek.checks("async"):
        ek.low_rank_factors(weight, keys, values, inverse_covariance=torch.eye(6))
        ek.memory_solve(torch.zeros(3, 3), torch.ones(3, 2))
        ek.top_k_mask([torch.tensor([1.0, math.nan])], 1)
        with pytest.raises(ek.EngramError, match=r"^residual_gram: .*\(and 3 more\); ek.checks\('sync'\)"):
            ek.synchronize_checks()


def test_a_call_that_waits_anyway_raises_first():
    weight, bad = torch.zeros(4, 6), torch.full((4, 1), math.nan)
    with ek.checks("async"):
        ek.apply_low_rank_(weight, bad, torch.ones(1, 6))
    with pytest.raises(ek.EngramError, match=r"^apply_low_rank_"):
        ek.apply_low_rank_(weight, torch.ones(4, 1), torch.ones(1, 6))
    assert not weight.any()


def test_modes():
    bad = torch.full((4, 1), math.nan)
    with ek.checks("off"):
        assert ek.apply_low_rank_(torch.zeros(4, 6), bad, torch.ones(1, 6)).isnan().all()
        with ek.checks("sync"), pytest.raises(ValueError, match="left: expected finite"):
            ek.apply_low_rank_(torch.zeros(4, 6), bad, torch.ones(1, 6))
        ek.apply_low_rank_(torch.zeros(4, 6), bad, torch.ones(1, 6))
    with pytest.raises(ValueError, match="left: expected finite"):  # the default of a CPU
        ek.apply_low_rank_(torch.zeros(4, 6), bad, torch.ones(1, 6))
    with pytest.raises(ValueError, match="mode: expected one of sync, async, off, or None, got 'later'"):
        ek.checks("later")
    chosen = ek.checks("off")
    assert repr(chosen) == "checks('off')"
    ek.checks(None)
    ek.synchronize_checks()


def test_many_flags_are_read_at_last(monkeypatch):
    monkeypatch.setattr(ek.ops.waiting, "_MOST", 3)
    weight, bad = torch.zeros(4, 6), torch.full((4, 1), math.nan)
    with ek.checks("async"):
        for _ in range(2):
            ek.apply_low_rank_(weight, bad, torch.ones(1, 6))
        with pytest.raises(ek.EngramError, match=r"^apply_low_rank_"):
            ek.apply_low_rank_(weight, bad, torch.ones(1, 6))


def test_what_keeps_books_of_its_calls_waits_for_them():
    """A memory's ledger, an edit's record: they must not say that something was written that was not."""
    memory = ek.memory.EpisodicMemory(slots=4, latent=3)
    operator = ek.Preconditioner.from_identity(6)
    keys = torch.ones(2, 6)
    with ek.checks("async"):
        with pytest.raises(ValueError, match="finite"):
            memory.write(torch.full((1, 3), math.nan), ids=["one"])
        with pytest.raises(ek.EngramError, match="keys: expected linearly independent"):
            operator.factors(torch.zeros(5, 6), keys, residual=torch.ones(2, 5), ridge=0.0)
        with pytest.raises(ValueError, match="finite"):
            ek.grafting.trim(torch.tensor([1.0, math.nan]), 0.5)
        ek.synchronize_checks()


def test_a_block_is_of_its_thread():
    modes = []
    with ek.checks("off"):
        thread = threading.Thread(target=lambda: modes.append(ek.ops.waiting.mode_for("cpu")))
        thread.start()
        thread.join()
        assert ek.ops.waiting.mode_for("cpu") == "off"
    assert modes == ["sync"] and ek.ops.waiting.mode_for("cpu") == "sync"
