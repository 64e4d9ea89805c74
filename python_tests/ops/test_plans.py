"""Plans do what the one-shot functions do, again and again, and do nothing else."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engram_kernels as ek
from engram_kernels._linalg import compute_dtype

SHAPES = [(33, 65), (0, 5), (1,), (129, 30), (7,), (3, 4, 5)]
MIXES = [[torch.float32], [torch.bfloat16, torch.float32], [torch.float64]]


class Operators(TorchDispatchMode):
    """The names of all operators that torch runs inside the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def model(dtypes, device):
    """(pre, ft, logits, masks): lists over SHAPES with dtypes in turn."""
    pre = [torch.randn(shape).to(device, dtypes[i % len(dtypes)]) for i, shape in enumerate(SHAPES)]
    ft = [x + torch.randn_like(x) for x in pre]
    logits = [torch.randn(x.shape, dtype=compute_dtype(x), device=device) for x in pre]
    return pre, ft, logits, [ek.pack_mask(torch.rand(x.shape, device=device) < 0.3) for x in pre]


def copies(tensors):
    return [x.clone() for x in tensors]


def equal(some, others):
    return all(torch.equal(x, y) for x, y in zip(some, others, strict=True))


@pytest.mark.parametrize("with_out", [True, False], ids=["theta", "logits alone"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "base"])
@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_a_graft_plan_steps_as_the_function_does(device, dtypes, masked, with_out):
    pre, ft, logits, masks = model(dtypes, device)
    base, expected = masks if masked else None, copies(logits)
    out = [torch.zeros_like(x) for x in pre] if with_out else None
    theta = [torch.zeros_like(x) for x in pre] if with_out else None
    plan = ek.GraftPlan(logits, pre, ft, base, 0.75, out)
    if with_out:
        assert plan.blend_() is plan.out
        ek._foreach_graft_blend_(theta, pre, ft, expected, base, 0.75)
        assert equal(out, theta)
    grads = [torch.randn_like(x) for x in pre]
    # The same gradients, other values in them, other tensors, strided ones.
    rounds = [lambda: grads, lambda: [g.neg_() for g in grads], lambda: copies(grads)]
    rounds.append(lambda: [g.repeat_interleave(2, -1)[..., ::2] for g in grads])
    for number, renewed in enumerate(rounds):
        given = renewed()
        assert plan.step_(given, lr=0.5 + number, l1=0.01) is plan.logits
        ek.graft_mask_step_(expected, given, pre, ft, base, 0.75, 0.5 + number, 0.01, theta)
        assert equal(logits, expected)
        if with_out:
            assert equal(out, theta)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_a_sparse_plan_swaps_and_swaps_back(device, dtypes, index):
    weights, news, _, _ = model(dtypes, device)
    places = [torch.randperm(x.numel())[: x.numel() // 3].to(device, index) for x in weights]
    values = [new.reshape(-1)[: len(at)].clone() for new, at in zip(news, places, strict=True)]
    start, expected = copies(weights), copies(weights)
    overwritten = ek.sparse_apply_(expected, places, values)
    plan = ek.SparsePlan(weights, places, values)
    for _ in range(2):
        assert plan.swap_() is plan.values
        assert equal(weights, expected) and equal(plan.values, overwritten)
        plan.swap_()
        assert equal(weights, start) and equal(plan.values, values)


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_a_top_k_plan_follows_its_scores(device, dtypes):
    scores, reference, _, _ = model(dtypes, device)
    plain, difference = ek.TopKPlan(scores, 100), ek.TopKPlan(scores, 100, reference)
    for _ in range(3):
        assert equal(plain.select_(), ek.top_k_mask(scores, 100))
        assert equal(difference.select_(), ek.graft_top_k(scores, reference, 100))
        for score in scores:
            score.copy_(torch.randn_like(score))
    scores[4][3] = float("nan")
    with pytest.raises(ValueError, match="scores: expected finite values, got 1 NaN"):
        plain.select_()


@pytest.mark.skipif(ek.backends()["cpu"] is not None, reason="the CPU kernels are not built")
def test_a_step_of_a_plan_runs_no_operator_of_torch():
    """No copy, no allocation, nothing that waits; only the kernel."""
    pre, ft, logits, masks = model([torch.float32], "cpu")
    grads, out = copies(pre), copies(pre)
    plan = ek.GraftPlan(logits, pre, ft, masks, 0.75, out)
    places = [torch.arange(0, x.numel(), 2) for x in pre]
    sparse = ek.SparsePlan(copies(pre), places, [x.reshape(-1)[::2] for x in ft])
    with Operators() as ran:
        plan.step_(grads)  # their addresses are new
        plan.step_(grads)
        plan.blend_()
        sparse.swap_()
    assert ran.names == []


def test_a_plan_keeps_no_gradient_alive():
    pre, ft, logits, _ = model([torch.float32], "cpu")
    plan, grads = ek.GraftPlan(logits, pre, ft), copies(pre)
    plan.step_(grads)
    gone = [weakref.ref(gradient) for gradient in grads]
    del grads
    assert all(gradient() is None for gradient in gone)
    plan.step_(copies(pre))


def test_a_plan_bumps_the_versions_of_what_it_writes():
    pre, ft, logits, _ = model([torch.float32], "cpu")
    out = [torch.nn.Parameter(torch.zeros_like(x)) for x in pre]
    plan = ek.GraftPlan(logits, pre, ft, out=out)
    before = [x._version for x in logits + out]
    plan.step_(pre)
    assert all(x._version > was for x, was in zip(logits + out, before, strict=True))
    sparse = ek.SparsePlan([out[0]], [torch.tensor([3])], [torch.ones(1)])
    before = out[0]._version
    sparse.swap_()
    assert out[0]._version > before and out[0].view(-1)[3] == 1


def test_a_plan_refuses_what_its_functions_refuse():
    pre, ft, logits, _ = model([torch.float32], "cpu")
    with pytest.raises(ValueError, match="out: expected contiguous tensors"):
        ek.GraftPlan([logits[0]], [pre[0]], [ft[0]], out=[torch.zeros(65, 33).T])
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        ek.GraftPlan(logits, pre, ft, out=pre)
    with pytest.raises(ValueError, match="bias: expected a finite number"):
        ek.GraftPlan(logits, pre, ft, bias=float("nan"))
    plan, kept = ek.GraftPlan(logits, pre, ft), copies(logits)
    with pytest.raises(ValueError, match="out: expected tensors to write θ to, got a plan without"):
        plan.blend_()
    for grads, message in (
        (pre[:2], "6 tensors, got 2"),
        ([x.double() for x in pre], "float32, got float64"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"grads: expected .*{message}"):
            plan.step_(grads)
    with pytest.raises(ValueError, match="logits: expected memory of its own"):
        plan.step_(logits)
    with pytest.raises(ValueError, match="lr: expected a finite number"):
        plan.step_(pre, lr=float("inf"))
    plan.step_(pre, lr=0.0)
    with pytest.raises(ValueError, match="lr: expected a finite number"):
        plan.step_(pre, lr=float("inf"))
    assert equal(logits, kept)
    for at, message in (([5], "0 to 4 in tensor 0, got 5"), ([2, 2], "once in tensor 0, got 2 twice")):
        with pytest.raises(ValueError, match=f"indices: expected .*{message}"):
            ek.SparsePlan([torch.zeros(5)], [torch.tensor(at)], [torch.ones(len(at))])


def test_plans_of_nothing():
    assert ek.GraftPlan([], [], []).step_([]) == [] and ek.SparsePlan([], [], []).swap_() == []
    assert ek.TopKPlan([], 0).select_() == []


def test_plans_say_what_they_hold():
    pre, ft, logits, _ = model([torch.float32], "cpu")
    assert repr(ek.GraftPlan(logits, pre, ft)) == "GraftPlan(6,083 entries in 6 tensors)"
