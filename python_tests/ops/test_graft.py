"""Grafting's operators on every backend that exists here, against fp64 or plain loops.

The rule of every comparison of numbers: an error of at most twice that of the eager formula in the same type,
both against fp64. Masks, choices and sparse writes are compared bit for bit.
"""

import numpy as np
import pytest
import torch
from accuracy import error, wide, within

import engram_kernels as ek
from engram_kernels._linalg import compute_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Around a vector, a byte of bits, a chunk of the C++ kernels, and of several.
SIZES = [0, 1, 7, 8, 9, 33, 1000, 8191, 8193, 50001]
BIAS = 0.75


def weights(size, dtype, seed=0):
    """(pre, ft, logits, base mask as bools), logits from far below 0 to far above."""
    generator = torch.Generator().manual_seed(seed + size)
    draw = lambda: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    pre = draw().to(dtype)
    ft = (pre.double() + 0.1 * draw()).to(dtype)
    logits = (6 * draw()).to(compute_dtype(pre))
    return pre, ft, logits, torch.rand(size, generator=generator) < 0.3


def gates(logits, base, bias):
    """γ in extended precision: base + (1 − 2 base) σ(S − bias)."""
    x = wide(logits) - bias
    return 1 / (1 + np.exp(np.where(base, x, -x)))


def eager_gates(logits, base, bias):
    """The same in the logits' type, as upstream writes it."""
    flip = torch.sigmoid(logits - bias)
    return base + (1 - 2 * base.to(logits.dtype)) * flip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "base"])
def test_blend_and_its_gradients(device, poisoned, masked, size):
    for dtype in DTYPES:
        pre, ft, logits, base = weights(size, dtype)
        on = base & masked
        gate, eager_gate = gates(logits, on, BIAS), eager_gates(logits, on, BIAS).to(dtype)
        change = wide(ft) - wide(pre)

        leaves = [x.clone().to(device).requires_grad_() for x in (pre, ft, logits)]
        packed = ek.pack_mask(base.to(device)) if masked else None
        got = ek.graft_blend(*leaves, base=packed, bias=BIAS)
        within(got, wide(pre) + gate * change, pre + eager_gate * (ft - pre))

        gradient = torch.randn(size, dtype=torch.float64).to(dtype)
        got.backward(gradient.to(device))
        within(leaves[0].grad, wide(gradient) * (1 - gate), gradient * (1 - eager_gate))
        within(leaves[1].grad, wide(gradient) * gate, gradient * eager_gate)
        sign = np.where(on, -1, 1)
        eager = (gradient * (ft - pre) * (eager_gate * (1 - eager_gate))).to(logits.dtype)
        eager = torch.where(on, -eager, eager)
        within(leaves[2].grad, sign * wide(gradient) * change * gate * (1 - gate), eager)


@pytest.mark.parametrize("dtype", DTYPES)
def test_closed_gates_are_exact(device, dtype):
    """What `pre + γ (ft − pre)` in fp32 is not: small weights beside large ones."""
    pre = torch.tensor([1.0, 1.0, -3e4, 1e-6, 0.0, 5.0], dtype=dtype, device=device)
    ft = torch.tensor([1e-6, 1.0, 2e-3, -3e4, 7.0, 5.0], dtype=dtype, device=device)
    for level, expected in ((1e4, ft), (-1e4, pre), (float("inf"), ft), (-float("inf"), pre)):
        logits = torch.full((6,), level, dtype=compute_dtype(pre), device=device)
        assert torch.equal(ek.graft_blend(pre, ft, logits), expected)
        base = ek.pack_mask(torch.ones(6, dtype=torch.bool, device=device))
        assert torch.equal(ek.graft_blend(pre, ft, -logits, base), expected)


def test_nan_propagates(device):
    pre, ft = torch.ones(3, device=device), torch.full((3,), 2.0, device=device)
    logits = torch.tensor([0.0, float("nan"), 0.0], device=device)
    assert ek.graft_blend(pre, ft, logits).isnan().tolist() == [False, True, False]
    pre[0] = float("nan")
    assert ek.graft_blend(pre, ft, logits).isnan().tolist() == [True, True, False]


