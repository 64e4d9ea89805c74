"""The operator of all closed-form editors: its algebra against dense fp64, its files, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from accuracy import error, wide
from matrices import covariance_of

import engram_kernels as ek
from engram_kernels._io import load_sealed_tensors, save_sealed_tensors

WIDTH, OUT = 40, 12


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def make(condition=1e3, width=WIDTH):
    """C, and the covariance that holds it."""
    covariance = covariance_of(width, condition)
    return covariance, ek.Covariance.from_second_moment(covariance, 1)


def projection(width=WIDTH, rank=25):
    basis, _ = torch.linalg.qr(draw(width, width))
    return basis[:, :rank] @ basis[:, :rank].T


def solve(system, right):
    """Elimination in extended precision: what is left of Q may be a billionth of it."""
    count, rows = len(system), np.concatenate([wide(system), wide(right)], axis=1)
    for i in range(count):
        pivot = i + np.abs(rows[i:, i]).argmax()
        rows[[i, pivot]] = rows[[pivot, i]]
        rows[i] /= rows[i, i]
        others = np.arange(count) != i
        rows[others] -= rows[others, i : i + 1] * rows[i]
    return torch.from_numpy(rows[:, count:].astype(np.float64))


def preserved(dense, keys, weight):
    """(Q⁻¹ + w KᵀK)⁻¹ without Q⁻¹, which a projection has not."""
    dense, keys = wide(dense), wide(keys)
    return solve(np.eye(len(dense)) + weight * dense @ keys.T @ keys, dense)


def operators():
    """By name, operators of every kind and their dense Q."""
    covariance, given = make()
    eye = torch.eye(WIDTH, dtype=torch.float64)
    null = projection()
    return {
        "covariance": (ek.Preconditioner.from_covariance(given), torch.linalg.inv(covariance)),
        "weighted": (
            ek.Preconditioner.from_covariance(given, weight=7.0, identity=0.3),
            torch.linalg.inv(7.0 * covariance + 0.3 * eye),
        ),
        "identity": (ek.Preconditioner.from_identity(WIDTH, 0.25), 0.25 * eye),
        "no statistics": (ek.Preconditioner.from_covariance(given, weight=0.0, identity=4.0), 0.25 * eye),
        "projection": (ek.Preconditioner.from_matrix(null), null),
    }


KINDS = ("covariance", "weighted", "identity", "no statistics", "projection")


@pytest.mark.parametrize("kind", KINDS)
def test_apply_and_matrix(kind):
    operator, dense = operators()[kind]
    keys = draw(9, WIDTH)
    assert error(operator.matrix(), dense) < 1e-12
    assert error(operator.apply(keys), keys @ dense) < 1e-12
    assert operator.apply(keys.bfloat16()).dtype == torch.bfloat16
    assert operator.dim == WIDTH and operator.apply(keys[:0]).shape == (0, WIDTH)


def test_the_inverse_covariance_is_shared():
    _, given = make()
    operator = ek.Preconditioner.from_covariance(given).preserve(draw(3, WIDTH))
    assert operator._q.base is given.inverse()


@pytest.mark.parametrize("count", [1, 7, 19, 20, 39, 40, 90])
@pytest.mark.parametrize("weight", [0.01, 1.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_preserve(kind, count, weight):
    operator, _ = operators()[kind]
    dense, keys = operator.matrix(), draw(count, WIDTH)
    expected = preserved(dense, keys, weight)
    found = operator.preserve(keys, weight)
    # What Q itself is known to, beside which little of it may be left. Processors sum in other orders: of two
    # the one came to 2.1e-11 where the other stayed below 2e-11, and to 4.5 eps of the norms' ratio.
    own = 8 * torch.finfo(torch.float64).eps * float(dense.norm() / expected.norm())
    assert error(found.matrix(), expected) < max(4e-11, own)
    probe = draw(5, WIDTH)
    assert error(found.apply(probe), probe @ expected) < max(4e-11, 4 * own)
    assert torch.equal(operator.matrix(), dense)


@pytest.mark.parametrize("sizes", [(3, 4, 5), (15, 15, 15), (50, 3), (3, 50)])
@pytest.mark.parametrize("kind", KINDS)
def test_preserve_in_parts_is_preserve_at_once(kind, sizes):
    operator, _ = operators()[kind]
    keys = draw(sum(sizes), WIDTH)
    found = operator
    for part in keys.split(sizes):
        found = found.preserve(part, 2.0)
    assert error(found.matrix(), preserved(operator.matrix(), keys, 2.0)) < 2e-11


@pytest.mark.parametrize("count", [1, 7, 24, 30, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_weight_is_the_limit(kind, count):
    """On the directions that are left Q⁻¹ is as it was: N (Nᵀ Q⁻¹ N)⁻¹ Nᵀ with N the keys' null space."""
    operator, dense = operators()[kind]
    basis, _ = torch.linalg.qr(draw(WIDTH, WIDTH))
    keys = (
        draw(count, 24) @ basis[:, :24].T
    )  # what is left is known: 16 directions, or those beyond the count
    rank = min(count, 24)
    _, _, rows = torch.linalg.svd(keys)
    root = torch.linalg.eigh(dense)
    root = root.eigenvectors * root.eigenvalues.clamp_min(0).sqrt()
    values, vectors = torch.linalg.eigh(root.T @ rows[:rank].T @ rows[:rank] @ root)
    left = root @ vectors[:, values < 1e-9]
    found = operator.preserve(keys, math.inf)
    assert error(found.matrix(), left @ left.T) < 2e-11
    assert (found.apply(keys)).norm() <= 1e-12 * operator.apply(keys).norm()
    again = found.preserve(keys, math.inf)
    assert error(again.matrix(), left @ left.T) < 2e-11


