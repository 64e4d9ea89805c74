"""Grafting: blends, packed blends, the mask's step, top-k masks, sparse writes; tensors and whole models.

    python -m pytest bench/bench_graft.py --benchmark-only            everything, on every device there is
    python -m pytest bench/bench_graft.py --benchmark-only -k packed  one of them

Baselines, interleaved in one run, caches cold. For a tensor: eager PyTorch in the weights' type,
`torch.compile` of it, a CUDA graph of it. For a model: upstream's algorithm, a loop over the parameters that
keeps the base mask as floats and makes γ a tensor; a CUDA graph of that loop; a loop over a compiled function
for one tensor. What changes in place does so in every variant. Each is checked against fp64 before it is
timed. Shapes are those of real models: one MLP matrix, or the tensors of all layers or of a few.
"""

import cases
import pytest
import torch
from baselines import BASELINES, calls
from harness import check, relative, timed

import engram_kernels as ek

BIAS = 0.5
RATE = 0.1
UPSTREAM = "upstream loop"
EAGER = ("eager", "CUDA graph")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
MATRICES = pytest.mark.parametrize("model", cases.MODELS, ids=lambda model: model.name)
# Name, shapes, and whether a CPU has the time and the memory.
WHOLE = {
    "two layers of SmolLM2-135M": (cases.SMOLLM2.tensors(2), True),
    "SmolLM2-135M": (cases.SMOLLM2.tensors(), True),
    "GPT-2 XL": (cases.GPT2_XL.tensors(), False),
}
WHOLE_MODELS = pytest.mark.parametrize("whole", WHOLE)


def matrix(model: cases.Model, device: str) -> tuple[int, int]:
    if device == "cpu" and model not in (cases.SMOLLM2, cases.LLAMA_3):
        pytest.skip("left to GPUs: the time of a CPU goes to other shapes")
    return model.output_projection


def shapes_of(whole: str, device: str) -> list[tuple[int, ...]]:
    shapes, on_cpu = WHOLE[whole]
    if device == "cpu" and not on_cpu:
        pytest.skip(f"left to GPUs: {cases.entries(shapes) / 1e9:.1f} billion weights, several times over")
    return shapes


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


def loops(function, compiled, lists, device) -> dict:
    """Upstream's loop over the parameters, the same as a CUDA graph, and a loop over a compiled function."""
    graph = BASELINES["CUDA graph"](each, (function, *lists), device)
    return {
        UPSTREAM: lambda: each(function, *lists),
        "torch.compile": lambda: each(compiled, *lists),
        **({} if graph is None else {"CUDA graph": graph}),
    }


def named(what: str, device: str, dtype: torch.dtype, shape) -> str:
    return f"{what} {device} {str(dtype)[6:]} {shape[0]}×{shape[1]}"


@DTYPES
@MATRICES
def test_blend(benchmark, record, device, model, dtype):
    """θ of one tensor, out of place."""
    shape = matrix(model, device)
    args = tuple(tensors[0] for tensors in drawn([shape], device, dtype)[:3])
    variants = {"engram": lambda: ek.graft_blend(*args, bias=BIAS), **calls(eager_blend, args, device)}
    truth = true_blend(*args)
    errors = {name: relative(call(), truth) for name, call in variants.items()}
    check(errors, slack=4 * torch.finfo(dtype).eps)
    size = args[0].numel()
    traffic = cases.blend(size, dtype, base=False).traffic
    timed(
        benchmark, record, named("blend", device, dtype, shape), variants, device, size, traffic, {}, errors
    )