def test_strided_arguments_are_honoured(device):
    pre, ft, logits = (torch.randn(6, 10, device=device)[:, ::2].T for _ in range(3))
    base = torch.rand(5, 6, device=device) < 0.5
    got = ek.graft_blend(pre, ft, logits, ek.pack_mask(base), 0.5)
    dense = ek.graft_blend(*(x.contiguous() for x in (pre, ft, logits)), ek.pack_mask(base), 0.5)
    assert got.is_contiguous() and torch.equal(got, dense)
    out = torch.zeros(6, 10, device=device)
    ek._foreach_graft_blend_([out[:, ::2].T], [pre], [ft], [logits], [ek.pack_mask(base)], 0.5)
    assert torch.equal(out[:, ::2].T, dense) and not out[:, 1::2].any()


@pytest.mark.parametrize("start", [0, 2040, 4090, 6140, 8184])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_remainder_of_a_block(device, dtype, start):
    """What becomes of the first entries does not depend on how many there are, but for torch's last bit."""
    pre, ft, logits, base = (x.to(device) for x in weights(start + 10, dtype))
    gradient = torch.randn(start + 10).to(device, dtype)
    results = []
    for size in (start + 10, *range(start + 1, start + 10)):
        p, f, s, g, on = (x[:size].clone() for x in (pre, ft, logits, gradient, base))
        mask, out = ek.pack_mask(on), torch.empty_like(p)
        s.requires_grad_()
        blended = ek.graft_blend(p, f, s, mask, BIAS)
        (slope,) = torch.autograd.grad(blended, s, g)
        stepped = s.detach().clone()
        ek.graft_mask_step_([stepped], [g], [p], [f], [mask], BIAS, 0.5, 0.01, [out])
        chosen, bits = ek.graft_blend_packed(p, f, mask), ek.unpack_mask(mask, (size,))
        results.append([blended.detach(), slope, stepped, out, chosen, bits])
        assert torch.equal(bits, on)
        (top,) = ek.graft_top_k([p], [f], size // 2)
        (expected,) = by_sorting([(f.float() - p.float()).abs().cpu()], size // 2)
        assert torch.equal(ek.unpack_mask(top, (size,)).cpu(), expected)
    for shorter in results[1:]:
        for got, whole in zip(shorter, results[0], strict=True):
            torch.testing.assert_close(got, whole[: len(got)])


@pytest.mark.parametrize("size", [33, 8195])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_misaligned_arguments_change_nothing(device, dtype, size):
    def displaced(tensor):
        return torch.cat([tensor[:1], tensor])[1:]

    pre, ft, logits, base = (x.to(device) for x in weights(size, dtype))
    gradient, masks = torch.randn(size).to(device, dtype), [ek.pack_mask(base)]
    aligned = [pre, ft, logits, gradient]
    results = []
    for arguments in (aligned, [displaced(x) for x in aligned]):
        pre, ft, logits, gradient = arguments
        logits = logits.detach().requires_grad_()
        blended = ek.graft_blend(pre, ft, logits, masks[0], BIAS)
        blended.backward(gradient)
        stepped, out = logits.detach().clone(), torch.empty_like(pre)
        ek.graft_mask_step_([stepped], [gradient], [pre], [ft], masks, BIAS, 0.5, 0.01, [out])
        chosen = ek.graft_blend_packed(pre, ft, masks[0])
        top = ek.graft_top_k([pre], [ft], size // 3)[0]
        results.append([blended.detach(), logits.grad, stepped, out, chosen, top])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_gradcheck(device):
    pre, ft, logits = (torch.randn(11, dtype=torch.float64, device=device).requires_grad_() for _ in range(3))
    base = ek.pack_mask(torch.rand(11, device=device) < 0.5)
    assert torch.autograd.gradcheck(lambda *x: ek.graft_blend(*x, base, 0.3), (pre, ft, logits))
    assert torch.autograd.gradcheck(lambda *x: ek.graft_blend_packed(*x, base), (pre, ft))


# -- whole models --------------------------------------------------------------------------------------------

SHAPES = [(33, 65), (0, 5), (1,), (129, 130), (7,), (8192,), (3, 4, 5)]


def model(dtypes, device):
    """(pre, ft, logits, base, gradients), lists over SHAPES with dtypes in turn."""
    lists = [[], [], [], [], []]
    for i, shape in enumerate(SHAPES):
        dtype = dtypes[i % len(dtypes)]
        count = int(torch.tensor(shape).prod())
        pre, ft, logits, base = weights(count, dtype, seed=i)
        gradient = torch.randn(count, dtype=torch.float64).to(dtype)
        for collected, tensor in zip(lists, (pre, ft, logits, base, gradient), strict=True):
            collected.append(tensor.reshape(shape).to(device))
    return lists


MIXES = [
    [torch.float32],
    [torch.bfloat16, torch.float32],
    [torch.float16, torch.bfloat16],
    [torch.float64],
]


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "base"])
@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_a_model_at_once_is_its_tensors_one_by_one(device, poisoned, dtypes, masked):
    pre, ft, logits, base, _ = model(dtypes, device)
    masks = [ek.pack_mask(mask) for mask in base] if masked else None
    out = [torch.full_like(weight, 7) for weight in pre]
    assert ek._foreach_graft_blend_(out, pre, ft, logits, masks, BIAS) == out
    for i, blended in enumerate(out):
        one = ek.graft_blend(pre[i], ft[i], logits[i], masks[i] if masked else None, BIAS)
        assert torch.equal(blended, one)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "base"])
