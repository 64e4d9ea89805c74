"""Grafting: blends, packed blends, the mask's step, top-k masks, sparse writes; tensors and whole models.

    python -m pytest bench/bench_graft.py --benchmark-only            everything, on every device there is
    python -m pytest bench/bench_graft.py --benchmark-only -k packed  one of them

Baselines, interleaved in one run, caches cold. For a tensor: eager PyTorch in the weights' type, and
`torch.compile` of it. For a model: upstream's algorithm, a loop over the parameters that keeps the base mask
as floats and makes γ a tensor, and a loop over a compiled function for one tensor. What changes in place does
so in every variant. Each is checked against fp64 before it is timed. Traffic counts each input read once and
each output written once.
"""

import pytest
import torch
from harness import check, relative, timed

import engram_kernels as ek

SHAPE = (4096, 14336)  # an MLP matrix of Llama-3-8B
BIAS = 0.5
RATE = 0.1
UPSTREAM = "upstream loop"
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def smollm2_layers() -> list[tuple[int, ...]]:
    """The shapes of the layers of SmolLM2-135M: 270 tensors, 106 million weights."""
    attention = [(576, 576), (192, 576), (192, 576), (576, 576)]
    return [*attention, (1536, 576), (1536, 576), (576, 1536), (576,), (576,)] * 30


