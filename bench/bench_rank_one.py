"""The associative write: the in-place update alone, the residual alone, and a whole joint write.

    make bench                                            everything, on every device there is
    python -m pytest bench/bench_rank_one.py -k update    one of them

Baselines, in the same run, interleaved, caches cold: eager PyTorch with the same algebra; `torch.compile` of
it; upstream's algorithm, MEMIT's fp64 solve of the in × in system at every call. Every variant is checked
against fp64 before it is timed. Traffic counts each input read once and each output written once.
"""

import pytest
import torch
from harness import floor, interleave

import engram_kernels as ek
from engram_kernels._ops import ops

# (out, in): the MLP output projections of SmolLM2-135M, GPT-2 medium and Llama-3-8B.
SHAPES = [(576, 1536), (1024, 4096), (4096, 14336)]
COUNTS = [1, 16, 128, 1024]
RIDGE = 1.0


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def rounds(rows: int, cols: int) -> int:
    return 15 if rows * cols < 10**7 else 5


def timed(benchmark, record, case, ours, variants, device, traffic, work, repeats, errors, once=()):
    """Time the variants, hand ours to pytest-benchmark too, and keep the case for the table."""
    outcomes = interleave(variants, device, repeats, once)
    for name, error in errors.items():
        outcomes[name].error = error
    record(case, ours, outcomes, traffic, floor(device, traffic, work))
    benchmark.pedantic(variants[ours], rounds=3)


def check(variants: dict, truth: torch.Tensor, start: torch.Tensor, slack: float) -> dict[str, float]:
    """Run each variant on a fresh weight; an error beyond `slack` of the change ends the benchmark."""
    errors = {}
    for name, variant in variants.items():
        weight = start.clone()
        errors[name] = relative(variant(weight), truth)
        assert errors[name] < slack, f"{name} is wrong: {errors[name]}"
    return errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update(benchmark, record, device, shape, count, dtype):
    """W += L R in place, L and R in fp32."""
    rows, cols = shape
    start = torch.randn(rows, cols, device=device).to(dtype)
    left = torch.randn(rows, count, device=device) / count
    right = torch.randn(count, cols, device=device)
    truth = start.double() + left.double() @ right.double()

    def eager(weight):
        return weight.copy_(torch.addmm(weight.float(), left, right))

    variants = {
        "engram": lambda weight: ek.apply_low_rank_(weight, left, right),
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
    }
    # Rounding into the weight's type is most of the error of each.
    errors = check(variants, truth, start, slack=4 * torch.finfo(dtype).eps)
    weight = start.clone()
    calls = {name: (lambda variant=variant: variant(weight)) for name, variant in variants.items()}
    traffic = 2 * weight.nbytes + left.nbytes + right.nbytes
    case = f"update {device} {str(dtype)[6:]} {rows}×{cols} n={count}"
    work = {torch.float32: 2 * rows * cols * count}
    timed(benchmark, record, case, "engram", calls, device, traffic, work, rounds(*shape), errors)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual(benchmark, record, device, shape, count):
    """E = V − K Wᵀ and G = K Pᵀ, bf16 W."""
    rows, cols = shape
    weight = torch.randn(1, rows, cols, device=device).bfloat16()
    keys = torch.randn(1, count, cols, device=device)
    values = torch.randn(1, count, rows, device=device)
    preconditioned = keys.double() * 0.5

    def eager(w=None):
        return values - keys @ weight.float().mT, keys.double() @ preconditioned.mT

    compiled = torch.compile(eager, dynamic=False)
    variants = {
        "engram": lambda: ops.residual_gram(weight, keys, values, preconditioned),
        "eager": eager,
        "torch.compile": compiled,
    }
    truth = values.double() - keys.double() @ weight.double().mT
    errors = {name: relative(variant()[0], truth) for name, variant in variants.items()}
    assert max(errors.values()) < 1e-5, errors
    traffic = weight.nbytes + keys.nbytes + 2 * values.nbytes + preconditioned.nbytes
    work = {torch.float32: 2 * rows * cols * count, torch.float64: 2 * count * count * cols}
    case = f"residual {device} bfloat16 {rows}×{cols} n={count}"
    timed(benchmark, record, case, "engram", variants, device, traffic, work, rounds(*shape), errors)


@pytest.fixture(scope="module")
def covariances():
    """The covariance and its second moment for one width and device at a time."""
    kept = {}

    def get(cols: int, device: str):
        if (cols, device) not in kept:
            kept.clear()
            inputs = torch.randn(2 * cols, cols, device=device)
            moment = ek.second_moment_(torch.zeros(cols, cols, device=device, dtype=torch.float64), inputs)
            kept[cols, device] = moment / len(inputs), ek.Covariance.from_second_moment(moment, len(inputs))
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

    def eager(weight):
        wide = weight.float()
        residual = values - keys @ wide.T
        projected = keys.double() @ covariance.inverse()
        gram = keys.double() @ projected.T
        gram.diagonal().add_(RIDGE)
        left = torch.cholesky_solve(residual.double(), torch.linalg.cholesky(gram)).T
        return weight.copy_(wide.addmm_(left.float(), projected.float()))

    def upstream(weight):
        layer_keys = keys.double().T
        adjusted = torch.linalg.solve(RIDGE * moment + layer_keys @ layer_keys.T, layer_keys)
        residual = values.T - weight.float() @ keys.T
        return weight.copy_(weight.float() + (residual.double() @ adjusted.T).float())

    variants = {"engram": engram, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    variants["upstream fp64 solve"] = upstream
    once = ("upstream fp64 solve",) if cols > 4096 else ()
    truth = start.double() + _dense(start.double(), keys.double(), values.double(), covariance)
    checked = {name: variant for name, variant in variants.items() if name not in once}
    errors = check(checked, truth, start, slack=4 * torch.finfo(torch.bfloat16).eps)
    weight = start.clone()
    calls = {}
    for name, variant in variants.items():

        def call(variant=variant):
            weight.copy_(start)  # the same work every time: a written key leaves no residual
            return variant(weight)

        calls[name] = call
    traffic = 3 * weight.nbytes + covariance.inverse().nbytes + 3 * (keys.nbytes + values.nbytes)
    work = {
        torch.float32: 4 * rows * cols * count,
        torch.float64: 2 * count * cols * cols + 2 * count * count * (cols + rows) + count**3 / 3,
    }
    case = f"joint write {device} bfloat16 {rows}×{cols} n={count}"
    timed(
        benchmark, record, case, "engram", calls, device, traffic, work, rounds(*shape) // 2 + 1, errors, once
    )


def _dense(weight, keys, values, covariance) -> torch.Tensor:
    projected = covariance.solve(keys)
    gram = keys @ projected.T + RIDGE * torch.eye(len(keys), dtype=torch.float64, device=keys.device)
    return (values - keys @ weight.T).T @ torch.linalg.solve(gram, projected)