@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_mask_step(device, dtypes, masked):
    lr, l1 = 0.5, 0.01
    pre, ft, logits, base, grads = model(dtypes, device)
    masks = [ek.pack_mask(mask) for mask in base] if masked else None
    before = [x.clone() for x in logits]
    without = [x.clone() for x in logits]
    out = [torch.full_like(weight, 7) for weight in pre]
    ek.graft_mask_step_(logits, grads, pre, ft, masks, BIAS, lr, l1, out)
    ek.graft_mask_step_(without, grads, pre, ft, masks, BIAS, lr, l1)
    for i in range(len(pre)):
        p, f, g, old = (x[i].cpu() for x in (pre, ft, grads, before))
        on = base[i].cpu() & masked
        gate = gates(old, on, BIAS)
        slope = np.where(on, -1, 1) * gate * (1 - gate)
        truth = wide(old) - lr * slope * (wide(g) * (wide(f) - wide(p)) + l1)
        eager = eager_gates(old, on, BIAS)
        eager = torch.where(on, -1.0, 1.0) * eager * (1 - eager) * ((g * (f - p)).to(old.dtype) + l1)
        eager = old - lr * eager
        within(logits[i], truth, eager)
        assert torch.equal(without[i], logits[i])
        one = ek.graft_blend(pre[i], ft[i], logits[i], masks[i] if masked else None, BIAS)
        assert torch.equal(out[i], one)


def test_mask_step_against_autograd_of_a_model():
    """The step's gradient is autograd's through `functional_call`, in fp64."""
    net = torch.nn.Sequential(torch.nn.Linear(9, 13), torch.nn.Tanh(), torch.nn.Linear(13, 4)).double()
    names, pre = zip(*((name, p.detach().clone()) for name, p in net.named_parameters()), strict=True)
    ft = [p + 0.3 * torch.randn_like(p) for p in pre]
    logits = [torch.randn_like(p) for p in pre]
    base = [ek.pack_mask(torch.rand_like(p) < 0.4) for p in pre]
    inputs, targets = torch.randn(17, 9).double(), torch.randint(4, (17,))
    l1 = 0.02

    leaves = [x.clone().requires_grad_() for x in logits]
    theta = [ek.graft_blend(p, f, s, b, 1.0) for p, f, s, b in zip(pre, ft, leaves, base, strict=True)]
    output = torch.func.functional_call(net, dict(zip(names, theta, strict=True)), (inputs,))
    gate_sum = 0
    for s, b in zip(leaves, base, strict=True):
        on = ek.unpack_mask(b, s.shape)
        gate_sum = gate_sum + torch.where(on, torch.sigmoid(1.0 - s), torch.sigmoid(s - 1.0)).sum()
    (torch.nn.functional.cross_entropy(output, targets) + l1 * gate_sum).backward()

    ek._foreach_graft_blend_([p.detach() for p in net.parameters()], pre, ft, logits, base, 1.0)
    torch.nn.functional.cross_entropy(net(inputs), targets).backward()
    stepped = [x.clone() for x in logits]
    ek.graft_mask_step_(stepped, [p.grad for p in net.parameters()], pre, ft, base, 1.0, lr=1.0, l1=l1)
    for old, new, leaf in zip(logits, stepped, leaves, strict=True):
        assert error(old - new, leaf.grad) < 1e-10


