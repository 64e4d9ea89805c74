"""The associative write: the in-place update alone, the residual alone, and a whole joint write.

    make bench                                            everything, on every device there is
    python -m pytest bench/bench_rank_one.py -k update    one of them

Baselines, interleaved in one run, caches cold: eager PyTorch with the same algebra; `torch.compile` of it;
upstream's algorithm, MEMIT's fp64 solve of the in × in system at every call. Every variant is checked against
fp64 before it is timed. Traffic counts each input read once and each output written once.
"""

import pytest
import torch
from harness import check, relative, timed

import engram_kernels as ek
from engram_kernels._ops import ops

# (out, in): the MLP output projections of SmolLM2-135M, GPT-2 medium and Llama-3-8B.
SHAPES = [(576, 1536), (1024, 4096), (4096, 14336)]
COUNTS = [1, 16, 128, 1024]
RIDGE = 1.0
UPSTREAM = "upstream fp64 solve"


def eager_update(weight, left, right):
    if weight.dtype == left.dtype:
        return weight.addmm_(left, right)
    return weight.copy_(torch.addmm(weight.float(), left, right))


def eager_residual(weight, keys, values, preconditioned):
    return values - keys @ weight.float().mT, keys.double() @ preconditioned.mT


def eager_write(weight, keys, values, inverse):
    """The package's own algebra in eager PyTorch, the covariance's inverse ready."""
    wide = weight.float()
    residual = values - keys @ wide.T
    projected = keys.double() @ inverse
    gram = projected @ keys.double().T + RIDGE * torch.eye(len(keys), dtype=torch.float64, device=keys.device)
    left = torch.cholesky_solve(residual.double(), torch.linalg.cholesky(gram)).T
    return weight.copy_(torch.addmm(wide, left.float(), projected.float()))


def upstream_write(weight, keys, values, moment):
    """MEMIT as its authors compute it: a dense solve of order in, in fp64, at every call."""
    layer_keys = keys.double().T
    adjusted = torch.linalg.solve(RIDGE * moment + layer_keys @ layer_keys.T, layer_keys)
    residual = values.T - weight.float() @ keys.T
    return weight.copy_(weight.float() + (residual.double() @ adjusted.T).float())


# Compiled once for all shapes, as a user would: the second shape makes the sizes dynamic.
compiled_update = torch.compile(eager_update)
compiled_residual = torch.compile(eager_residual)
compiled_write = torch.compile(eager_write)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update(benchmark, record, device, shape, count, dtype):
    """W += L R in place, L and R in fp32."""
    rows, cols = shape
    start = torch.randn(rows, cols, device=device).to(dtype)
    left = torch.randn(rows, count, device=device) / count
    right = torch.randn(count, cols, device=device)
    variants = {"engram": ek.apply_low_rank_, "eager": eager_update, "torch.compile": compiled_update}

    truth = start.double() + left.double() @ right.double()
    errors = {
        name: relative(variant(start.clone(), left, right), truth) for name, variant in variants.items()
    }
    # Rounding into the weight's type is most of the error of each.
    check(errors, slack=4 * torch.finfo(dtype).eps)

    weight = start.clone()
    calls = {
        name: (lambda variant=variant: variant(weight, left, right)) for name, variant in variants.items()
    }
    traffic = 2 * weight.nbytes + left.nbytes + right.nbytes
    case = f"update {device} {str(dtype)[6:]} {rows}×{cols} n={count}"
    work = {torch.float32: 2 * rows * cols * count}
    timed(benchmark, record, case, calls, device, weight.numel(), traffic, work, errors)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual(benchmark, record, device, shape, count):
    """E = V − K Wᵀ and G = K Pᵀ, bf16 W."""
    rows, cols = shape
    weight = torch.randn(1, rows, cols, device=device).bfloat16()
    keys = torch.randn(1, count, cols, device=device)
    values = torch.randn(1, count, rows, device=device)
    preconditioned = keys.double() * 0.5
    args = weight, keys, values, preconditioned
    variants = {"engram": ops.residual_gram, "eager": eager_residual, "torch.compile": compiled_residual}

    truth = values.double() - keys.double() @ weight.double().mT
    errors = {name: relative(variant(*args)[0], truth) for name, variant in variants.items()}
    check(errors, slack=1e-5)

    calls = {name: (lambda variant=variant: variant(*args)) for name, variant in variants.items()}
    traffic = weight.nbytes + keys.nbytes + 2 * values.nbytes + preconditioned.nbytes
    work = {torch.float32: 2 * rows * cols * count, torch.float64: 2 * count * count * cols}
    case = f"residual {device} bfloat16 {rows}×{cols} n={count}"
    timed(benchmark, record, case, calls, device, weight.numel(), traffic, work, errors)


@pytest.fixture(scope="module")
def covariances():
    """A second moment and its covariance, for one width and device at a time: they are large."""
    kept = {}

    def get(cols: int, device: str):
        if (cols, device) not in kept:
            kept.clear()
            # Few samples and the identity: the time of a write does not depend on the spectrum.
            inputs = torch.randn(1024, cols, device=device)
            moment = torch.eye(cols, device=device, dtype=torch.float64).mul_(len(inputs))
            covariance = ek.Covariance.from_second_moment(ek.second_moment_(moment, inputs), len(inputs))
            kept[cols, device] = moment.div_(len(inputs)), covariance
        return kept[cols, device]

    return get


@pytest.mark.parametrize("count", [1, 16, 100, 128, 1024])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_joint_write(benchmark, record, device, covariances, shape, count):
    """MEMIT's whole update of a bf16 weight, the covariance's inverse ready."""
    rows, cols = shape
    moment, covariance = covariances(cols, device)
    start = (torch.randn(rows, cols, device=device) / cols**0.5).bfloat16()
    keys = torch.randn(count, cols, device=device)
    values = torch.randn(count, rows, device=device)

    def engram(weight):
        return ek.apply_low_rank_(weight, *ek.rank_one_factors(weight, keys, values, covariance, ridge=RIDGE))

    variants = {
        "engram": engram,
        "eager": lambda weight: eager_write(weight, keys, values, covariance.inverse()),
        "torch.compile": lambda weight: compiled_write(weight, keys, values, covariance.inverse()),
        UPSTREAM: lambda weight: upstream_write(weight, keys, values, moment),
    }
    # Minutes long at Llama's width on a CPU: timed once, and checked at the other widths.
    once = (UPSTREAM,) if cols > 4096 and device == "cpu" else ()

    wide_keys, residual = keys.double(), values.double() - keys.double() @ start.double().T
    projected = covariance.solve(wide_keys)
    gram = projected @ wide_keys.T + RIDGE * torch.eye(count, dtype=torch.float64, device=device)
    truth = start.double() + residual.T @ torch.linalg.solve(gram, projected)
    errors = {name: relative(f(start.clone()), truth) for name, f in variants.items() if name not in once}
    check(errors, slack=4 * torch.finfo(torch.bfloat16).eps)

    weight = start.clone()
    calls = {}
    for name, variant in variants.items():

        def call(variant=variant):
            weight.copy_(start)  # the same work every time: a written key leaves no residual
            return variant(weight)

        calls[name] = call
    traffic = 5 * weight.nbytes + covariance.inverse().nbytes + 3 * (keys.nbytes + values.nbytes)
    work = {
        torch.float32: 4 * rows * cols * count,
        torch.float64: 2 * count * cols * cols + 2 * count * count * (cols + rows) + count**3 / 3,
    }
    case = f"joint write {device} bfloat16 {rows}×{cols} n={count}"
    timed(benchmark, record, case, calls, device, weight.numel(), traffic, work, errors, once)