def test_keys_that_are_held_already_take_nothing_more():
    """Their answers are rounding: taken for directions, they would take all the rest."""
    operator, _ = operators()["covariance"]
    keys = draw(5, WIDTH)
    held = operator.preserve(keys, math.inf)
    for _ in range(5):
        held = held.preserve(keys + 0.0, math.inf)
    assert error(held.matrix(), operator.preserve(keys, math.inf).matrix()) < 1e-12


def test_a_projection_stays_one():
    """Batch after batch, as EvoEdit has it: idempotent, and of the rank that is left."""
    operator = ek.Preconditioner.from_matrix(projection(200, 150))
    for _ in range(14):
        operator = operator.preserve(draw(10, 200), math.inf)
    found = operator.matrix()
    assert error(found @ found, found) < 1e-12
    assert abs(float(found.trace()) - 10) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_release_takes_preserve_back(kind):
    operator, _ = operators()[kind]
    keys = draw(6, WIDTH)
    keys /= operator.apply(keys).mul(keys).sum(-1, keepdim=True).sqrt()  # of energy one in the metric of Q
    later = operator.preserve(keys, 3.0)
    assert error(later.release(keys, 3.0).matrix(), operator.matrix()) < 2e-11
    some = later.release(keys[1:3], 3.0)
    assert error(some.matrix(), operator.preserve(keys[[0, 3, 4, 5]], 3.0).matrix()) < 2e-11
    firm = operator.preserve(keys[:1], 9000.0)  # just above a share of 1e-4
    assert error(firm.release(keys[:1], 9000.0).matrix(), operator.matrix()) < 1e-8


