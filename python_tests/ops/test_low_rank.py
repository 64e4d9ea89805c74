"""The associative write on every backend that exists here, against fp64.

The rule of every comparison: an error of at most twice that of the eager formula in the same type, both
against fp64. No tolerance is tuned.
"""

import functools
import math

import numpy as np
import oracle
import pytest
import torch
from accuracy import check_rounded_once, error, rounding, wide
from matrices import LAYOUTS, covariance_of

import engram_kernels as ek
from engram_kernels._linalg import compute_dtype
from engram_kernels.ops.define import apply, ops
from engram_kernels.ops.low_rank import precondition
from engram_kernels.ops.low_rank_solve import Precondition

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODES = ["joint", "sequential", "independent"]


@functools.cache
def problem(rows: int, cols: int, count: int, condition: float = 100.0):
    """fp64 (weight, keys, values, covariance), the keys drawn from the covariance; the same at every call."""
    torch.manual_seed(rows * cols + count)
    covariance = covariance_of(cols, condition)
    keys = torch.randn(count, cols, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    weight = torch.randn(rows, cols, dtype=torch.float64)
    return weight, keys, torch.randn(count, rows, dtype=torch.float64), covariance


def eager_write(mode, weight, keys, values, inverse, ridge):
    """The textbook formula: n × n and in × in algebra in fp64, what touches the weight in its compute type.

    With an fp32 inverse or Gram matrix the formula has lost most digits at a condition of 1e8, and would pass
    anything.
    """
    dtype = compute_dtype(weight)
    current, keys, values = weight.to(dtype), keys.to(dtype), values.to(dtype)
    projected = keys.double() @ inverse
    gram = projected @ keys.double().T
    if mode == "joint":
        solved = torch.linalg.solve(gram + ridge * torch.eye(len(keys)), projected)
        return (current + (values - keys @ current.T).T @ solved.to(dtype)).to(weight.dtype)
    start = current
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        residual = value - (start if mode == "independent" else current) @ key
        current = current + torch.outer(residual, (projected[i] / gram[i, i]).to(dtype))
    return current.to(weight.dtype)


@functools.cache
def expected(mode: str, shape: tuple[int, int, int], condition: float, dtype: torch.dtype):
    """The write in fp64 by the oracle and by the eager formula, the same for every backend."""
    weight, keys, values, covariance = problem(*shape, condition)
    weight, ridge = weight.to(dtype), ridge_of(mode, shape)
    truth = oracle.write(
        mode, *(x.numpy() for x in (weight.double(), keys.float().double(), values, covariance)), ridge
    )
    inverse = torch.linalg.inv(covariance)
    eager = eager_write(mode, weight, keys.float(), values.to(compute_dtype(weight)), inverse, ridge)
    return truth, eager


def ridge_of(mode: str, shape: tuple[int, int, int]) -> float:
    return 0.5 if mode == "joint" and shape[2] == 1000 else 0.0


# -- low_rank_update -----------------------------------------------------------------------------------------

SHAPES = [(33, 65, 0), (33, 65, 1), (31, 97, 7), (33, 129, 64), (9, 1031, 1000)]


@pytest.mark.parametrize("condition", [10.0, 1e8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_write_against_dense_fp64(device, mode, shape, condition):
    for dtype in [torch.float32, torch.float64] if shape[2] == 1000 else DTYPES:
        weight, keys, values, covariance = problem(*shape, condition)
        truth, eager = expected(mode, shape, condition, dtype)
        whole = ek.Covariance.from_second_moment(covariance.to(device) * 10, 10)
        inverse = torch.linalg.inv(covariance).to(device)
        for given in ({"covariance": whole}, {"inverse_covariance": inverse}):
            got = ek.low_rank_update(
                weight.to(device, dtype),
                keys.float().to(device),
                values.to(device),
                mode=mode,
                ridge=ridge_of(mode, shape),
                **given,
            )
            assert got.dtype == dtype
            # The oracle is fp64 itself: its dense solves lose what the condition number says.
            oracle_error = torch.finfo(torch.float64).eps * condition * shape[1]
            own = max(rounding(compute_dtype(weight.to(dtype)), shape[1]), oracle_error)
            assert error(got, truth) <= max(2 * error(eager, truth), own)


@pytest.mark.parametrize("mode", MODES)
def test_batch_equals_one_by_one(device, mode):
    weight, keys, values = torch.randn(3, 17, 21), torch.randn(3, 5, 21), torch.randn(3, 5, 17)
    weight, keys, values = weight.to(device), keys.to(device), values.to(device)
    each = torch.stack([covariance_of(21, 50.0) for _ in range(3)]).to(device)
    for moment in (each, each[0]):
        got = ek.low_rank_update(weight, keys, values, ek.Covariance.from_second_moment(moment, 1), mode)
        for b in range(3):
            own = ek.Covariance.from_second_moment(moment[b] if moment.dim() == 3 else moment, 1)
            single = ek.low_rank_update(weight[b], keys[b], values[b], own, mode)
            torch.testing.assert_close(got[b], single, rtol=1e-5, atol=1e-5)
    inverses = torch.linalg.inv(each)
    got = ek.low_rank_update(weight, keys, values, inverse_covariance=inverses, mode=mode)
    truth = ek.low_rank_update(weight, keys, values, ek.Covariance.from_second_moment(each, 1), mode)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)


def test_sequential_equals_single_writes(device):
    weight, keys, values, covariance = (x.to(device) for x in problem(19, 33, 12))
    given = ek.Covariance.from_second_moment(covariance, 1)
    at_once = ek.low_rank_update(weight, keys, values, given, "sequential")
    for key, value in zip(keys, values, strict=True):
        weight = ek.low_rank_update(weight, key[None], value[None], given, "independent")
    assert error(at_once, weight) < 1e-13


def test_joint_without_ridge_meets_every_constraint():
    weight, keys, values, covariance = problem(19, 33, 12, 1e6)
    edited = ek.low_rank_update(weight, keys, values, ek.Covariance.from_second_moment(covariance, 1))
    assert error(keys @ edited.T, values) < torch.finfo(torch.float64).eps * 1e6


@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize("mode", MODES)
def test_a_given_residual_is_the_same_write_and_reads_no_weight(mode, count):
    """More keys than columns too, in fp64, and the weight is NaN."""
    weight, keys, values = (
        torch.randn(2, 5, 12).double(),
        *(torch.randn(2, count, w).double() for w in (12, 5)),
    )
    inverse, ridge = torch.linalg.inv(covariance_of(12, 10.0)), 0.3 if mode == "joint" else 0.0
    rows = slice(None) if mode == "joint" or count < 12 else slice(0, 11)
    keys, values = keys[:, rows], values[:, rows]
    residual = values - keys @ weight.mT
    options = dict(mode=mode, ridge=ridge, inverse_covariance=inverse)
    expected = ek.low_rank_factors(weight, keys, values, **options)
    got = ek.low_rank_factors(torch.full_like(weight, torch.nan), keys, residual=residual, **options)
    for mine, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, truth)
    for bad in (dict(), dict(values=values, residual=residual)):
        with pytest.raises(
            ValueError, match=r"values: expected either them or a residual, got (neither|both)"
        ):
            ek.low_rank_factors(weight, keys, **bad, **options)
    with pytest.raises(ValueError, match=r"residual: expected shape .* got"):
        ek.low_rank_factors(weight, keys, residual=residual[:, 1:], **options)


def test_alpha_is_the_strength_of_the_write():
    weight, keys, values, covariance = problem(5, 9, 3)
    given = ek.Covariance.from_second_moment(covariance, 1)
    half = ek.low_rank_update(weight, keys, values, given, alpha=0.5)
    full = ek.low_rank_update(weight, keys, values, given)
    assert torch.equal(ek.low_rank_update(weight, keys, values, given, alpha=0.0), weight)
    torch.testing.assert_close(half, (weight + full) / 2)


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode):
    """Every gradient against finite differences in fp64, batched, for a factor and for an inverse."""
    weight = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    covariance = covariance_of(6, 10.0)
    ridge = 0.3 if mode == "joint" else 0.0
    whole, inverse = ek.Covariance.from_second_moment(covariance, 1), torch.linalg.inv(covariance)
    for given in ({"covariance": whole}, {"inverse_covariance": inverse}):

        def function(w, k, v, given=given):
            return ek.low_rank_update(w, k, v, mode=mode, ridge=ridge, alpha=0.7, **given)

        assert torch.autograd.gradcheck(function, (weight, keys, values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_low_precision_weights(device, dtype):
    """The gradients of half-precision weights against fp64's, at the error of eager's fp32 formula."""
    weight, keys, values, covariance = problem(17, 33, 4)
    inverse, direction = torch.linalg.inv(covariance), torch.randn(17, 33, dtype=torch.float64)
    weight = weight.to(dtype).double()
    direction = direction.to(dtype).double()

    def gradients(function, types):
        leaves = [
            x.detach().clone().to(t).requires_grad_()
            for x, t in zip((weight, keys, values), types, strict=True)
        ]
        function(*leaves).backward(direction.to(types[0]))
        return [leaf.grad for leaf in leaves]

    def eager(w, k, v):
        projected = k @ inverse.to(k.dtype)
        solved = torch.linalg.solve(projected @ k.T, projected)
        return (w.to(k.dtype) + (v - k @ w.to(k.dtype).T).T @ solved).to(w.dtype)

    truth = gradients(eager, (torch.float64,) * 3)
    types = (dtype, torch.float32, torch.float32)
    same_type = gradients(eager, types)
    leaves = [
        x.detach().to(device, t).requires_grad_() for x, t in zip((weight, keys, values), types, strict=True)
    ]
    ek.low_rank_update(*leaves, inverse_covariance=inverse.to(device)).backward(direction.to(device, dtype))
    for leaf, reference, exact in zip(leaves, same_type, truth, strict=True):
        own = rounding(leaf.dtype, weight.shape[1])
        assert error(leaf.grad, exact) <= max(2 * error(reference, exact), own)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_whole_with_dynamic_count(device, mode):
    covariance = ek.Covariance.from_second_moment(covariance_of(9, 10.0).to(device), 1)
    compiled = torch.compile(
        lambda w, k, v: ek.low_rank_update(w, k, v, covariance, mode),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for count in (2, 3, 5):
        weight = torch.randn(7, 9, device=device, requires_grad=True)
        keys, values = torch.randn(count, 9, device=device), torch.randn(count, 7, device=device)
        got = compiled(weight, keys, values)
        torch.testing.assert_close(got, ek.low_rank_update(weight, keys, values, covariance, mode))
        (gradient,) = torch.autograd.grad(got.sum(), weight)
        (expected,) = torch.autograd.grad(
            ek.low_rank_update(weight, keys, values, covariance, mode).sum(), weight
        )
        torch.testing.assert_close(gradient, expected)


def test_autocast_changes_nothing():
    weight, keys, values, covariance = (x.float() for x in problem(33, 65, 7))
    inverse = torch.linalg.inv(covariance)
    plain = ek.low_rank_update(weight, keys, values, inverse_covariance=inverse)
    with torch.autocast("cpu", torch.bfloat16):
        again = ek.low_rank_update(weight, keys, values, inverse_covariance=inverse)
        assert torch.equal(again, plain)


# -- the operators -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 33, 71, 5), (3, 64, 128, 16), (2, 7, 300, 40), (1, 5, 9, 100)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_low_rank(device, dtype, shape, layout):
    batch, rows, cols, count = shape
    start = torch.randn(batch, rows, cols).to(dtype)
    compute = compute_dtype(start)
    left, right = (
        torch.randn(batch, rows, count, dtype=compute),
        torch.randn(batch, count, cols, dtype=compute),
    )
    truth = wide(start) + np.longdouble(0.7) * (wide(left) @ wide(right))
    eager = (start.to(compute) + 0.7 * (left @ right)).to(dtype)
    weight = LAYOUTS[layout](start.to(device))
    assert torch.equal(weight.cpu(), start)
    around = weight.untyped_storage().nbytes()
    got = ek.apply_low_rank_(weight, left.to(device), right.to(device), 0.7)
    assert got is weight and weight.untyped_storage().nbytes() == around
    assert error(weight, truth) <= max(2 * error(eager, truth), rounding(compute, count))
    check_rounded_once(weight, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_apply_low_rank_rounds_to_the_nearest_and_ties_to_even(device, dtype):
    """From every value of a 16-bit type a quarter, a half and three quarters of the way to the next one."""
    mantissas = {torch.bfloat16: 128, torch.float16: 1024}[dtype]
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(-1, mantissas)  # a row an exponent
    values = bits.view(dtype)
    gaps = values[:, 1].double() - values[:, 0].double()
    normal = gaps.isfinite() & (gaps.abs() >= 4 * torch.finfo(torch.float32).tiny)
    values, gaps = values[normal], gaps[normal, None]
    ones = torch.ones(1, mantissas)
    for way in (0.0, 0.25, 0.5, 0.75):
        weight = values.to(device, copy=True)
        ek.apply_low_rank_(weight, (way * gaps).float().to(device), ones.to(device))
        assert torch.equal(weight.cpu(), (values.double() + way * gaps).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apply_low_rank_sees_every_entry_that_is_not_finite(device, dtype):
    """Wherever it stands; numbers whose sum overflows are none."""
    weight = torch.zeros(5, 37, dtype=dtype, device=device)
    left, right = weight.new_ones(5, 3), weight.new_ones(3, 37)
    for name, factor in (("left", left), ("right", right)):
        entries = factor.view(-1)
        for i in range(entries.numel()):
            entries[i] = (math.nan, math.inf, -math.inf)[i % 3]
            with pytest.raises(ValueError, match=f"^{name}: expected finite values, got 1 NaN or infinite"):
                ek.apply_low_rank_(weight, left, right)
            with ek.checks("async"):
                ek.apply_low_rank_(weight, left, right)
                with pytest.raises(ek.EngramError, match="expected finite factors"):
                    ek.synchronize_checks()
            entries[i] = 1
    assert not weight.any()
    large = torch.finfo(dtype).max / 4
    ek.apply_low_rank_(weight, left.fill_(large), right.fill_(2.0**-9))
    torch.testing.assert_close(weight, torch.full_like(weight, 3 * 2.0**-9 * large))


def test_apply_low_rank_leaves_the_rest_of_the_storage(device):
    storage = torch.randn(40, 100, device=device)
    before = storage.clone()
    ek.apply_low_rank_(
        storage[3:20, 10:75], torch.randn(17, 4, device=device), torch.randn(4, 65, device=device)
    )
    inside = torch.zeros_like(storage, dtype=torch.bool)
    inside[3:20, 10:75] = True
    assert torch.equal(storage[~inside], before[~inside])
    assert (storage[inside] != before[inside]).all()


def test_addresses_beyond_32_bits(device):
    """Rows 2³⁰ elements apart: four of them reach past 2³¹, in memory that is reserved and not touched."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free device memory, which is not reserved lazily")
    columns = 5
    storage = torch.empty(3 * 2**30 + columns, dtype=torch.bfloat16, device=device)
    weight = storage.as_strided((4, columns), (2**30, 1))
    start = torch.randn(4, columns, device=device).bfloat16()
    weight.copy_(start)
    left, right = torch.randn(4, 2, device=device), torch.randn(2, columns, device=device)
    keys, values = torch.randn(1, 2, columns, device=device), torch.randn(1, 2, 4, device=device)
    far, near = (ops.residual_gram(w[None], keys, values, keys.double()) for w in (weight, start))
    assert torch.equal(far[0], near[0])
    ek.apply_low_rank_(weight, left, right)
    assert torch.equal(weight, ek.apply_low_rank_(start.clone(), left, right))


@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0)], ids=str)
def test_empty(device, shape):
    batch, rows, cols, count = shape
    weight = torch.randn(batch, rows, cols, device=device)
    before = weight.clone()
    left, right = (
        torch.randn(batch, rows, count, device=device),
        torch.randn(batch, count, cols, device=device),
    )
    assert torch.equal(ek.apply_low_rank_(weight, left, right), before)
    keys = torch.randn(batch, count, cols, device=device)
    values = torch.randn(batch, count, rows, device=device)
    if cols:
        identity = torch.eye(cols, device=device)
        for mode in MODES:
            got = ek.low_rank_update(
                weight, keys[:, :1], values[:, :1], mode=mode, inverse_covariance=identity
            )
            assert got.shape == weight.shape


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 5, 33), (1, 16, 64), (2, 17, 136), (1, 64, 80), (1, 70, 45)]
)
def test_precondition(device, shape, poisoned):
    """K C⁻¹ of an fp32 inverse, of one for each matrix and of one for all, with fp64's digits."""
    batch, count, width = shape
    keys, inverses = torch.randn(batch, count, width), torch.randn(batch, width, width)
    for inverse in (inverses, inverses[0]):
        got = precondition(keys.to(device), inverse.to(device))
        exact, eager = wide(keys) @ wide(inverse), keys.double() @ inverse.double()
        assert got.dtype == torch.float64 and got.shape == keys.shape
        assert error(got, exact) <= max(2 * error(eager, exact), rounding(torch.float64, width))


def test_gradients_of_precondition():
    keys = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    inverse = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    function = lambda keys, inverse: apply(Precondition, keys, inverse)  # noqa: E731
    assert torch.autograd.gradcheck(function, (keys, inverse))
    mapped = torch.func.vmap(function, (0, None))(torch.stack([keys, 2 * keys]), inverse)
    torch.testing.assert_close(mapped, torch.stack([keys @ inverse, 2 * keys @ inverse]))


def check_residual_gram(device, dtype, shape, layout="contiguous"):
    batch, rows, cols, count = shape
    start = torch.randn(batch, rows, cols).to(dtype)
    weight = LAYOUTS[layout](start.to(device))
    compute = compute_dtype(start)
    keys = torch.randn(batch, count, cols, dtype=compute)
    values = torch.randn(batch, count, rows, dtype=compute)
    preconditioned = keys.double() * torch.rand(cols, dtype=torch.float64) + keys.double()
    residual, gram = ops.residual_gram(weight, keys.to(device), values.to(device), preconditioned.to(device))
    exact = wide(values) - wide(keys) @ wide(start).swapaxes(1, 2)
    eager = values - keys @ start.to(compute).mT
    assert residual.dtype == compute and gram.dtype == torch.float64
    assert error(residual, exact) <= max(2 * error(eager, exact), rounding(compute, cols))
    exact = wide(keys) @ wide(preconditioned).swapaxes(1, 2)
    eager = keys.double() @ preconditioned.mT
    assert error(gram, exact) <= max(2 * error(eager, exact), rounding(torch.float64, cols))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (1, 33, 71, 5),
        (3, 64, 256, 16),
        (1, 65, 2049, 33),
        (1, 5, 9, 100),
        (1, 6, 2064, 9),  # several vectors of every lane, and some left over
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_residual_gram(device, poisoned, dtype, shape, layout):
    check_residual_gram(device, dtype, shape, layout)


@pytest.mark.parametrize("shape", [(300, 1, 24, 2), (130, 33, 8, 1), (43, 33, 8, 9), (40, 20, 8, 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_gram_of_many_matrices(device, poisoned, dtype, shape):
    """One, two and four warps share the columns of a row where there are more rows or matrices."""
    check_residual_gram(device, dtype, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [1, 9, 17, 25])
def test_every_remainder_of_a_tile(device, poisoned, start, dtype):
    for n in range(start, start + 8):
        rows, cols, count = n + 32 * (n % 2), 4 * n + n % 3, 1 + (n * 5) % 32
        check_residual_gram(device, dtype, (1, rows, cols, count))
        weight = torch.randn(rows, cols).to(dtype)
        left, right = torch.randn(rows, count), torch.randn(count, cols)
        truth = wide(weight) + wide(left) @ wide(right)
        eager = (weight.float() + left @ right).to(dtype)
        got = ek.apply_low_rank_(weight.to(device, copy=True), left.to(device), right.to(device))
        assert error(got, truth) <= max(2 * error(eager, truth), rounding(torch.float32, count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 7, 5), (2, 64, 33), (1, 128, 9), (1, 130, 9), (4, 5, 0), (2, 0, 3)], ids=str
)
@pytest.mark.parametrize("kind", ["cholesky", "unit_lower", "unit_upper"])
def test_small_solve(device, poisoned, kind, shape, dtype):
    batch, count, columns = shape
    system = torch.randn(batch, count, count, dtype=torch.float64)
    if kind == "cholesky":
        system = system @ system.mT + torch.eye(count, dtype=torch.float64)
        dense = system
    else:
        system = system / max(1, count) ** 0.5
        triangle = system.tril(-1) if kind == "unit_lower" else system.triu(1)
        dense = triangle + torch.eye(count, dtype=torch.float64)
    right = torch.randn(batch, count, columns, dtype=dtype)
    solution, info = ops.small_solve(system.to(device), right.to(device), kind)
    truth = torch.linalg.solve(dense, right.double())
    eager = torch.linalg.solve(dense.to(dtype), right)
    assert info.tolist() == [0] * batch
    assert error(solution, truth) <= max(2 * error(eager, truth), 1e-12)


def test_a_pivot_lost_to_rounding_is_none(device):
    nearly = torch.tensor([[[1.0, 1.0], [1.0, 1.0 + 2**-52]]], dtype=torch.float64, device=device)
    with pytest.raises(ek.EngramError, match="key 1 dependent"):
        ops.small_solve(nearly, torch.ones(1, 2, 1, device=device), "cholesky")

    for dtype in (torch.float32, torch.float64):
        negative = -torch.eye(40, dtype=torch.float64, device=device)[None]
        with pytest.raises(ek.EngramError):
            ops.small_solve(negative, torch.ones(1, 40, 1, dtype=dtype, device=device), "cholesky")


def test_in_place_bumps_the_version():
    weight = torch.randn(3, 4)
    version = weight._version
    ek.apply_low_rank_(weight, torch.randn(3, 1), torch.randn(1, 4))
    assert weight._version > version
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    ek.apply_low_rank_(parameter, torch.randn(3, 1), torch.randn(1, 4))
    assert parameter.requires_grad and parameter.grad_fn is None


# -- second_moment_ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulator", [torch.float32, torch.float64])
def test_second_moment(device, accumulator, dtype):
    inputs = torch.randn(3, 50, 17).to(dtype)
    mask = torch.rand(3, 50) < 0.5
    moment = torch.full((17, 17), 2.0, dtype=accumulator, device=device)
    got = ek.second_moment_(moment, inputs.to(device), mask.to(device))
    ek.second_moment_(moment, inputs.to(device))
    rows = torch.cat([inputs[mask], inputs.reshape(-1, 17)])
    truth = 2.0 + wide(rows).T @ wide(rows)
    eager = 2.0 + rows.to(accumulator).T @ rows.to(accumulator)
    assert got is moment
    assert error(moment, truth) <= max(2 * error(eager, truth), rounding(accumulator, len(rows)))


def test_second_moment_of_many_rows_and_of_none(device):
    inputs = torch.randn(20000, 3, dtype=torch.float64, device=device)
    moment = torch.zeros(3, 3, dtype=torch.float64, device=device)
    ek.second_moment_(moment, inputs)
    assert error(moment, inputs.T @ inputs) < 1e-13
    before = moment.clone()
    ek.second_moment_(moment, inputs[:0])
    ek.second_moment_(moment, inputs, torch.zeros(20000, dtype=torch.bool, device=device))
    assert torch.equal(moment, before)


# -- more keys than inputs -----------------------------------------------------------------------------------


def many_keys(count: int, condition: float, width: int = 129, rows: int = 40, drawn: bool = True):
    """fp64 (weight, keys, values, covariance) of values that fp32 holds; keys of the covariance, or any."""
    covariance = covariance_of(width, condition)
    keys = torch.randn(count, width, dtype=torch.float64)
    if drawn:
        keys = keys @ torch.linalg.cholesky(covariance).T
    weight, values = torch.randn(rows, width), torch.randn(count, rows)
    return weight.double(), keys.float().double(), values.double(), covariance


def ridge_write(weight, keys, values, covariance, ridge):
    """W + Eᵀ K (λC + KᵀK)⁻¹ in fp64, through C: by another route than the package's."""
    system = ridge * covariance + keys.T @ keys
    return weight + torch.linalg.solve(system, keys.T @ (values - keys @ weight.T)).T


@pytest.mark.parametrize("drawn", [True, False], ids=["keys of the covariance", "any keys"])
@pytest.mark.parametrize("count", [100, 129, 200, 400])
@pytest.mark.parametrize(("condition", "ridge"), [(1e3, 0.3), (1e3, 1e-3), (1e6, 0.3)])
def test_joint_writes_of_many_keys(device, count, condition, ridge, drawn):
    """What is left and right of ΔW alone would be off by up to 1 where n nears in."""
    *given, covariance = many_keys(count, condition, drawn=drawn)
    weight = given[0]
    change = ridge_write(*given, covariance, ridge) - weight
    whole = ek.Covariance.from_second_moment(covariance.to(device), 1)
    single = [x.float().to(device) for x in given]
    left, right = ek.low_rank_factors(*single, whole, ridge=ridge)
    assert left.dtype == right.dtype == torch.float32
    assert left.shape == (40, count) and right.shape == (count, 129)
    assert error(left.cpu().double() @ right.cpu().double(), change) <= 1e-5
    inverse = torch.linalg.inv(covariance).to(device)
    got = ek.low_rank_update(*single, ridge=ridge, inverse_covariance=inverse)
    assert error(got.cpu().double() - weight, change) <= 1e-5
    double = ek.low_rank_update(*(x.to(device) for x in given), whole, ridge=ridge)
    # In fp64 the oracle's own system says how many digits it has.
    system = ridge * covariance + given[1].T @ given[1]
    own = torch.finfo(torch.float64).eps * float(torch.linalg.cond(system))
    assert error(double.cpu() - weight, change) <= max(own, 1e-13 * condition)


def test_joint_writes_of_many_keys_are_batched():
    problems = [many_keys(30, 100.0, width=21, rows=5) for _ in range(3)]
    given = [torch.stack(parts).float() for parts in zip(*problems, strict=True)]
    each = ek.Covariance.from_second_moment(given.pop().double(), 1)
    got = ek.low_rank_update(*given, each, ridge=0.3)
    shared = ek.low_rank_update(*given, ridge=0.3, inverse_covariance=each.inverse()[0])
    for b, problem in enumerate(problems):
        assert error(got[b], ridge_write(*problem, 0.3)) <= 1e-5
        assert error(shared[b], ridge_write(*problem[:3], problems[0][3], 0.3)) <= 1e-5


def test_joint_writes_of_many_keys_through_a_projection():
    """What stands in the place of C⁻¹ may be singular: AlphaEdit's projection onto a null space."""
    weight, keys, values, _ = many_keys(30, 10.0, width=21, rows=5)
    basis = torch.linalg.qr(torch.randn(21, 8, dtype=torch.float64)).Q
    projection = basis @ basis.T
    change = torch.linalg.solve(keys @ projection @ keys.T + 0.5 * torch.eye(30), keys @ projection).T @ (
        values - keys @ weight.T
    )
    got = ek.low_rank_update(weight, keys, values, ridge=0.5, inverse_covariance=projection)
    assert error(got - weight, change.T) <= 1e-11


@pytest.mark.parametrize("count", [4, 6, 9])
def test_gradients_of_joint_writes_of_many_keys(count):
    covariance = covariance_of(6, 10.0)
    shapes = (4, 6), (count, 6), (count, 4)
    given = [torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    inverse = torch.linalg.inv(covariance)
    for function in (ek.low_rank_update, ek.low_rank_factors):
        assert torch.autograd.gradcheck(
            lambda *x, function=function: function(*x, ridge=0.3, inverse_covariance=inverse), given
        )


MANY = {
    "zero key": (
        {"keys": lambda k: k * (torch.arange(30) != 4)[:, None]},
        ValueError,
        "keys: expected no zero",
    ),
    "NaN key": ({"keys": lambda k: k / 0}, ValueError, "keys: expected finite"),
    "NaN value": ({"values": lambda v: v / 0}, ValueError, "values: expected finite"),
    "NaN weight": ({"weight": lambda w: w * float("nan")}, ValueError, "weight: expected finite"),
    "NaN inverse": (
        {"inverse_covariance": lambda c: c * float("nan")},
        ValueError,
        "inverse_covariance: expected finite",
    ),
    "indefinite inverse": (
        {"inverse_covariance": lambda c: -c},
        ek.EngramError,
        "inverse_covariance: expected a positive definite matrix",
    ),
    "a factor given as an inverse": (
        {"inverse_covariance": lambda c: torch.linalg.cholesky(covariance_of(21, 10.0))},
        ValueError,
        "inverse_covariance: expected a symmetric matrix",
    ),
    "a ridge lost to rounding": (
        {"keys": lambda k: k[:1].expand(30, 21), "ridge": 1e-30},
        ek.EngramError,
        "ridge: expected one that rounding leaves",
    ),
}


@pytest.mark.parametrize("case", MANY)
def test_bad_joint_writes_of_many_keys(case):
    change, kind, message = MANY[case]
    weight, keys, values, covariance = many_keys(30, 10.0, width=21, rows=5)
    inverse = torch.linalg.inv(covariance)
    given = {"weight": weight, "keys": keys, "values": values, "inverse_covariance": inverse, "ridge": 0.3}
    for name, value in change.items():
        given[name] = value(given[name]) if callable(value) else value
    with pytest.raises(kind, match=message) as caught:
        ek.low_rank_update(**given)
    assert "\n" not in str(caught.value)


# -- errors speak the caller's shapes ------------------------------------------------------------------------


def test_an_error_names_the_shapes_that_were_given():
    weight, left, right = torch.zeros(576, 1536), torch.zeros(8, 1536), torch.zeros(8, 1536)
    with pytest.raises(
        ValueError, match=r"^left: expected shape \[576, 1536\] \(\[out, n\]\), got \[8, 1536\]$"
    ):
        ek.apply_low_rank_(weight, left, right)
    with pytest.raises(ValueError, match=r"^left: expected shape \[B, out, n\], got \[576, 8\]$"):
        ek.apply_low_rank_(weight[None], torch.zeros(576, 8), right[None])
    with pytest.raises(ValueError, match=r"^right: expected shape \[8, 1536\] \(\[n, in\]\), got \[8, 5\]$"):
        ek.apply_low_rank_(weight, torch.zeros(576, 8), torch.zeros(8, 5))


def test_an_operator_that_is_called_directly_checks_too():
    weight, left, right = torch.zeros(1, 3, 4), torch.zeros(1, 3, 2), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match=r"weight: expected shape \[B, out, in\], got \[3, 4\]"):
        ops.low_rank_update(weight[0], left[0], right[0], 1.0)
    with pytest.raises(ValueError, match=r"right: expected shape \[1, 2, 4\]"):
        ops.apply_low_rank_(weight, left, right[..., :3], 1.0)
    with pytest.raises(TypeError, match="left: expected a tensor of float32, got float64"):
        ops.apply_low_rank_(weight, left.double(), right, 1.0)
    ek.apply_low_rank_(weight, left, right)
    with pytest.raises(ValueError, match="right: expected shape"):  # a checked call leaves no mark
        ops.apply_low_rank_(weight, left, right[..., :3], 1.0)