@DTYPES
@MATRICES
def test_blend_packed(benchmark, record, device, model, dtype):
    """A finished mask: bits here, a mask of the weights' type in eager PyTorch."""
    shape = matrix(model, device)
    pre, ft, _, _ = (tensors[0] for tensors in drawn([shape], device, dtype))
    mask = torch.rand(shape, device=device) < 0.01
    packed = ek.pack_mask(mask)
    variants = {
        "engram": lambda: ek.graft_blend_packed(pre, ft, packed),
        **calls(eager_choice, (pre, ft, mask.to(dtype)), device),
        "torch.where": lambda: torch.where(mask, ft, pre),
    }
    truth = torch.where(mask, ft, pre).double()
    errors = {name: relative(call(), truth) for name, call in variants.items()}
    check(errors, slack=torch.finfo(dtype).eps)
    case = named("packed blend", device, dtype, shape)
    traffic = cases.packed_blend(pre.numel(), dtype).traffic
    timed(benchmark, record, case, variants, device, pre.numel(), traffic, {}, errors)


@DTYPES
@MATRICES
def test_mask_step(benchmark, record, device, model, dtype):
    """S and the next θ of one tensor."""
    shape = matrix(model, device)
    pre, ft, start, gradient = (tensors[0] for tensors in drawn([shape], device, dtype))
    logits, out = start.clone(), torch.empty_like(pre)
    variants = {
        "engram": lambda: ek.graft_mask_step_([logits], [gradient], [pre], [ft], None, BIAS, RATE, out=[out]),
        **calls(eager_step_, (logits, gradient, pre, ft, out), device),
    }
    gate = torch.sigmoid(start.double() - BIAS)
    change = ft.double() - pre.double()
    next_logits = start.double() - RATE * gradient.double() * change * gate * (1 - gate)
    truth = true_blend(pre, ft, next_logits)
    errors = {}
    for name, call in variants.items():
        logits.copy_(start)
        call()
        errors[name] = relative(out, truth)
        assert relative(logits, next_logits) < 1e-3 * RATE
    check(errors, slack=4 * torch.finfo(dtype).eps)
    case = named("mask step", device, dtype, shape)
    traffic = cases.mask_step(pre.numel(), dtype, base=False).traffic
    timed(benchmark, record, case, variants, device, pre.numel(), traffic, {}, errors)


@DTYPES
@WHOLE_MODELS
def test_model_blend(benchmark, record, device, whole, dtype):
    """θ of a whole model, in place, with a base mask."""
    pre, ft, logits, _ = drawn(shapes_of(whole, device), device, dtype)
    masks = [torch.rand(x.shape, device=device) < 0.01 for x in pre]
    base, floating = [ek.pack_mask(mask) for mask in masks], [mask.float() for mask in masks]
    out = [torch.empty_like(x) for x in pre]
    lists = out, pre, ft, logits, floating
    variants = {
        "engram": lambda: ek._foreach_graft_blend_(out, pre, ft, logits, base, BIAS),
        **loops(masked_blend_, compiled_masked_blend_, lists, device),
    }
    flipped = 2 * BIAS - logits[6]
    truth = true_blend(pre[6], ft[6], torch.where(masks[6], flipped, logits[6]))
    errors = {}
    for name, call in variants.items():
        call()
        errors[name] = relative(out[6], truth)
    check(errors, slack=4 * torch.finfo(dtype).eps)
    size = sum(x.numel() for x in pre)
    traffic = cases.blend(size, dtype, base=True).traffic
    case = f"model blend {device} {str(dtype)[6:]} {whole}, {len(pre)} tensors"
    timed(benchmark, record, case, variants, device, size, traffic, {}, errors)


@DTYPES
@WHOLE_MODELS
def test_model_step(benchmark, record, device, whole, dtype):
    """S and the next θ of a whole model, with a base mask."""
    pre, ft, logits, gradients = drawn(shapes_of(whole, device), device, dtype)
    masks = [torch.rand(x.shape, device=device) < 0.01 for x in pre]
    base, floating = [ek.pack_mask(mask) for mask in masks], [mask.float() for mask in masks]
    out = [torch.empty_like(x) for x in pre]
    lists = logits, gradients, pre, ft, floating, out
    variants = {
        "engram": lambda: ek.graft_mask_step_(logits, gradients, pre, ft, base, BIAS, RATE, out=out),
        **loops(masked_step_, compiled_masked_step_, lists, device),
    }
    errors = {}
    for name, call in variants.items():
        old = logits[6].double()
        sign = torch.where(masks[6], -1.0, 1.0).double()
        gate = torch.sigmoid(sign * (old - BIAS))
        change = gradients[6].double() * (ft[6].double() - pre[6].double())
        truth = old - RATE * sign * gate * (1 - gate) * change
        call()
        errors[name] = relative(logits[6], truth)
    check(errors, slack=1e-5)
    size = sum(x.numel() for x in pre)
    traffic = cases.mask_step(size, dtype, base=True).traffic
    case = f"model step {device} {str(dtype)[6:]} {whole}, {len(pre)} tensors"
    timed(benchmark, record, case, variants, device, size, traffic, {}, errors)