def test_release_of_what_was_not_preserved_is_refused():
    operator, _ = operators()["covariance"]
    keys = draw(4, WIDTH)
    for sound, weight in (
        (operator, 1.0),
        (operator.preserve(keys, 1.0), 2.0),
        (operator.preserve(keys, 1e14), 1e14),
    ):
        with pytest.raises(ek.EngramError, match=r"^keys: expected ones that were preserved with the weight"):
            sound.release(keys, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_within_some_neurons(kind):
    operator, dense = operators()[kind]
    neurons = torch.tensor([3, 4, 9, 21, 30, 31])
    root = torch.linalg.eigh(dense)
    root = root.eigenvectors * root.eigenvalues.clamp_min(0).sqrt()
    others = [i for i in range(WIDTH) if i not in neurons.tolist()]
    values, vectors = torch.linalg.eigh(root[others].T @ root[others])
    left = root @ vectors[:, values < 1e-9]
    found = operator.within(neurons)
    assert error(found.matrix() + torch.eye(WIDTH), left @ left.T + torch.eye(WIDTH)) < 2e-11
    if kind != "projection":
        inverse = torch.linalg.inv(dense)[neurons][:, neurons]
        assert error(found.matrix()[neurons][:, neurons], torch.linalg.inv(inverse)) < 2e-11
    assert not found.apply(draw(5, WIDTH))[:, others].any()
    mask = torch.zeros(WIDTH, dtype=torch.bool)
    mask[neurons] = True
    assert torch.equal(operator.within(mask).matrix(), found.matrix())


def expected_write(dense, keys, residual, ridge):
    """Eᵀ K (λQ⁻¹ + KᵀK)⁻¹ without an inverse of Q: the in × in form of all these methods."""
    eye = torch.eye(len(dense), dtype=torch.float64)
    return torch.linalg.solve(ridge * eye + dense @ keys.T @ keys, dense @ keys.T @ residual).T


@pytest.mark.parametrize("count", [1, 7, 19, 20, 39, 40, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_factors(kind, count):
    operator, dense = operators()[kind]
    weight, keys, residual = draw(OUT, WIDTH), draw(count, WIDTH), draw(count, OUT)
    expected = expected_write(dense, keys, residual, 0.7)
    left, right = operator.factors(weight, keys, residual=residual, ridge=0.7)
    assert left.shape == (OUT, count) and right.shape == (count, WIDTH)
    assert error(left @ right, expected) < 2e-11
    values = keys @ weight.T + residual
    left, right = operator.with_ridge(0.7).factors(weight, keys, values=values)
    assert error(left @ right, expected) < 2e-11


def test_factors_without_a_ridge_meet_every_constraint():
    for kind in KINDS:
        operator, _ = operators()[kind]
        weight, keys, residual = draw(OUT, WIDTH), draw(6, WIDTH), draw(6, OUT)
        left, right = operator.factors(weight, keys, residual=residual)
        assert error(keys @ (left @ right).T, residual) < 2e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [100, 200])
def test_single_precision_keeps_its_digits(dtype, count):
    """n near in, where the factors of the n × n form alone would be off by a hundredth."""
    covariance, given = make(1e3, 129)
    keys, residual = torch.randn(count, 129), torch.randn(count, OUT)
    operator = ek.Preconditioner.from_covariance(given, ridge=0.3)
    left, right = operator.factors(torch.empty(OUT, 129, dtype=dtype), keys, residual=residual)
    assert left.dtype == right.dtype == torch.float32
    expected = expected_write(torch.linalg.inv(covariance), keys.double(), residual.double(), 0.3)
    assert error(left.double() @ right.double(), expected) <= 1e-5


def test_a_given_residual_reads_no_weight(device):
    _, given = make()
    operator = ek.Preconditioner.from_covariance(given, ridge=1.0).to(device)
    weight = torch.full((OUT, WIDTH), math.nan, device=device)
    for count in (5, 30, 60):
        keys, residual = torch.randn(count, WIDTH, device=device), torch.randn(count, OUT, device=device)
        left, right = operator.factors(weight, keys, residual=residual)
        assert left.isfinite().all() and right.isfinite().all()


def test_suppressed_directions():
    operator, dense = operators()["covariance"]
    directions = torch.linalg.qr(draw(WIDTH, 4)).Q.T
    weight, keys, residual = draw(OUT, WIDTH), draw(6, WIDTH), draw(6, OUT)
    left, right = operator.suppress(directions, 0.4).factors(weight, keys, residual=residual, ridge=0.2)
    behind = torch.eye(WIDTH, dtype=torch.float64) - 0.4 * directions.T @ directions
    assert error(left @ right, expected_write(dense, keys, residual, 0.2) @ behind) < 2e-11


def test_twenty_thousand_keys():
    """By far more keys than dimensions: as exact, and without a matrix of n × n."""
    covariance, given = make(1e3, 64)
    keys, residual = torch.randn(20_000, 64), torch.randn(20_000, OUT)
    operator = ek.Preconditioner.from_covariance(given, ridge=20.0)
    left, right = operator.factors(torch.empty(OUT, 64), keys, residual=residual)
    expected = expected_write(torch.linalg.inv(covariance), keys.double(), residual.double(), 20.0)
    assert error(left.double() @ right.double(), expected) <= 1e-5
    later = torch.linalg.inv(covariance + keys.double().T @ keys.double())
    assert error(operator.preserve(keys).matrix(), later) < 2e-11


@pytest.mark.parametrize("kind", KINDS)
def test_files_keep_every_bit(kind, tmp_path):
    operator, _ = operators()[kind]
    operator = operator.preserve(draw(4, WIDTH)).with_ridge(0.1)
    for number, each in enumerate(
        (operator, operator.within(torch.arange(30)), operator.suppress(torch.eye(WIDTH)[:2], 0.5))
    ):
        each.save_pretrained(tmp_path / f"{number}")
        found = ek.Preconditioner.from_pretrained(tmp_path / f"{number}")
        assert torch.equal(found.matrix(), each.matrix()) and repr(found) == repr(each)
        given = draw(OUT, WIDTH), draw(5, WIDTH)
        residual = draw(5, OUT)
        for one, other in zip(
            found.factors(*given, residual=residual), each.factors(*given, residual=residual), strict=True
        ):
            assert torch.equal(one, other)
    with pytest.raises(ek.EngramError, match="directory: expected a new or empty one"):
        operator.save_pretrained(tmp_path / "0")
    with pytest.raises(ek.EngramError, match="directory: expected a preconditioner"):
        ek.Preconditioner.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["base", "rows", "signs", "free", "directions", "dim", "ridge"])
def test_folders_that_hold_something_else(name, tmp_path):
    """Sealed, but not what an operator has."""
    operator, _ = operators()["covariance"]
    operator = operator.preserve(draw(4, WIDTH)).within(torch.arange(30))
    operator.suppress(torch.eye(WIDTH)[:2], 0.5).save_pretrained(tmp_path)
    file = tmp_path / "preconditioner.safetensors"
    tensors, about = load_sealed_tensors(file)
    numbers = json.loads(about["numbers"])
    if name in numbers:
        changes = [({name: value}, {}) for value in (-1, "1", None)]
    else:
        whole = tensors[name]
        changes = [({}, {name: whole[..., :-1].contiguous()}), ({}, {name: whole.float()})]
        changes += [({}, {name: whole / 0})] * (name != "free")
    for number, tensor in changes:
        told = {**about, "numbers": json.dumps({**numbers, **number})}
        save_sealed_tensors(file, {**tensors, **tensor}, told)
        with pytest.raises(ek.EngramError, match="directory: expected a preconditioner"):
            ek.Preconditioner.from_pretrained(tmp_path)


def test_repr():
    operator = ek.Preconditioner.from_identity(8, ridge=2.0).preserve(draw(2, 8)).within([1, 2, 3, 4, 5, 6])
    assert repr(operator).startswith("Preconditioner(in=8, base=") and "neurons=6" in repr(operator)


def test_bad_input():
    operator, _ = operators()["covariance"]
    identity = ek.Preconditioner.from_identity(WIDTH)
    batched = ek.Covariance.from_second_moment(torch.eye(3).repeat(2, 1, 1), 1)
    weight, keys, residual = draw(OUT, WIDTH), draw(3, WIDTH), draw(3, OUT)
    units = torch.eye(WIDTH, dtype=torch.float64)

    def factors(weight=weight, keys=keys, **given):
        operator.factors(weight, keys, **{"residual": residual, **given})

    bad = [
        (
            lambda: operator.factors(weight, keys),
            ValueError,
            "residual: expected either it or values, got neither",
        ),
        (lambda: factors(values=residual), ValueError, "residual: expected either it or values, got both"),
        (lambda: factors(weight[:, 1:]), ValueError, "weight: expected 40 columns"),
        (lambda: factors(keys=keys[:, 1:]), ValueError, "keys: expected 40 columns"),
        (lambda: factors(residual=residual[1:]), ValueError, "residual: expected shape"),
        (lambda: factors(keys=keys * math.nan), ValueError, "keys: expected finite"),
        (lambda: factors(residual=residual / 0), ValueError, "residual: expected finite"),
        (lambda: factors(ridge=-1), ValueError, "ridge: "),
        (lambda: factors(keys=keys * 0), ValueError, "keys: expected no zero key"),
        (lambda: factors(keys=keys[[0, 1, 0]]), ek.EngramError, "keys: expected linearly independent rows"),
        (
            lambda: identity.within([0]).factors(weight, units[1:4], residual=residual),
            ek.EngramError,
            "keys: expected keys that can be written",
        ),
        (lambda: operator.apply(keys.int()), TypeError, "keys: "),
        (lambda: operator.preserve(keys, 0.0), ValueError, "weight: expected a positive number"),
        (lambda: operator.preserve(keys, "much"), TypeError, "weight: expected a number"),
        (lambda: operator.preserve(keys * math.inf), ValueError, "keys: expected finite"),
        (lambda: operator.release(keys, math.inf), ValueError, "weight: "),
        (lambda: operator.release(draw(WIDTH, WIDTH)), ValueError, "keys: expected fewer than 40 rows"),
        (lambda: operator.within([]), (ValueError, TypeError), "neurons: "),
        (lambda: operator.within([WIDTH]), ValueError, "neurons: expected indices from 0 to 39"),
        (lambda: operator.within(torch.ones(3, dtype=torch.bool)), ValueError, "neurons: expected shape"),
        (lambda: operator.suppress(keys, 0.5), ValueError, "directions: expected orthonormal rows"),
        (lambda: operator.suppress(units, 2.0), ValueError, "alpha: expected at most 1"),
        (lambda: operator.with_ridge(-1.0), ValueError, "ridge: "),
        (lambda: ek.Preconditioner.from_covariance(units), TypeError, "covariance: expected a Covariance"),
        (lambda: ek.Preconditioner.from_covariance(batched), ValueError, "covariance: expected shape"),
        (lambda: ek.Preconditioner.from_covariance(make()[1], 0.0), ValueError, "weight: expected above 0"),
        (lambda: ek.Preconditioner.from_identity(0), ValueError, "dim: "),
        (lambda: ek.Preconditioner.from_identity(4, 0.0), ValueError, "scale: "),
        (lambda: ek.Preconditioner.from_matrix(draw(4, 4)), ValueError, "matrix: expected a symmetric one"),
        (lambda: ek.Preconditioner.from_matrix(draw(4, 3)), ValueError, "matrix: expected shape"),
    ]
    for call, kind, message in bad:
        with pytest.raises(kind, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