# -- packed masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_pack_and_unpack(device, poisoned, size):
    mask = torch.rand(size) < 0.5
    packed = ek.pack_mask(mask.to(device))
    expected = [sum(int(bit) << i for i, bit in enumerate(mask[at : at + 8])) for at in range(0, size, 8)]
    assert packed.dtype == torch.uint8 and packed.tolist() == expected
    assert torch.equal(ek.unpack_mask(packed, (size,)).cpu(), mask)
    noise = packed.clone()
    if size % 8:
        noise[-1] |= 0xFF << (size % 8) & 0xFF
    assert torch.equal(ek.unpack_mask(noise, (size, 1)).cpu(), mask.unsqueeze(1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blend_packed(device, poisoned, dtype, size):
    pre, ft, _, mask = weights(size, dtype)
    if size > 3:
        pre[2], ft[3] = float("nan"), -0.0  # copied as they are, not computed with
    got = ek.graft_blend_packed(pre.to(device), ft.to(device), ek.pack_mask(mask.to(device))).cpu()
    expected = torch.where(mask, ft, pre)
    assert got.view(torch.uint8).equal(expected.view(torch.uint8))


# -- top k ---------------------------------------------------------------------------------------------------


def by_sorting(keys, k):
    """The mask of the k largest of a list's keys by a stable sort in fp64."""
    flat = torch.cat([key.reshape(-1) for key in keys]).double()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    return [
        part.reshape(key.shape) for part, key in zip(mask.split([x.numel() for x in keys]), keys, strict=True)
    ]


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_top_k(device, poisoned, dtypes):
    pre, ft, _, _, scores = model(dtypes, device)
    total = sum(p.numel() for p in pre)
    wide = [compute_dtype(p) for p in pre]
    deltas = [(f.to(d) - p.to(d)).abs().cpu() for p, f, d in zip(pre, ft, wide, strict=True)]
    for k in (0, 1, 2, 1000, total - 1, total):
        for got, keys in ((ek.graft_top_k(pre, ft, k), deltas), (ek.top_k_mask(scores, k), scores)):
            masks = [ek.unpack_mask(mask, p.shape).cpu() for mask, p in zip(got, pre, strict=True)]
            assert sum(int(mask.sum()) for mask in masks) == k
            for mine, truth in zip(masks, by_sorting([x.cpu() for x in keys], k), strict=True):
                assert torch.equal(mine, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [0, 1, 17, 9000, 16385, 30000])
def test_top_k_takes_the_first_of_equals(device, k, dtype):
    """Ties over the borders of chunks and tensors; both zeros are equal; few distinct values."""
    generator = torch.Generator().manual_seed(k)
    scores = [
        torch.randint(-1, 2, (size,), generator=generator).to(dtype) for size in (8192, 5, 0, 12000, 9803)
    ]
    scores[0][::2] *= -1  # some zeros are negative ones
    got = ek.top_k_mask([score.to(device) for score in scores], k)
    for mask, truth in zip(got, by_sorting(scores, k), strict=True):
        assert torch.equal(ek.unpack_mask(mask, truth.shape).cpu(), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [1, 300, 3000])
def test_top_k_of_few_among_many(device, ties, dtype):
    """The last of them are some of several that are equal, spread over tensors of smaller keys."""
    generator = torch.Generator().manual_seed(ties)
    scores = [0.01 * torch.randn(size, generator=generator) for size in (20_000, 3, 0, 29_997)]
    at = torch.randperm(50_003, generator=generator)[: ties + 40]
    flat = torch.cat([*scores, torch.zeros(3)])
    flat[at] = 3.0
    flat[at[:20]] = 3.25
    flat[at[-20:]] = 2.75
    scores = [part.to(dtype) for part in flat[:50_000].split([len(score) for score in scores])]
    for k in (20, 20 + (ties + 1) // 2, 30 + ties):
        got = ek.top_k_mask([score.to(device) for score in scores], k)
        for mask, truth in zip(got, by_sorting(scores, k), strict=True):
            assert torch.equal(ek.unpack_mask(mask, truth.shape).cpu(), truth)


def test_top_k_of_many_small_tensors(device):
    """Two tensors for each block, with keys that are equal to their neighbours'."""
    scores, k = [torch.full((1 + i % 5,), float(i // 2000)) for i in range(4100)], 7001
    got = ek.top_k_mask([score.to(device) for score in scores], k)
    for mask, truth in zip(got, by_sorting(scores, k), strict=True):
        assert torch.equal(ek.unpack_mask(mask, truth.shape).cpu(), truth)


def test_top_k_without_differences(device):
    pre = [torch.randn(100, device=device), torch.randn(30, device=device)]
    masks = ek.graft_top_k(pre, pre, 103)
    assert ek.unpack_mask(masks[0], (100,)).all()
    assert ek.unpack_mask(masks[1], (30,)).nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_top_k_refuses_what_is_not_finite(device, bad):
    pre = [torch.zeros(10000, device=device), torch.zeros(10, device=device)]
    ft = [x.clone() for x in pre]
    ft[1][3] = ft[0][9999] = bad
    with pytest.raises(ValueError, match="ft: expected finite differences from pre, got 2 NaN or infinite"):
        ek.graft_top_k(pre, ft, 5)
    with pytest.raises(ValueError, match="scores: expected finite values, got 2 NaN or infinite"):
        ek.top_k_mask(ft, 5)


# -- sparse writes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_sparse_apply_is_its_own_inverse(device, poisoned, dtypes, index):
    targets, _, _, _, news = model(dtypes, device)
    targets[3] = targets[3].T  # strided
    before = [x.clone() for x in targets]
    positions = [torch.randperm(x.numel())[: x.numel() // 3] for x in targets]
    positions[3] = positions[3].sort().values
    values = [new.reshape(-1)[: len(at)] for new, at in zip(news, positions, strict=True)]
    indices = [at.to(index).to(device) for at in positions]
    old = ek.sparse_apply_(targets, indices, values)
    for target, start, at, value, was in zip(targets, before, positions, values, old, strict=True):
        expected = start.cpu().reshape(-1).clone()
        assert torch.equal(was.cpu(), expected[at])
        expected[at] = value.cpu()
        assert torch.equal(target.cpu().reshape(-1), expected)
    new = ek.sparse_apply_(targets, indices, old)
    for target, start, value, again in zip(targets, before, values, new, strict=True):
        assert torch.equal(target, start) and torch.equal(again, value)


def test_a_thousand_cycles_leave_every_bit(device):
    targets = [torch.randn(50, 31, device=device).bfloat16(), torch.randn(77, device=device).bfloat16()]
    before = [x.clone() for x in targets]
    indices = [
        torch.arange(0, 1550, 3, device=device, dtype=torch.int32),
        torch.tensor([0, 5, 76]).int().to(device),
    ]
    values = [torch.randn(len(at), device=device).bfloat16() for at in indices]
    for _ in range(1000):
        values = ek.sparse_apply_(targets, indices, values)
        values = ek.sparse_apply_(targets, indices, values)
    assert all(torch.equal(x, y) for x, y in zip(targets, before, strict=True))


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ([1, 4, 4], "indices: expected each position once in tensor 1, got 4 twice"),
        ([4, 1, 4], "indices: expected each position once in tensor 1, got 4 twice"),
        ([1, 2, 9], "indices: expected 0 to 8 in tensor 1, got 9"),
        ([-1, 2, 3], "indices: expected 0 to 8 in tensor 1, got -1"),
    ],
)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_sparse_apply_refuses_before_it_writes(device, index, at, message):
    targets = [torch.zeros(5, device=device), torch.zeros(3, 3, device=device)]
    indices = [torch.tensor([0, 1], dtype=index, device=device), torch.tensor(at, dtype=index, device=device)]
    with pytest.raises(ValueError, match=message):
        ek.sparse_apply_(targets, indices, [torch.ones(2, device=device), torch.ones(3, device=device)])
    assert not any(x.any() for x in targets)


# -- what torch asks for -------------------------------------------------------------------------------------


# aot_eager shows what torch.compile must see of an operator; inductor takes long to make code of it as well.
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_whole(compiler):
    @torch.compile(fullgraph=True, dynamic=True, backend=compiler)
    def loss(pre, ft, logits, base):
        return (ek.graft_blend(pre, ft, logits, base, 0.5) * ek.graft_blend_packed(pre, ft, base)).sum()

    for size in (30, 41):
        pre, ft, logits = (torch.randn(size, requires_grad=True) for _ in range(3))
        base = ek.pack_mask(torch.rand(size) < 0.5)
        got = torch.autograd.grad(loss(pre, ft, logits, base), (pre, ft, logits))
        plain = ek.graft_blend(pre, ft, logits, base, 0.5) * ek.graft_blend_packed(pre, ft, base)
        for mine, truth in zip(got, torch.autograd.grad(plain.sum(), (pre, ft, logits)), strict=True):
            torch.testing.assert_close(mine, truth)


def test_the_number_of_top_entries_may_be_a_symbol():
    """One graph serves every k."""

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def choose(score, chosen):
        return ek.top_k_mask([score], chosen.shape[0])[0]

    score, compiled = torch.randn(30), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for k in (5, 7, 9):
        assert torch.equal(choose(score, torch.zeros(k)), ek.top_k_mask([score], k)[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled + 1


@pytest.mark.parametrize("compiler", COMPILERS)
def test_lists_compile_whole(compiler):
    """In-place operators over lists, of which one tensor has no elements."""

    @torch.compile(fullgraph=True, backend=compiler)
    def step(logits, grads, pre, ft, base, out, at, values):
        ek.graft_mask_step_(logits, grads, pre, ft, base, 0.5, 0.1, out=out)
        ek._foreach_graft_blend_(out, pre, ft, logits, base, 0.5)
        return ek.sparse_apply_(out, at, values)

    def arguments():
        torch.manual_seed(1)
        pre, ft, logits, grads = ([torch.randn(5, 3), torch.randn(0), torch.randn(9)] for _ in range(4))
        base = [ek.pack_mask(torch.rand_like(x) < 0.5) for x in pre]
        at = [torch.tensor([3, 7]), torch.tensor([], dtype=torch.int64), torch.tensor([8])]
        return (
            logits,
            grads,
            pre,
            ft,
            base,
            [torch.zeros_like(x) for x in pre],
            at,
            [torch.ones(len(i)) for i in at],
        )

    compiled, plain = arguments(), arguments()
    got = step(*compiled)
    ek.graft_mask_step_(*plain[:5], 0.5, 0.1, out=plain[5])
    expected = ek.sparse_apply_(plain[5], plain[6], plain[7])
    for mine, truth in zip(
        [*got, *compiled[0], *compiled[5]], [*expected, *plain[0], *plain[5]], strict=True
    ):
        torch.testing.assert_close(mine, truth)


def test_autocast_changes_nothing():
    pre, ft, logits = torch.randn(3, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ek.graft_blend(pre, ft, logits)
    assert torch.equal(inside, ek.graft_blend(pre, ft, logits))


def test_written_tensors_bump_their_version():
    logits, out, pre, ft = (torch.randn(5) for _ in range(4))
    versions = logits._version, out._version
    ek.graft_mask_step_([logits], [pre], [pre], [ft], out=[out])
    assert logits._version > versions[0] and out._version > versions[1]


# -- bad input -----------------------------------------------------------------------------------------------

BAD = {
    "ft shape": (ValueError, r"ft: expected shape \[4\]", dict(ft=torch.zeros(5))),
    "ft dtype": (TypeError, "ft: expected a tensor of float32, got float16", dict(ft=torch.zeros(4).half())),
    "logits type": (TypeError, "logits: expected a tensor, got list", dict(logits=[0.0] * 4)),
    "logits shape": (ValueError, r"logits: expected shape \[4\]", dict(logits=torch.zeros(2, 2))),
    "base dtype": (TypeError, "base: expected a packed mask of uint8", dict(base=torch.zeros(1))),
    "base size": (ValueError, r"base: expected shape \[1\]", dict(base=torch.zeros(2).byte())),
    "base type": (TypeError, "base: expected a packed mask, got list", dict(base=[1])),
    "bias": (ValueError, "bias: expected a finite number", dict(bias=float("nan"))),
    "bias type": (TypeError, "bias: expected a number, got str", dict(bias="10")),
    "pre dtype": (TypeError, "pre: expected a tensor of float32", dict(pre=torch.zeros(4).int())),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_blend(case):
    kind, message, change = BAD[case]
    arguments = dict(pre=torch.zeros(4), ft=torch.ones(4), logits=torch.zeros(4), base=None, bias=0.0)
    with pytest.raises(kind, match=message):
        ek.graft_blend(**{**arguments, **change})


STEP = {
    "grads missing": (ValueError, "grads: expected 2 tensors, got 1", lambda a: a["grads"].pop()),
    "grads dtype": (
        TypeError,
        "grads: expected a tensor of float32",
        lambda a: a["grads"].__setitem__(0, torch.zeros(4).half()),
    ),
    "grads None": (
        TypeError,
        "grads: expected a tensor, got NoneType",
        lambda a: a["grads"].__setitem__(0, None),
    ),
    "ft shape": (ValueError, r"ft: expected shape \[4\]", lambda a: a["ft"].__setitem__(0, torch.zeros(5))),
    "not a list": (
        TypeError,
        "pre: expected a list of tensors, got Tensor",
        lambda a: a.update(pre=torch.zeros(4)),
    ),
    "base count": (ValueError, "base: expected 2 packed masks, got 0", lambda a: a.update(base=[])),
    "lr": (ValueError, "lr: expected a finite number, got inf", lambda a: a.update(lr=float("inf"))),
    "logits dtype": (
        TypeError,
        "logits: expected a tensor of float32, got bfloat16",
        lambda a: a["logits"].__setitem__(0, torch.zeros(4).bfloat16()),
    ),
    "tied logits": (
        ValueError,
        "logits: expected each tensor once",
        lambda a: a.update(logits=[a["logits"][0]] * 2),
    ),
    "out is pre": (ValueError, "out: expected memory of its own", lambda a: a.update(out=a["pre"])),
    "overlapping out": (
        ValueError,
        "out: expected elements that do not overlap",
        lambda a: a.update(out=[torch.zeros(1).expand(4), torch.zeros(4)]),
    ),
}


@pytest.mark.parametrize("case", STEP)
def test_bad_step_changes_nothing(case):
    kind, message, change = STEP[case]
    names = ("logits", "grads", "pre", "ft", "out")
    arguments = {name: [torch.full((4,), 0.5) for _ in range(2)] for name in names}
    change(arguments)
    kept = [x.clone() for x in arguments["logits"] + arguments["out"]]
    with pytest.raises(kind, match=message):
        ek.graft_mask_step_(**arguments)
    assert all(torch.equal(x, y) for x, y in zip(arguments["logits"] + arguments["out"], kept, strict=True))


@pytest.mark.parametrize("k", [-1, 21])
def test_bad_k(k):
    with pytest.raises(ValueError, match=f"k: expected 0 to 20, the number of entries, got {k}"):
        ek.graft_top_k([torch.zeros(20)], [torch.zeros(20)], k)
    with pytest.raises(TypeError, match="k: expected an integer, got float"):
        ek.top_k_mask([torch.zeros(20)], 3.0)


def test_other_bad_input():
    with pytest.raises(TypeError, match=r"mask: expected a bool tensor, got torch\.float32"):
        ek.pack_mask(torch.zeros(3))
    with pytest.raises(ValueError, match=r"packed: expected shape \[2\]"):
        ek.unpack_mask(torch.zeros(1, dtype=torch.uint8), (9,))
    with pytest.raises(TypeError, match="scores: expected all tensors fp64 or none"):
        ek.top_k_mask([torch.zeros(2), torch.zeros(2).double()], 1)
    with pytest.raises(ValueError, match="values: expected shape"):
        ek.sparse_apply_([torch.zeros(3)], [torch.tensor([0])], [torch.zeros(2)])
    with pytest.raises(TypeError, match="values: expected a tensor of float32"):
        ek.sparse_apply_([torch.zeros(3)], [torch.tensor([0])], [torch.zeros(1).half()])
    with pytest.raises(TypeError, match="indices: expected int32 or int64"):
        ek.sparse_apply_([torch.zeros(3)], [torch.tensor([0.0])], [torch.zeros(1)])


def test_memory_is_written_once_and_not_read():
    x = torch.arange(12.0)
    at, one = torch.tensor([0]), torch.ones(1)
    calls = [
        lambda: ek.sparse_apply_([x[:6], x[5:]], [at + 5, at], [one, one]),
        lambda: ek.sparse_apply_([x.view(3, 4).T, x.view(3, 4).T], [at, at], [one, one]),
        lambda: ek.sparse_apply_([x], [at], [x[:1]]),
        lambda: ek._foreach_graft_blend_([x[1:11]], [x[:10]], [torch.ones(10)], [torch.ones(10)]),
        lambda: ek.graft_mask_step_([x], [torch.ones(12)], [x], [torch.ones(12)]),
        lambda: ek.graft_mask_step_([torch.ones(6)], [x[:6]], [x[6:]], [x[6:]], out=[x[3:9]]),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=r"(weights|out|logits): expected (each tensor once|memory of its own)"
        ):
            call()
        assert torch.equal(x, torch.arange(12.0))
    ek.sparse_apply_([x[:6], x[6:]], [at, at], [one, one])  # side by side is apart
    assert x[0] == 1 and x[6] == 1


def test_empty_lists():
    assert ek._foreach_graft_blend_([], [], [], []) == []
    assert ek.graft_mask_step_([], [], [], []) == []
    assert ek.graft_top_k([], [], 0) == [] and ek.sparse_apply_([], [], []) == []
    with pytest.raises(ValueError, match="k: expected 0"):
        ek.graft_top_k([], [], 1)


# -- strided weights -----------------------------------------------------------------------------------------

# What a reshape to one dimension takes without a copy, and what it does not: all are written through.
STRIDED = {
    "every second": lambda: (storage := torch.zeros(12), storage[::2]),
    "every second column": lambda: (storage := torch.zeros(3, 4), storage[:, ::2]),
    "some rows": lambda: (storage := torch.zeros(5, 2), storage[1:4]),
    "some columns": lambda: (storage := torch.zeros(3, 5), storage[:, 1:3]),
    "transposed": lambda: (storage := torch.zeros(3, 2), storage.T),
    "a column": lambda: (storage := torch.zeros(6, 3), storage[:, 1]),
}


def strided(layout, fill):
    """A storage, and six entries of it with the given values, in the view's own order."""
    storage, view = STRIDED[layout]()
    view.copy_(fill.view(view.shape))
    return storage, view


def untouched(storage, view):
    """Whether everything of a storage but the view is zero, as it was."""
    kept = view.clone()
    view.zero_()
    clean = not storage.any()
    view.copy_(kept)
    return clean


@pytest.mark.parametrize("layout", STRIDED)
def test_strided_weights_are_written_through(device, layout):
    pre, ft, logits, gradient = torch.randn(4, 6)
    storage, weight = strided(layout, torch.arange(6.0))
    at, value = torch.tensor([4, 1]), torch.tensor([10.0, 20.0])
    (old,) = ek.sparse_apply_([weight], [at], [value])
    assert old.tolist() == [4, 1]
    assert weight.reshape(-1).tolist() == [0, 20, 2, 3, 10, 5] and untouched(storage, weight)

    ek._foreach_graft_blend_([weight], *([x.view(weight.shape)] for x in (pre, ft, logits)))
    blended = ek.graft_blend(pre, ft, logits)
    assert torch.equal(weight.reshape(-1), blended) and untouched(storage, weight)

    own, scores = strided(layout, logits)
    given = [[x.view(weight.shape)] for x in (gradient, pre, ft)]
    ek.graft_mask_step_([scores], *given, lr=0.5, out=[weight])
    expected, out = logits.clone(), torch.zeros(6)
    ek.graft_mask_step_([expected], [gradient], [pre], [ft], lr=0.5, out=[out])
    assert torch.equal(scores.reshape(-1), expected) and untouched(own, scores)
    assert torch.equal(weight.reshape(-1), out) and untouched(storage, weight)


@pytest.mark.parametrize("layout", STRIDED)
def test_strided_tensors_are_read(device, layout):
    """Every argument that is read, in every layout."""
    dense = torch.randn(4, 6)
    pre, ft, logits, gradient = (strided(layout, x)[1] for x in dense)
    base = torch.rand(6) < 0.5
    packed = torch.stack([ek.pack_mask(base)] * 2, 1)[:, 0]  # a strided mask too
    assert torch.equal(ek.pack_mask(strided(layout, base.float())[1] > 0), ek.pack_mask(base))
    got = ek.graft_blend(pre, ft, logits, packed, 0.5)
    assert torch.equal(got.view(-1), ek.graft_blend(*dense[:3], ek.pack_mask(base), 0.5))
    got = ek.graft_blend_packed(pre, ft, packed)
    assert torch.equal(got.view(-1), torch.where(base, dense[1], dense[0]))
    assert torch.equal(ek.graft_top_k([pre], [ft], 3)[0], ek.graft_top_k([dense[0]], [dense[1]], 3)[0])
    assert torch.equal(ek.top_k_mask([gradient], 2)[0], ek.top_k_mask([dense[3]], 2)[0])
    assert torch.equal(ek.unpack_mask(packed, (6,)), base)
    targets = torch.zeros(6)
    ek._foreach_graft_blend_([targets.view(pre.shape)], [pre], [ft], [logits], [packed], 0.5)
    assert torch.equal(targets, ek.graft_blend(*dense[:3], ek.pack_mask(base), 0.5))