@DTYPES
@WHOLE_MODELS
def test_top_k(benchmark, record, device, whole, dtype):
    """The masks of the 0.01 % largest changes of a whole model."""
    pre, ft, _, _ = drawn(shapes_of(whole, device), device, dtype)
    k = round(1e-4 * sum(x.numel() for x in pre))

    def eager():
        changes = torch.cat([(b.float() - a.float()).abs().flatten() for a, b in zip(pre, ft, strict=True)])
        mask = torch.zeros(len(changes), dtype=torch.bool, device=device)
        mask[changes.topk(k).indices] = True
        return mask.split([x.numel() for x in pre])

    variants = {"engram": lambda: ek.graft_top_k(pre, ft, k), "eager": eager}
    chosen = [ek.unpack_mask(mask, (x.numel(),)) for mask, x in zip(variants["engram"](), pre, strict=True)]
    # Of equal changes another may be taken: the sum of those taken is what both must agree in.
    sums = []
    for masks in (chosen, eager()):
        values = [(b.float() - a.float()).abs().flatten()[m] for a, b, m in zip(pre, ft, masks, strict=True)]
        sums.append(torch.cat(values).double().sum())
    assert sum(int(mask.sum()) for mask in chosen) == k and torch.isclose(*sums, rtol=1e-12)
    size = sum(x.numel() for x in pre)
    traffic = cases.top_k(size, dtype).traffic
    case = f"top k {device} {str(dtype)[6:]} {whole}, {len(pre)} tensors"
    timed(benchmark, record, case, variants, device, size, traffic, {}, dict.fromkeys(variants, 0.0))


@pytest.mark.parametrize("model", cases.MODELS[:2] + cases.MODELS[3:4], ids=lambda model: model.name)
def test_sparse_apply(benchmark, record, device, model):
    """0.01 % of a model's bf16 weights, exchanged."""
    shapes, dtype = model.tensors(), torch.bfloat16
    if device == "cpu" and cases.entries(shapes) > 2 * 10**9:
        pytest.skip(f"left to GPUs: {cases.entries(shapes) / 1e9:.1f} billion weights")
    weights = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
    indices, values = [], []
    for weight in weights:
        places = torch.randperm(weight.numel() // 100, device=device)[: round(weight.numel() / 10**4)]
        indices.append(places.mul(100).sort().values.int())
        values.append(torch.randn(len(places), device=device).to(dtype))

    def eager():
        overwritten = []
        for weight, at, value in zip(weights, indices, values, strict=True):
            flat, at = weight.view(-1), at.long()
            overwritten.append(flat[at])
            flat[at] = value
        return overwritten

    variants = {
        "engram": lambda: ek.sparse_apply_(weights, indices, values),
        **calls(eager, (), device, EAGER),
    }
    for call in variants.values():
        for weight in weights:
            weight.zero_()
        call()
        for weight, at, value in zip(weights, indices, values, strict=True):
            assert weight.view(-1)[at.long()].equal(value)
    count = sum(len(at) for at in indices)
    case = f"sparse apply {device} bfloat16 {count} of {model.name}"
    traffic = cases.sparse_apply(count, dtype).traffic
    timed(benchmark, record, case, variants, device, count, traffic, {}, dict.fromkeys(variants, 0.0))