def drawn(shapes, device, dtype):
    """(pre, ft, logits, gradients) of those shapes."""
    pre = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    ft = [weight + (0.01 * torch.randn(weight.shape, device=device)).to(dtype) for weight in pre]
    logits = [5 * torch.randn(shape, device=device) for shape in shapes]
    return pre, ft, logits, [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def eager_blend(pre, ft, logits):
    return pre + torch.sigmoid(logits - BIAS).to(pre.dtype) * (ft - pre)


def eager_step_(logits, gradient, pre, ft, out):
    gate = torch.sigmoid(logits - BIAS)
    change = ft - pre
    logits.sub_(RATE * (gradient * change).float() * gate * (1 - gate))
    out.copy_(pre + torch.sigmoid(logits - BIAS).to(pre.dtype) * change)


def eager_choice(pre, ft, mask):
    return pre + mask * (ft - pre)


compiled_blend = torch.compile(eager_blend)
compiled_step_ = torch.compile(eager_step_)
compiled_choice = torch.compile(eager_choice)


def masked_blend_(out, pre, ft, logits, base):
    """γ = base + (1 − 2 base) σ(S − bias) as a tensor, then pre + γ (ft − pre)."""
    gate = base + (1 - 2 * base) * torch.sigmoid(logits - BIAS)
    out.copy_(pre + gate.to(pre.dtype) * (ft - pre))


def masked_step_(logits, gradient, pre, ft, base, out):
    """The gradient of S, then the blend."""
    flip = torch.sigmoid(logits - BIAS)
    logits -= RATE * (1 - 2 * base) * flip * (1 - flip) * (gradient * (ft - pre)).float()
    masked_blend_(out, pre, ft, logits, base)


compiled_masked_blend_ = torch.compile(masked_blend_)
compiled_masked_step_ = torch.compile(masked_step_)


def each(function, *lists):
    """Call a function for one tensor after the other."""
    for tensors in zip(*lists, strict=True):
        function(*tensors)


def true_blend(pre, ft, logits):
    return pre.double() + torch.sigmoid(logits.double() - BIAS) * (ft.double() - pre.double())


@DTYPES
def test_blend(benchmark, record, device, dtype):
    """θ of one tensor, out of place."""
    args = [tensors[0] for tensors in drawn([SHAPE], device, dtype)[:3]]
    variants = {
        "engram": lambda *x: ek.graft_blend(*x, bias=BIAS),
        "eager": eager_blend,
        "torch.compile": compiled_blend,
    }
    truth = true_blend(*args)
    errors = {name: relative(variant(*args), truth) for name, variant in variants.items()}
    check(errors, slack=4 * torch.finfo(dtype).eps)
    calls = {name: (lambda variant=variant: variant(*args)) for name, variant in variants.items()}
    traffic = sum(x.nbytes for x in args) + args[0].nbytes
    case = f"blend {device} {str(dtype)[6:]} {SHAPE[0]}×{SHAPE[1]}"
    timed(benchmark, record, case, calls, device, args[0].numel(), traffic, {}, errors)


@DTYPES
def test_blend_packed(benchmark, record, device, dtype):
    """A finished mask: bits here, a mask of the weights' type in eager PyTorch."""
    pre, ft, _, _ = (tensors[0] for tensors in drawn([SHAPE], device, dtype))
    mask = torch.rand(SHAPE, device=device) < 0.01
    packed, floating = ek.pack_mask(mask), mask.to(dtype)
    calls = {
        "engram": lambda: ek.graft_blend_packed(pre, ft, packed),
        "eager": lambda: eager_choice(pre, ft, floating),
        "torch.compile": lambda: compiled_choice(pre, ft, floating),
        "torch.where": lambda: torch.where(mask, ft, pre),
    }
    truth = torch.where(mask, ft, pre).double()
    errors = {name: relative(call(), truth) for name, call in calls.items()}
    check(errors, slack=torch.finfo(dtype).eps)
    case = f"packed blend {device} {str(dtype)[6:]} {SHAPE[0]}×{SHAPE[1]}"
    timed(benchmark, record, case, calls, device, pre.numel(), 3 * pre.nbytes + packed.nbytes, {}, errors)


@DTYPES
def test_mask_step(benchmark, record, device, dtype):
    """S and the next θ of one tensor."""
    pre, ft, start, gradient = (tensors[0] for tensors in drawn([SHAPE], device, dtype))
    logits, out = start.clone(), torch.empty_like(pre)
    calls = {
        "engram": lambda: ek.graft_mask_step_([logits], [gradient], [pre], [ft], None, BIAS, RATE, out=[out]),
        "eager": lambda: eager_step_(logits, gradient, pre, ft, out),
        "torch.compile": lambda: compiled_step_(logits, gradient, pre, ft, out),
    }
    gate = torch.sigmoid(start.double() - BIAS)
    change = ft.double() - pre.double()
    next_logits = start.double() - RATE * gradient.double() * change * gate * (1 - gate)
    truth = true_blend(pre, ft, next_logits)
    errors = {}
    for name, call in calls.items():
        logits.copy_(start)
        call()
        errors[name] = relative(out, truth)
        assert relative(logits, next_logits) < 1e-3 * RATE
    check(errors, slack=4 * torch.finfo(dtype).eps)
    traffic = 2 * start.nbytes + 4 * pre.nbytes
    case = f"mask step {device} {str(dtype)[6:]} {SHAPE[0]}×{SHAPE[1]}"
    timed(benchmark, record, case, calls, device, pre.numel(), traffic, {}, errors)


@DTYPES
def test_model_blend(benchmark, record, device, dtype):
    """θ of a whole model, in place, with a base mask."""
    pre, ft, logits, _ = drawn(smollm2_layers(), device, dtype)
    masks = [torch.rand(x.shape, device=device) < 0.01 for x in pre]
    base, floating = [ek.pack_mask(mask) for mask in masks], [mask.float() for mask in masks]
    out = [torch.empty_like(x) for x in pre]
    calls = {
        "engram": lambda: ek.graft_blend_all_(out, pre, ft, logits, base, BIAS),
        UPSTREAM: lambda: each(masked_blend_, out, pre, ft, logits, floating),
        "torch.compile": lambda: each(compiled_masked_blend_, out, pre, ft, logits, floating),
    }
    flipped = 2 * BIAS - logits[6]
    truth = true_blend(pre[6], ft[6], torch.where(masks[6], flipped, logits[6]))
    errors = {}
    for name, call in calls.items():
        call()
        errors[name] = relative(out[6], truth)
    check(errors, slack=4 * torch.finfo(dtype).eps)
    size = sum(x.numel() for x in pre)
    traffic = sum(x.nbytes for x in [*pre, *ft, *logits, *base, *out])
    case = f"model blend {device} {str(dtype)[6:]} {len(pre)} tensors"
    timed(benchmark, record, case, calls, device, size, traffic, {}, errors)


@DTYPES
def test_model_step(benchmark, record, device, dtype):
    """S and the next θ of a whole model, with a base mask."""
    pre, ft, logits, gradients = drawn(smollm2_layers(), device, dtype)
    masks = [torch.rand(x.shape, device=device) < 0.01 for x in pre]
    base, floating = [ek.pack_mask(mask) for mask in masks], [mask.float() for mask in masks]
    out = [torch.empty_like(x) for x in pre]
    calls = {
        "engram": lambda: ek.graft_mask_step_(logits, gradients, pre, ft, base, BIAS, RATE, out=out),
        UPSTREAM: lambda: each(masked_step_, logits, gradients, pre, ft, floating, out),
        "torch.compile": lambda: each(compiled_masked_step_, logits, gradients, pre, ft, floating, out),
    }
    errors = {}
    for name, call in calls.items():
        old = logits[6].double()
        sign = torch.where(masks[6], -1.0, 1.0).double()
        gate = torch.sigmoid(sign * (old - BIAS))
        change = gradients[6].double() * (ft[6].double() - pre[6].double())
        truth = old - RATE * sign * gate * (1 - gate) * change
        call()
        errors[name] = relative(logits[6], truth)
    check(errors, slack=1e-5)
    size = sum(x.numel() for x in pre)
    traffic = sum(x.nbytes for x in [*pre, *ft, *logits, *logits, *gradients, *base, *out])
    case = f"model step {device} {str(dtype)[6:]} {len(pre)} tensors"
    timed(benchmark, record, case, calls, device, size, traffic, {}, errors)


@DTYPES
def test_top_k(benchmark, record, device, dtype):
    """The masks of the 0.01 % largest changes of a whole model."""
    pre, ft, _, _ = drawn(smollm2_layers(), device, dtype)
    k = round(1e-4 * sum(x.numel() for x in pre))

    def eager():
        changes = torch.cat([(b.float() - a.float()).abs().flatten() for a, b in zip(pre, ft, strict=True)])
        mask = torch.zeros(len(changes), dtype=torch.bool, device=device)
        mask[changes.topk(k).indices] = True
        return mask.split([x.numel() for x in pre])

    calls = {"engram": lambda: ek.graft_top_k(pre, ft, k), "eager": eager}
    chosen = [ek.unpack_mask(mask, (x.numel(),)) for mask, x in zip(calls["engram"](), pre, strict=True)]
    # Of equal changes another may be taken: the sum of those taken is what both must agree in.
    sums = []
    for masks in (chosen, eager()):
        values = [(b.float() - a.float()).abs().flatten()[m] for a, b, m in zip(pre, ft, masks, strict=True)]
        sums.append(torch.cat(values).double().sum())
    assert sum(int(mask.sum()) for mask in chosen) == k and torch.isclose(*sums, rtol=1e-12)
    size = sum(x.numel() for x in pre)
    traffic = sum(x.nbytes for x in [*pre, *ft]) + size / 8
    case = f"top k {device} {str(dtype)[6:]} {len(pre)} tensors"
    timed(benchmark, record, case, calls, device, size, traffic, {}, dict.fromkeys(calls, 0.0))


def test_sparse_apply(benchmark, record, device):
    """0.01 % of 10⁹ bf16 weights in 64 tensors, exchanged."""
    weights = [torch.zeros(15_625_000, device=device, dtype=torch.bfloat16) for _ in range(64)]
    indices, values = [], []
    for weight in weights:
        at = torch.randperm(weight.numel() // 100, device=device)[:1562].mul(100).sort().values
        indices.append(at.int())
        values.append(torch.randn(len(at), device=device).bfloat16())

    def eager():
        overwritten = []
        for weight, at, value in zip(weights, indices, values, strict=True):
            at = at.long()
            overwritten.append(weight[at])
            weight[at] = value
        return overwritten

    calls = {"engram": lambda: ek.sparse_apply_(weights, indices, values), "eager": eager}
    for call in calls.values():
        call()
        assert all(w[at.long()].equal(v) for w, at, v in zip(weights, indices, values, strict=True))
        for weight, at in zip(weights, indices, strict=True):
            weight[at.long()] = 0
    entries = sum(len(at) for at in indices)
    case = f"sparse apply {device} bfloat16 {entries} of 10⁹"
    timed(benchmark, record, case, calls, device, entries, 12 * entries, {}, dict.fromkeys(calls, 0.0))
