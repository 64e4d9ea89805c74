"""The associative write: the in-place update alone, the residual alone, and a whole joint write.

    make bench                                            everything, on every device there is
    python -m pytest bench/bench_low_rank.py -k update    one of them

Baselines, interleaved in one run, caches cold: eager PyTorch with the same algebra; `torch.compile` of it; a
CUDA graph of it; upstream's algorithm, MEMIT's fp64 solve of the in × in system at every call. Every variant
is checked against fp64 before it is timed. Weights are the MLP output projections of real models.
"""

import cases
import pytest
import torch
from baselines import calls
from harness import check, relative, timed

import engram_kernels as ek
from engram_kernels.ops.define import ops
from engram_kernels.ops.low_rank import precondition

MODELS = (cases.SMOLLM2, cases.GPT2_MEDIUM, *cases.MODELS[1:])
SHAPES = pytest.mark.parametrize(
    "shape", [model.output_projection for model in MODELS], ids=[model.name for model in MODELS]
)
# The others take long on a CPU and say little more.
ON_CPU = [model.output_projection for model in (cases.SMOLLM2, cases.GPT2_MEDIUM, cases.LLAMA_3)]
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


def sizes(shape, device: str) -> tuple[int, int]:
    if device == "cpu" and shape not in ON_CPU:
        pytest.skip("left to GPUs: the time of a CPU goes to other shapes")
    return shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("count", COUNTS)
@SHAPES
def test_update(benchmark, record, device, shape, count, dtype):
    """W += L R in place, L and R in fp32."""
    rows, cols = sizes(shape, device)
    start = torch.randn(rows, cols, device=device).to(dtype)
    left = torch.randn(rows, count, device=device) / count
    right = torch.randn(count, cols, device=device)
    args = weight, _, _ = start.clone(), left, right
    variants = {"engram": lambda: ek.apply_low_rank_(*args), **calls(eager_update, args, device)}

    truth = start.double() + left.double() @ right.double()
    errors = {}
    for name, variant in variants.items():
        weight.copy_(start)
        errors[name] = relative(variant(), truth)
    # Rounding into the weight's type is most of the error of each.
    check(errors, slack=4 * torch.finfo(dtype).eps)

    cost = cases.update(rows, cols, count, dtype)
    case = f"update {device} {str(dtype)[6:]} {rows}×{cols} n={count}"
    timed(benchmark, record, case, variants, device, weight.numel(), cost.traffic, cost.work, errors)


@pytest.mark.parametrize("count", COUNTS)
@SHAPES
def test_residual(benchmark, record, device, shape, count):
    """E = V − K Wᵀ and G = K Pᵀ, bf16 W."""
    rows, cols = sizes(shape, device)
    weight = torch.randn(1, rows, cols, device=device).bfloat16()
    keys = torch.randn(1, count, cols, device=device)
    values = torch.randn(1, count, rows, device=device)
    preconditioned = keys.double() * 0.5
    args = weight, keys, values, preconditioned
    variants = {"engram": lambda: ops.residual_gram(*args), **calls(eager_residual, args, device)}

    truth = values.double() - keys.double() @ weight.double().mT
    errors = {name: relative(variant()[0], truth) for name, variant in variants.items()}
    check(errors, slack=1e-5)

    cost = cases.residual(rows, cols, count, weight.dtype)
    case = f"residual {device} bfloat16 {rows}×{cols} n={count}"
    timed(benchmark, record, case, variants, device, weight.numel(), cost.traffic, cost.work, errors)


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


@pytest.mark.parametrize("kept", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("count", [1, 16, 128])
@SHAPES
def test_precondition(benchmark, record, device, covariances, shape, count, kept):
    """P = K C⁻¹ in fp64, from an inverse in fp64 and from one in fp32."""
    _, cols = sizes(shape, device)
    _, covariance = covariances(cols, device)
    keys, inverse = torch.randn(count, cols, device=device), covariance.inverse().to(kept)
    variants = {
        "engram": lambda: precondition(keys, inverse),
        "eager": lambda: keys.double() @ inverse.double(),
    }
    truth = keys.double() @ inverse.double()
    errors = {name: relative(variant(), truth) for name, variant in variants.items()}
    check(errors, slack=1e-13)

    cost = cases.precondition(cols, count, kept)
    case = f"P {device} {str(kept)[6:]} {cols}×{cols} n={count}"
    timed(benchmark, record, case, variants, device, inverse.numel(), cost.traffic, cost.work, errors)


@pytest.mark.parametrize("count", [1, 16, 100, 128, 1024])
@SHAPES
def test_joint_write(benchmark, record, device, covariances, shape, count):
    """MEMIT's whole update of a bf16 weight, the covariance's inverse ready."""
    rows, cols = sizes(shape, device)
    moment, covariance = covariances(cols, device)
    start = (torch.randn(rows, cols, device=device) / cols**0.5).bfloat16()
    keys = torch.randn(count, cols, device=device)
    values = torch.randn(count, rows, device=device)

    weight = start.clone()
    algebra = weight, keys, values, covariance.inverse()
    variants = {
        "engram": lambda: ek.apply_low_rank_(
            weight, *ek.low_rank_factors(weight, keys, values, covariance, ridge=RIDGE)
        ),
        # A factorisation waits for the GPU: no CUDA graph of it.
        **calls(eager_write, algebra, device, names=("eager", "torch.compile")),
        UPSTREAM: lambda: upstream_write(weight, keys, values, moment),
    }
    # Minutes long at Llama's width on a CPU: timed once, and checked at the other widths.
    once = (UPSTREAM,) if cols > 4096 and device == "cpu" else ()

    wide_keys, residual = keys.double(), values.double() - keys.double() @ start.double().T
    projected = covariance.solve(wide_keys)
    gram = projected @ wide_keys.T + RIDGE * torch.eye(count, dtype=torch.float64, device=device)
    truth = start.double() + residual.T @ torch.linalg.solve(gram, projected)
    restored = {}
    for name, variant in variants.items():

        def call(variant=variant):
            weight.copy_(start)  # the same work every time: a written key leaves no residual
            return variant()

        restored[name] = call
    errors = {name: relative(call(), truth) for name, call in restored.items() if name not in once}
    check(errors, slack=4 * torch.finfo(torch.bfloat16).eps)

    cost = cases.joint_write(rows, cols, count, weight.dtype)
    traffic = cost.traffic + 2 * weight.nbytes
    case = f"joint write {device} bfloat16 {rows}×{cols} n={count}"
    timed(benchmark, record, case, restored, device, weight.numel(), traffic, cost.work, errors, once)
