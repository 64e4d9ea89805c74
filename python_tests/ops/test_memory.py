"""Episodic memory on every backend that exists here, against fp64 by other routes than the package's.

The rule of every comparison: an error of at most twice that of the eager formula in the same type, both
against fp64. No tolerance is tuned.
"""

import numpy as np
import pytest
import torch
from accuracy import error, rounding, wide
from matrices import LAYOUTS

import engram_kernels as ek
from engram_kernels.backends import explain
from engram_kernels.ops.define import ops

ROWS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STATES = [torch.float64, torch.float32]
NAN = float("nan")


def state(batch: tuple, slots: int, latent: int, dtype=torch.float64, device="cpu"):
    """An empty information form."""
    return (
        torch.zeros(*batch, slots, slots, dtype=dtype, device=device),
        torch.zeros(*batch, slots, latent, dtype=dtype, device=device),
    )


def reference(function, *arguments, **options):
    """What a function makes of CPU tensors, whatever backend the test has forced."""
    with ek.use_backend("torch"):
        return function(*arguments, **options)


def rows(batch: tuple, count: int, slots: int, latent: int, dtype=torch.float64):
    """Addressing weights of about unit length, and latents."""
    w = torch.randn(*batch, count, slots, dtype=torch.float64) / slots**0.5
    return w.to(dtype), torch.randn(*batch, count, latent, dtype=torch.float64).to(dtype)


def bound(eager, truth, dtype: torch.dtype, terms: int) -> float:
    return max(2 * error(eager, truth), rounding(dtype, terms))


def ends_of(lengths: list[int]) -> list[int]:
    return np.cumsum([0, *lengths]).tolist()


# -- pseudo_inverse ------------------------------------------------------------------------------------------


def tikhonov(a, ridge):
    """σ/(σ² + λ) in place of each singular value, from a singular value decomposition."""
    left, sigma, right = np.linalg.svd(np.asarray(a, np.float64), full_matrices=False)
    return (right.swapaxes(-1, -2) * (sigma / (sigma**2 + ridge))[..., None, :]) @ left.swapaxes(-1, -2)


SHAPES = [(1, 1), (7, 3), (3, 7), (16, 16), (2, 33, 5), (2, 3, 5, 20)]


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pseudo_inverse_with_a_ridge(device, shape, dtype):
    a = torch.randn(shape, dtype=torch.float64).to(dtype)
    got = ek.pseudo_inverse(a.to(device), ridge=0.3)
    assert got.dtype == dtype
    # fp64 inside, rounded once.
    assert error(got, tikhonov(a.double().numpy(), 0.3)) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pseudo_inverse_of_full_rank_needs_no_ridge(device, shape, dtype):
    """With singular values in [1, 2]: by default they are shifted by no more than rounding would."""
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    spectrum = torch.linspace(1, 2, left.shape[-1], dtype=torch.float64)
    a = ((left * spectrum) @ right).to(dtype)
    truth = np.linalg.pinv(a.double().numpy())
    for ridge in (None, 0.0):
        got = ek.pseudo_inverse(a.to(device), ridge)
        assert error(got, truth) < max(2 * torch.finfo(dtype).eps, 1e-11)


@pytest.mark.parametrize("dtype", ROWS)
def test_pseudo_inverse_cuts_off_what_is_only_rounding(device, dtype):
    """A matrix of rank 3, rounded: a projection on what it spans keeps three directions, not forty."""
    a = (torch.randn(40, 3, dtype=torch.float64) @ torch.randn(3, 60, dtype=torch.float64)).to(dtype)
    kept = torch.linalg.svdvals(a.double() @ ek.pseudo_inverse(a.to(device)).double().cpu())
    assert (kept[:3] - 1).abs().max() < 0.03 and kept[3:].max() < 0.03
    assert not ek.pseudo_inverse(torch.zeros(5, 3, dtype=dtype, device=device)).any()


def test_pseudo_inverse_of_rank_deficient_matrices_without_a_ridge():
    a = torch.randn(2, 5, 4, dtype=torch.float64)
    a[1, :, 3] = a[1, :, 0]
    with pytest.raises(ek.EngramError, match="a: expected a matrix of full rank, got matrix 1 without it"):
        ek.pseudo_inverse(a, ridge=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_pseudo_inverse_that_its_type_cannot_hold_is_refused(device, dtype):
    small = torch.finfo(dtype).tiny / 32  # 1 / small is beyond the largest number
    a = (torch.eye(3, dtype=torch.float64) * small).to(dtype).to(device)
    for ridge in (None, 0.0):
        with pytest.raises(ek.EngramError, match="a: expected a matrix whose pseudo-inverse fits its type"):
            ek.pseudo_inverse(a, ridge)
    with pytest.raises(ek.EngramError, match=r"a: expected .* fits its type, up to 6\.55e\+04, got .*e\+05"):
        ek.pseudo_inverse((torch.eye(3) * 1e-6).half())
    truth = torch.eye(3, dtype=torch.float64) / a[0, 0].item()
    assert error(ek.pseudo_inverse(a.double(), 0.0), truth) < 1e-12


def test_a_memory_that_its_type_cannot_hold_is_refused(device):
    A, B = 1e-20 * torch.eye(3, device=device), torch.full((3, 2), 1e20, device=device)
    with pytest.raises(ek.EngramError, match="B: expected a state whose memory fits float32"):
        ek.memory_solve(A, B)
    assert (
        error(ek.memory_solve(A.double(), B.double()), torch.full((3, 2), 1e40, dtype=torch.float64)) < 1e-6
    )


def test_ben_israel_is_larimar_s_iteration():
    a = torch.randn(6, 9, dtype=torch.float64)
    left, sigma, right = np.linalg.svd(a.numpy(), full_matrices=False)
    # Each singular value alone: x ← 2x − σx².
    x = 5e-4 * sigma
    for _ in range(7):
        x = 2 * x - sigma * x**2
    got = ek.pseudo_inverse(a, method="ben-israel", steps=7)
    assert error(got, (right.T * x) @ left.T) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ben_israel_in_its_range_and_out_of_it(dtype):
    left, _, right = torch.linalg.svd(torch.randn(8, 12, dtype=torch.float64), full_matrices=False)

    def relative(low, high):
        a = ((left * torch.linspace(low, high, 8, dtype=torch.float64)) @ right).to(dtype)
        got = ek.pseudo_inverse(a, method="ben-israel")
        truth = torch.linalg.pinv(a.double())
        return float((got.double() - truth).norm() / truth.norm())

    assert relative(0.8, 50) < max(4 * torch.finfo(dtype).eps, 1e-4)
    assert relative(0.1, 1) > 0.5  # not converged
    assert not relative(1, 70) < 1  # diverged: huge, or NaN


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 4, 4), (1, 1), (2, 0, 3)], ids=str)
def test_pseudo_inverse_gradients(shape):
    a = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: ek.pseudo_inverse(a, ridge=0.3), a)
    if 0 not in shape:
        assert torch.autograd.gradcheck(lambda a: ek.pseudo_inverse(a, ridge=0.0), a)
        assert torch.autograd.gradcheck(lambda a: ek.pseudo_inverse(a, method="ben-israel", steps=4), a)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 2, 3)], ids=str)
def test_pseudo_inverse_of_nothing(device, shape):
    got = ek.pseudo_inverse(torch.zeros(shape, device=device))
    assert got.shape == (*shape[:-2], shape[-1], shape[-2])


# -- memory_address, memory_read -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_address(device, batch, dtype):
    _, z = rows(batch, 5, 7, 11, dtype)
    each = torch.randn(*batch, 11, 7, dtype=torch.float64)
    for inverse in (each, each.float(), each.reshape(-1, 11, 7)[0]):
        got = ek.memory_address(z.to(device), inverse.to(device))
        truth = np.einsum("...nc,...ck->...nk", wide(z), wide(inverse))
        assert got.dtype == inverse.dtype
        assert error(got, truth) <= bound(z.to(inverse.dtype) @ inverse, truth, inverse.dtype, 11)


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_read_projects(device, batch, dtype):
    _, z = rows(batch, 5, 7, 11, dtype)
    memory = torch.randn(*batch, 7, 11, dtype=torch.float64)
    inverse = reference(ek.pseudo_inverse, memory)
    got = ek.memory_read(z.to(device), inverse.to(device), memory.to(device))
    assert got.dtype == dtype
    basis = np.linalg.svd(memory.numpy(), full_matrices=False)[2]
    truth = wide(z) @ wide(basis).swapaxes(-1, -2) @ wide(basis)
    assert error(got, truth) <= max(torch.finfo(dtype).eps, 1e-11)
    assert ek.memory_read(z[..., :0, :], inverse, memory).shape == (*batch, 0, 11)


def test_address_and_read_gradients():
    z = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    inverse = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ek.memory_address, (z, inverse))
    assert torch.autograd.gradcheck(ek.memory_read, (z, inverse, memory))


# -- memory_accumulate_ --------------------------------------------------------------------------------------


def dense_sums(A, B, w, z, alpha=None):
    """Row by row, outer product by outer product, in extended precision."""
    A, B = wide(A).copy(), wide(B).copy()
    for b in range(len(A)):
        for i in range(w.shape[1]):
            row, latent = wide(w[b, i]), wide(z[b, i])
            sign = np.longdouble(1 if alpha is None else float(alpha[b, i]))
            A[b] += sign * np.outer(row, row)
            B[b] += sign * np.outer(row, latent)
    return A, B


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (1, 1, 33, 70), (3, 5, 7, 9), (2, 16, 65, 33), (1, 40, 17, 3), (2, 0, 4, 5)],
    ids=str,
)
def test_accumulate(device, shape, state_dtype):
    batch, count, slots, latent = shape
    # Every type of rows where there are several tiles; a GPU compiles a kernel for each.
    for dtype in ROWS if slots > 32 else [torch.float32]:
        w, z = rows((batch,), count, slots, latent, dtype)
        start = torch.randn(batch, slots, slots), torch.randn(batch, slots, latent)
        for alpha in (None, torch.tensor([1.0, -1.0, 0.0]).repeat(batch, count)[:, :count]):
            A, B = (tensor.to(device, state_dtype) for tensor in start)
            truth = dense_sums(A, B, w, z, alpha)
            signed = w if alpha is None else w * alpha.unsqueeze(-1).to(dtype)
            signed = signed.to(state_dtype).mT
            eager = (
                torch.baddbmm(A.cpu(), signed, w.to(state_dtype)),
                torch.baddbmm(B.cpu(), signed, z.to(state_dtype)),
            )
            given = None if alpha is None else alpha.to(device)
            got = ek.memory_accumulate_(A, B, w.to(device), z.to(device), given)
            assert got[0] is A and got[1] is B
            for mine, reference, exact in zip(got, eager, truth, strict=True):
                assert error(mine, exact) <= bound(reference, exact, state_dtype, count)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [2, 50])
def test_accumulate_strided(device, layout, count):
    slots, latent = 9, 13
    w, z = rows((2,), count, slots, latent)
    A, B = state((2,), slots, latent)
    truth = dense_sums(A, B, w, z)
    lay = LAYOUTS[layout]
    A, B, w, z = (lay(tensor.to(device)) for tensor in (A, B, w, z))
    ek.memory_accumulate_(A, B, w, z)
    for mine, exact in zip((A, B), truth, strict=True):
        assert error(mine, exact) <= rounding(torch.float64, count)


def test_accumulate_leaves_the_rest_of_the_storage(device):
    storage = torch.randn(4, 20, 40, dtype=torch.float64, device=device)
    before = storage.clone()
    w, z = rows((4,), 3, 9, 25)
    ek.memory_accumulate_(storage[:, 2:11, 3:12], storage[:, 2:11, 12:37], w.to(device), z.to(device))
    inside = torch.zeros_like(storage, dtype=torch.bool)
    inside[:, 2:11, 3:37] = True
    assert torch.equal(storage[~inside], before[~inside])
    assert (storage[inside] != before[inside]).all()


def test_accumulate_takes_any_leading_dimensions_and_types_of_alpha(device):
    w, z = (tensor.to(device) for tensor in rows((2, 3), 4, 5, 6))
    mask = torch.rand(2, 3, 4, device=device) < 0.5
    got = ek.memory_accumulate_(*state((2, 3), 5, 6, device=device), w, z, mask)
    whole = ek.memory_accumulate_(*state((2, 3), 5, 6, device=device), w, z, mask.int())
    for i in range(2):
        for j in range(3):
            kept = mask[i, j]
            one = ek.memory_accumulate_(*state((), 5, 6, device=device), w[i, j][kept], z[i, j][kept])
            for mine, same, exact in zip(got, whole, one, strict=True):
                assert torch.equal(mine, same)
                assert error(mine[i, j], exact) <= 2 * rounding(torch.float64, len(kept))


@pytest.mark.parametrize("lengths", [[3, 0, 5, 1, 0], [0, 0], [40, 2], [7]], ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_accumulate_ragged(device, lengths, index):
    batch, count = len(lengths), sum(lengths)
    w, z = rows((), count, 5, 8, torch.float32)
    alpha = torch.randn(count)
    ends = ends_of(lengths)
    got = ek.memory_accumulate_(
        *state((batch,), 5, 8, device=device),
        w.to(device),
        z.to(device),
        alpha.to(device),
        cu_seqlens=torch.tensor(ends, dtype=index, device=device),
    )
    for b in range(batch):
        part = slice(ends[b], ends[b + 1])
        exact = dense_sums(*state((1,), 5, 8), w[None, part], z[None, part], alpha[None, part])
        for mine, one in zip(got, exact, strict=True):
            assert error(mine[b], one[0]) < 1e-14


def test_accumulate_bumps_the_version_and_is_not_recorded():
    A, B = state((), 3, 4)
    versions = A._version, B._version
    w, z = rows((), 2, 3, 4)
    ek.memory_accumulate_(A, B, w.requires_grad_(), z)
    assert A._version > versions[0] and B._version > versions[1]
    assert A.grad_fn is None and not A.requires_grad


# -- memory_solve --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize(
    "shape", [((), 1, 1), ((), 17, 5), ((3,), 9, 33), ((2, 2), 4, 6), ((0,), 3, 2)], ids=str
)
def test_solve(device, shape, dtype):
    batch, slots, latent = shape
    w, z = rows(batch, 3 * slots, slots, latent, dtype)
    A, B = reference(ek.memory_accumulate_, *state(batch, slots, latent, dtype), w, z)
    # A product is symmetric up to rounding only, and eager's Cholesky reads one half of it.
    A = (A + A.mT) / 2
    got = ek.memory_solve(A.to(device), B.to(device), ridge=0.25)
    identity = torch.eye(slots, dtype=dtype)
    system = A.double().numpy() + 0.25 * np.eye(slots)
    truth = np.linalg.solve(system, B.double().numpy())
    eager = torch.cholesky_solve(B, torch.linalg.cholesky(A + 0.25 * identity))
    assert got.dtype == dtype and got.shape == B.shape
    # What a Cholesky solver may lose, whatever its order of sums (Higham 2002, theorem 10.4); the oracle too.
    own = (3 * slots + 1) * torch.finfo(dtype).eps * np.max(np.linalg.cond(system), initial=1)
    assert error(got, truth) <= max(2 * error(eager, truth), own)


def test_solve_is_least_squares():
    """Against NumPy's least squares on the rows themselves, the ridge as K rows more."""
    w, z = rows((), 30, 8, 5)
    A, B = ek.memory_accumulate_(*state((), 8, 5), w, z)
    stacked = np.concatenate([w.numpy(), np.sqrt(0.1) * np.eye(8)])
    right = np.concatenate([z.numpy(), np.zeros((8, 5))])
    truth = np.linalg.lstsq(stacked, right, rcond=None)[0]
    assert error(ek.memory_solve(A, B, ridge=0.1), truth) < 1e-13


@pytest.mark.parametrize("dtype", STATES)
def test_fewer_writes_than_slots_need_a_ridge(device, dtype):
    w, z = rows((3,), 6, 8, 5)
    w[0], z[0] = torch.randn(6, 8), torch.randn(6, 5)
    A, B = (t.to(device) for t in reference(ek.memory_accumulate_, *state((3,), 8, 5, dtype), w, z))
    A[0] += torch.eye(8, device=device)
    A[2] += torch.eye(8, device=device)
    with pytest.raises(ek.EngramError, match=r"A: expected a positive definite matrix.*in memory 1.*ridge 0"):
        ek.memory_solve(A, B)
    with pytest.raises(ek.EngramError, match=r"A: expected a positive definite matrix.*in memory 1"):
        ek.memory_forget_(A, B, w.to(device), z.to(device))
    assert torch.isfinite(ek.memory_solve(A, B, ridge=0.01)).all()


def test_solve_gradients():
    a = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    # As it is, not made symmetric: the symmetric part counts.
    assert torch.autograd.gradcheck(lambda a, b: ek.memory_solve(a, b, ridge=20.0), (a, b))
    assert torch.autograd.gradcheck(lambda a, b: ek.memory_solve(a @ a.mT, b, ridge=0.3), (a, b))


# -- memory_stream -------------------------------------------------------------------------------------------


def one_by_one(P, M, w, z):
    """The writes in order, as rank-one updates in the type of P."""
    readouts, leverages = [], []
    for t in range(w.shape[1]):
        row, latent = w[:, t], z[:, t]
        u = torch.einsum("bij,bj->bi", P, row)
        g = torch.einsum("bi,bi->b", row, u)
        error = latent - torch.einsum("bk,bkc->bc", row, M)
        P = P - torch.einsum("bi,bj->bij", u, u) / (1 + g)[:, None, None]
        M = M + torch.einsum("bi,bc->bic", u, error) / (1 + g)[:, None, None]
        readouts.append(torch.einsum("bk,bkc->bc", row, M))
        leverages.append(torch.einsum("bi,bij,bj->b", row, P, row))
    empty = [z[:, :0], z.new_empty(len(z), 0)]
    stacked = [torch.stack(x, 1) if x else e for x, e in zip((readouts, leverages), empty, strict=True)]
    return P, M, *stacked


def by_prefixes(P, M, w, z):
    """Each state afresh from all rows so far, by dense inverses in fp64: nothing is carried along."""
    start = np.linalg.inv(P.numpy())
    information = start @ M.numpy()
    results = []
    for t in range(1, w.shape[1] + 1):
        head, latents = w[:, :t].numpy(), z[:, :t].numpy()
        inverse = np.linalg.inv(start + head.swapaxes(1, 2) @ head)
        memory = inverse @ (information + head.swapaxes(1, 2) @ latents)
        last = head[:, -1:]
        results.append((last @ memory, (last @ inverse @ last.swapaxes(1, 2))[..., 0]))
    return inverse, memory, *(np.concatenate(column, 1) for column in zip(*results, strict=True))


def start_of(batch: int, slots: int, latent: int, ridge: float = 0.1):
    """A memory in use: P of some earlier rows and a ridge, and an M."""
    old, _ = rows((batch,), slots, slots, 1)
    A = old.mT @ old + ridge * torch.eye(slots, dtype=torch.float64)
    P = torch.linalg.inv(A)
    return (P + P.mT) / 2, torch.randn(batch, slots, latent, dtype=torch.float64)


STREAMS = [
    (1, 1, 1, 1),
    (1, 5, 1, 7),
    (2, 0, 5, 7),
    (3, 4, 17, 1),
    (1, 16, 16, 16),
    (5, 70, 7, 9),
    (1, 130, 33, 41),
    (1, 17, 3, 90),
    (1, 17, 300, 4),
    (1, 17, 780, 9),  # more slots than a block of threads takes at once
    (7, 50, 20, 30),
]


@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize("shape", STREAMS, ids=str)
def test_stream(device, poisoned, shape, dtype):
    batch, count, slots, latent = shape
    inputs = (*start_of(batch, slots, latent), *rows((batch,), count, slots, latent))
    inputs = [tensor.to(dtype) for tensor in inputs]
    exact = one_by_one(*(tensor.double() for tensor in inputs))
    eager = one_by_one(*inputs)
    got = ek.memory_stream(*(tensor.to(device) for tensor in inputs))
    # What a leverage is used for is its distance from 1.
    got, eager, exact = ((*outputs[:3], 1 - outputs[3]) for outputs in (got, eager, exact))
    for mine, reference, truth in zip(got, eager, exact, strict=True):
        assert mine.dtype == dtype
        # fp64 is compared with fp64: within the rounding that the two orders of sums may differ by, and that
        # of the root, the squares and the quotients of a single write.
        own = torch.finfo(dtype).eps * (count + slots + 4)
        assert error(mine, truth) <= max(2 * error(reference, truth), own)


@pytest.mark.parametrize("dtype", STATES)
def test_stream_of_every_remainder_of_a_block(device, poisoned, dtype):
    for slots in range(1, 18):
        inputs = (*start_of(1, slots, slots + 1), *rows((1,), 1 + slots % 3, slots, slots + 1))
        inputs = [tensor.to(dtype) for tensor in inputs]
        exact = one_by_one(*(tensor.double() for tensor in inputs))
        eager = one_by_one(*inputs)
        got = ek.memory_stream(*(tensor.to(device) for tensor in inputs))
        own = torch.finfo(dtype).eps * (slots + 8)
        for mine, reference, truth in zip(got, eager, exact, strict=True):
            assert error(mine, truth) <= max(2 * error(reference, truth), own)


@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (1, 75, 6, 4)], ids=str)
def test_stream_against_dense_inverses(device, shape):
    batch, count, slots, latent = shape
    inputs = (*start_of(batch, slots, latent), *rows((batch,), count, slots, latent))
    got = ek.memory_stream(*(tensor.to(device) for tensor in inputs))
    for mine, truth in zip(got, by_prefixes(*inputs), strict=True):
        assert error(mine, truth) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stream_converts_rows_to_the_type_of_the_state(device, dtype):
    P, M = (tensor.to(device) for tensor in start_of(2, 5, 7))
    w, z = (tensor.to(device) for tensor in rows((2,), 9, 5, 7, dtype))
    for mine, truth in zip(
        ek.memory_stream(P, M, w, z), ek.memory_stream(P, M, w.double(), z.double()), strict=True
    ):
        assert torch.equal(mine, truth) and mine.dtype == torch.float64


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("repeated", [False, True])
def test_stream_equals_the_information_form(device, dtype, limit, repeated):
    """At a ridge that bounds the condition number; the limits are those the package promises."""
    slots, latent, count, ridge = 48, 40, 150, 0.1
    w, z = rows((2,), count, slots, latent)
    if repeated:
        w[:, 1::2], z[:, 70:] = w[:, 0::2], z[:, :80]
    w, z = w.to(dtype), z.to(dtype)
    P = (torch.eye(slots, dtype=dtype, device=device) / ridge).repeat(2, 1, 1)
    M = torch.zeros(2, slots, latent, dtype=dtype, device=device)
    P, M, readouts, leverages = ek.memory_stream(P, M, w.to(device), z.to(device))
    A, B = reference(ek.memory_accumulate_, *state((2,), slots, latent), w, z)
    memory = reference(ek.memory_solve, A, B, ridge=ridge)
    assert error(M, memory) < limit
    assert error(P, torch.linalg.inv(A + ridge * torch.eye(slots, dtype=torch.float64))) < limit
    assert error(readouts[:, -1], (w[:, -1:].double() @ memory)[:, 0]) < limit
    assert (leverages >= 0).all() and (leverages < 1).all()


def test_stream_leaves_its_arguments(device):
    inputs = [tensor.to(device) for tensor in (*start_of(2, 5, 7), *rows((2,), 9, 5, 7))]
    before = [tensor.clone() for tensor in inputs]
    outputs = ek.memory_stream(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in outputs}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stream_strided(device, layout):
    inputs = [tensor.to(device) for tensor in (*start_of(2, 5, 7), *rows((2,), 9, 5, 7))]
    truth = ek.memory_stream(*inputs)
    got = ek.memory_stream(*(LAYOUTS[layout](tensor) for tensor in inputs))
    # Not bit for bit: where memory is misaligned, a library may sum in another order.
    assert all(error(a, b) < 1e-13 for a, b in zip(got, truth, strict=True))


def test_stream_takes_any_leading_dimensions(device):
    P, M = (tensor.to(device) for tensor in start_of(6, 5, 7))
    w, z = (tensor.to(device) for tensor in rows((6,), 9, 5, 7))
    truth = ek.memory_stream(P, M, w, z)
    many = ek.memory_stream(*(tensor.view(2, 3, *tensor.shape[1:]) for tensor in (P, M, w, z)))
    one = ek.memory_stream(P[4], M[4], w[4], z[4])
    for single, batched, exact in zip(one, many, truth, strict=True):
        assert torch.equal(batched.flatten(0, 1), exact)
        assert error(single, exact[4]) < 1e-13


def test_stream_gradients(device):
    slots, latent, count = 3, 4, 5
    shapes = ((slots, slots), (slots, latent), (count, slots), (count, latent))
    inputs = [torch.randn(2, *s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes]

    def function(root, *rest):
        P = root @ root.mT + torch.eye(slots, dtype=torch.float64, device=device)
        return ek.memory_stream(P, *rest)

    assert torch.autograd.gradcheck(function, inputs)


def test_stream_gradients_are_those_of_the_loop(device):
    """Over more than one chunk, for fp32 rows and an fp64 state."""
    P, M = start_of(2, 5, 4)
    w, z = rows((2,), 70, 5, 4, torch.float32)
    directions = [torch.randn_like(x) for x in one_by_one(P, M, w.double(), z.double())]

    def gradients(function, where):
        leaves = [x.detach().clone().to(where).requires_grad_() for x in (P, M, w, z)]
        outputs = function(*leaves)
        torch.autograd.backward(outputs, [d.to(where) for d in directions])
        return [leaf.grad for leaf in leaves]

    loop = gradients(lambda P, M, w, z: one_by_one(P, M, w.double(), z.double()), "cpu")
    for mine, truth in zip(gradients(ek.memory_stream, device), loop, strict=True):
        assert mine.dtype == truth.dtype
        # P is symmetric: only the symmetric part of its gradient has a meaning.
        if mine.shape == P.shape:
            mine, truth = mine + mine.mT, truth + truth.mT
        assert error(mine, truth) < max(1e-11, 2 * torch.finfo(mine.dtype).eps)


needs_native = pytest.mark.skipif(ek.backends()["cpu"] is not None, reason=f"{ek.backends()['cpu']}")


@needs_native
@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize(
    "shape", [(3, 20, 33, 50), (1, 3, 170, 290)], ids=["a thread a memory", "all on one"]
)
def test_the_number_of_threads_changes_no_bit(shape, dtype):
    batch, count, slots, latent = shape
    inputs = [*start_of(batch, slots, latent), *rows((batch,), count, slots, latent)]
    inputs = [tensor.to(dtype) for tensor in inputs]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with ek.use_backend("cpu"):
                results.append(ek.memory_stream(*inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@needs_native
def test_the_native_kernel_leaves_what_gemms_do_better():
    def answer(count, slots):
        args = (
            torch.eye(slots)[None],
            torch.zeros(1, slots, 8),
            torch.zeros(1, count, slots),
            torch.zeros(1, count, 8),
        )
        (name, reason), *_ = explain("memory_stream", "cpu", args)
        assert name == "cpu"
        return reason

    assert answer(1000, 64) is None and answer(1, 2000) is None
    assert "without elements" in answer(0, 64)
    assert "1000 > 4 rows" in answer(1000, 2000)


@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize(
    "shape", [(2, 3, 0, 4), (2, 3, 4, 0), (2, 0, 3, 4), (0, 3, 2, 4), (1, 2, 0, 0), (0, 0, 0, 0)], ids=str
)
def test_stream_of_degenerate_sizes(device, poisoned, shape, dtype):
    """Without slots a readout is 0, without rows the state stays; no memory is returned as it was found."""
    batch, count, slots, latent = shape
    P = torch.eye(slots, dtype=dtype, device=device).repeat(batch, 1, 1)
    M = torch.randn(batch, slots, latent, dtype=dtype, device=device)
    w = torch.randn(batch, count, slots, dtype=dtype, device=device)
    z = torch.randn(batch, count, latent, dtype=dtype, device=device)
    got = ek.memory_stream(P, M, w, z)
    for mine, truth in zip(got, one_by_one(*(x.cpu() for x in (P, M, w, z))), strict=True):
        assert mine.shape == truth.shape and error(mine, truth) <= 10 * torch.finfo(dtype).eps


@needs_native
@pytest.mark.parametrize(
    ("operator", "given"),
    [
        (
            "memory_stream",
            (torch.zeros(1, 0, 0), torch.zeros(1, 0, 3), torch.zeros(1, 2, 0), torch.ones(1, 2, 3)),
        ),
        ("apply_low_rank_", (torch.zeros(1, 4, 0), torch.zeros(1, 4, 2), torch.zeros(1, 2, 0), 1.0)),
        ("graft_blend", (*torch.zeros(3, 0), None, 0.0)),
        (
            "sparse_apply_",
            ([torch.zeros(0)], [torch.zeros(0).long()], [torch.zeros(0)], [torch.zeros(0)], False),
        ),
    ],
)
def test_no_native_kernel_sees_work_without_elements(operator, given):
    (name, reason), (last, none) = explain(operator, "cpu", given)
    assert (name, last, none) == ("cpu", "torch", None) and "without elements" in reason


# -- memory_forget_ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize("count", [0, 1, 6, 30])
def test_forgetting_restores_the_state(device, count, dtype):
    """Also more rows than slots at once; the leverages against a dense inverse."""
    slots, latent, ridge = 8, 5, 0.2
    kept, kept_z = rows((2,), 10, slots, latent, dtype)
    w, z = rows((2,), count, slots, latent, dtype)
    A, B = ek.memory_accumulate_(
        *state((2,), slots, latent, dtype, device), kept.to(device), kept_z.to(device)
    )
    before = A.clone(), B.clone()
    ek.memory_accumulate_(A, B, w.to(device), z.to(device))
    inverse = np.linalg.inv(A.double().cpu().numpy() + ridge * np.eye(slots))
    truth = np.einsum("bnk,bkl,bnl->bn", w.double(), inverse, w.double())
    leverages = ek.memory_forget_(A, B, w.to(device), z.to(device), ridge=ridge)
    assert leverages.dtype == dtype and leverages.shape == (2, count)
    assert error(leverages, truth) <= 100 * torch.finfo(dtype).eps
    for now, then in zip((A, B), before, strict=True):
        assert error(now, then) <= 10 * (count + 1) * torch.finfo(dtype).eps


def test_forgetting_ragged(device):
    w, z = rows((), 9, 4, 3)
    ends = torch.tensor([0, 4, 4, 9], device=device)
    A, B = state((3,), 4, 3, device=device)
    ek.memory_accumulate_(A, B, w.to(device), z.to(device), cu_seqlens=ends)
    whole = A.clone()
    # Of the first memory two rows, of the last all: more than it has slots.
    chosen = torch.tensor([0, 3, 4, 5, 6, 7, 8])
    part = torch.tensor([0, 2, 2, 7], device=device)
    leverages = ek.memory_forget_(
        A, B, w[chosen].to(device), z[chosen].to(device), ridge=0.1, cu_seqlens=part
    )
    inverse = torch.linalg.inv(whole.cpu() + 0.1 * torch.eye(4, dtype=torch.float64))
    memory = torch.tensor([0, 0, 2, 2, 2, 2, 2])
    truth = torch.einsum("nk,nkl,nl->n", w[chosen], inverse[memory], w[chosen])
    assert error(leverages, truth) < 1e-13
    left = w[1:3].T @ w[1:3]
    assert error(A[0], left) < 1e-13 and error(B[0], w[1:3].T @ z[1:3]) < 1e-13
    assert A[2].abs().max() < 1e-14 and not A[1].any()


def refused(match: str, A, B, w, z, **options):
    """The rows are refused, by that message in one line, and nothing is changed."""
    before = A.clone(), B.clone()
    with pytest.raises(ek.EngramError, match=match) as caught:
        ek.memory_forget_(A, B, w, z, **options)
    assert "\n" not in str(caught.value)
    assert torch.equal(A, before[0]) and torch.equal(B, before[1])


@pytest.mark.parametrize("dtype", STATES)
def test_unsound_forgetting_changes_nothing_in_any_memory(device, dtype):
    slots, latent = 8, 5
    w, z = (tensor.to(device) for tensor in rows((3,), 6, slots, latent, dtype))
    A, B = ek.memory_accumulate_(*state((3,), slots, latent, dtype, device), w, z)
    message = r"w: expected rows that the memory holds.*below 0\.99.*in memory 1; nothing was forgotten"
    ek.memory_forget_(A, B, w[:, :2], z[:, :2], ridge=0.05)
    # Again what was forgotten once; the two other memories' rows are in them.
    twice = w[:, 2:4].clone()
    twice[1] = w[1, :2]
    refused(message, A, B, twice, z[:, 2:4], ridge=0.05)
    # A row that never was in it.
    unknown = w[:, 2:3].clone()
    unknown[1] = 3 * torch.randn(slots, device=device)
    refused(message, A, B, unknown, z[:, 2:3], ridge=0.05)
    # The same row twice: each alone could go.
    double = w[:, [2, 3]].clone()
    double[1] = w[1, [2, 2]]
    refused(message, A, B, double, z[:, [2, 3]], ridge=0.05)
    # More rows than slots, among them what is no longer there.
    many = torch.cat([w[:, 2:], torch.zeros(3, 7, slots, dtype=dtype, device=device)], 1)
    many[1, -1] = w[1, 0]
    refused(message, A, B, many, torch.cat([z[:, 2:], z[:, :6], z[:, :1]], 1), ridge=0.05)
    ek.memory_forget_(A, B, w[:, 2:], z[:, 2:], ridge=0.05)
    assert A.abs().max() < 100 * torch.finfo(dtype).eps


def test_the_tolerance_is_the_margin_that_is_kept():
    A, B = torch.eye(3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    w, z = torch.tensor([[0.95**0.5, 0, 0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    refused(r"below 0\.9, got 0\.95;", A, B, w, z, tolerance=0.1)
    assert ek.memory_forget_(A, B, w, z, tolerance=0.04).item() == pytest.approx(0.95)


def test_rows_that_overflow_are_refused():
    A, B = torch.eye(3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    refused("w: .*got inf", A, B, torch.full((2, 3), 1e200, dtype=torch.float64), torch.ones(2, 2))


def test_without_a_ridge_nothing_would_be_forgotten():
    """The trap of eq. 4: fewer rows than slots, least squares of least norm: the forgotten still answers."""
    slots, latent, count = 32, 24, 16
    w, z = rows((), count, slots, latent)
    gone, kept = slice(0, 4), slice(4, count)

    def recall(memory, which):
        return torch.cosine_similarity(w[which] @ memory, z[which]).mean().item()

    # As the formula reads with a pseudo-inverse in place of C⁻¹: residuals of written rows are 0, so the
    # memory stays what it was.
    full = torch.linalg.pinv(w) @ z
    gram = w.T @ w - w[gone].T @ w[gone]
    trapped = full - torch.linalg.pinv(gram) @ w[gone].T @ (z[gone] - w[gone] @ full)
    assert recall(trapped, gone) > 0.99
    A, B = ek.memory_accumulate_(*state((), slots, latent), w, z)
    before = ek.memory_solve(A, B, ridge=1e-3)
    assert recall(before, gone) > 0.99
    ek.memory_forget_(A, B, w[gone], z[gone], ridge=1e-3)
    after = ek.memory_solve(A, B, ridge=1e-3)
    assert recall(after, kept) > 0.99
    never = ek.memory_solve(*ek.memory_accumulate_(*state((), slots, latent), w[kept], z[kept]), ridge=1e-3)
    assert error(after, never) < 1e-10
    assert recall(after, gone) < 0.5


# -- bad input -----------------------------------------------------------------------------------------------


def poison(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[1] = NAN
    return tensor


def episodes(*ends):
    """Arguments of ragged episodes for the fixture's two memories."""
    return {"w": torch.ones(3, 3), "z": torch.ones(3, 4), "cu_seqlens": torch.tensor(ends)}


BAD_ROWS = {
    "integer A": ({"A": lambda t: t.int()}, TypeError, "A: expected a tensor of float64, float32, got int32"),
    "half A": ({"A": lambda t: t.half()}, TypeError, "A: expected a tensor of float64, float32, got float16"),
    "A not square": ({"A": lambda t: t[:, :2]}, ValueError, r"A: expected shape \[..., K, K\]"),
    "A a list": ({"A": [1.0]}, TypeError, "A: expected a tensor, got list"),
    "B None": ({"B": None}, TypeError, "B: expected a tensor, got NoneType"),
    "B of another type": ({"B": lambda t: t.float()}, TypeError, "B: expected a tensor of float64"),
    "B of another batch": ({"B": lambda t: t[:1]}, ValueError, r"B: expected shape \[2, 3, 4\]"),
    "B of other slots": ({"B": lambda t: t[:, :2]}, ValueError, r"B: expected shape \[2, 3, 4\]"),
    "B of one dimension": ({"B": lambda t: t[0, 0]}, ValueError, "B: expected shape"),
    "integer w": ({"w": lambda t: t.long()}, TypeError, "w: .*int64"),
    "w without a batch": ({"w": lambda t: t[0]}, ValueError, r"w: expected shape \[..., N, K\]"),
    "w of another width": ({"w": lambda t: t[..., :2]}, ValueError, r"w: expected shape \[2, 5, 3\]"),
    "NaN w": ({"w": poison}, ValueError, "w: expected finite values, got 1 NaN"),
    "infinite w": ({"w": lambda t: t / 0}, ValueError, "w: expected finite"),
    "z of another count": ({"z": lambda t: t[:, 1:]}, ValueError, r"z: expected shape \[2, 5, 4\]"),
    "z of another width": ({"z": lambda t: t[..., 1:]}, ValueError, r"z: expected shape \[2, 5, 4\]"),
    "integer z": ({"z": lambda t: t.short()}, TypeError, "z: .*int16"),
    "NaN z": ({"z": poison}, ValueError, "z: expected finite values, got 1 NaN"),
    "A expanded": (
        {"A": lambda t: t[:1].expand(2, 3, 3)},
        ValueError,
        "A: expected elements that do not overlap",
    ),
    "B expanded": (
        {"B": lambda t: t[:1].expand(2, 3, 4)},
        ValueError,
        "B: expected elements that do not overlap",
    ),
    "cu_seqlens a list": ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens: .*list"),
    "floating cu_seqlens": ({**episodes(0.0, 1, 3)}, TypeError, "cu_seqlens: .*float32"),
    "cu_seqlens too short": (episodes(0, 3), ValueError, r"cu_seqlens: expected shape \[3\]"),
    "cu_seqlens from 1": (episodes(1, 2, 3), ValueError, "cu_seqlens: expected numbers that do not fall"),
    "cu_seqlens to 4": (episodes(0, 2, 4), ValueError, "cu_seqlens: expected .* from 0 to 3, got"),
    "falling cu_seqlens": (episodes(0, 4, 3), ValueError, "cu_seqlens: expected numbers that do not fall"),
    "cu_seqlens with a batch of rows": (
        {"cu_seqlens": torch.tensor([0, 2, 5])},
        ValueError,
        r"w: expected shape \[T, K\]",
    ),
}
BAD_ALPHAS = {
    "alpha a number": ({"alpha": 1.0}, TypeError, "alpha: expected a tensor, got float"),
    "alpha of another count": ({"alpha": torch.ones(2, 4)}, ValueError, r"alpha: expected shape \[2, 5\]"),
    "complex alpha": ({"alpha": torch.ones(2, 5) * 1j}, TypeError, "alpha: .*real"),
    "NaN alpha": ({"alpha": poison(torch.ones(2, 5))}, ValueError, "alpha: expected finite"),
    "NaN in a row of alpha 0": ({"w": poison, "alpha": torch.zeros(2, 5)}, ValueError, "w: expected finite"),
    "w too large": (
        {"w": lambda t: t * 1e200},
        ValueError,
        "w: expected rows whose products with w fit float64",
    ),
    "z too large": (
        {"w": lambda t: t * 1e20, "z": lambda t: t * 1e300},
        ValueError,
        "z: expected rows whose products with w fit float64",
    ),
}
BAD_FORGETS = {
    "negative ridge": ({"ridge": -1.0}, ValueError, "ridge: "),
    "ridge a tensor": ({"ridge": torch.ones(1)}, TypeError, "ridge: "),
    "tolerance of 1": ({"tolerance": 1.0}, ValueError, "tolerance: expected a number below 1"),
    "NaN tolerance": ({"tolerance": NAN}, ValueError, "tolerance: "),
    "NaN A": ({"A": poison}, ValueError, "A: expected finite"),
}


@pytest.fixture
def memories():
    """On the CPU: the checks know nothing of backends."""
    w, z = rows((2,), 5, 3, 4)
    A, B = ek.memory_accumulate_(*state((2,), 3, 4), w, z)
    return {"A": A, "B": B, "w": w, "z": z}


def raises_and_leaves(function, arguments: dict, change: dict, kind, message: str):
    for name, value in change.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(kind, match=message) as caught:
        function(**arguments)
    assert "\n" not in str(caught.value)
    for name, value in before.items():
        assert torch.equal(arguments[name].nan_to_num(7.0), value.nan_to_num(7.0)), name


@pytest.mark.parametrize("case", BAD_ROWS | BAD_ALPHAS)
def test_bad_accumulate_changes_nothing(memories, case):
    raises_and_leaves(ek.memory_accumulate_, memories, *(BAD_ROWS | BAD_ALPHAS)[case])


@pytest.mark.parametrize("case", BAD_ROWS | BAD_FORGETS)
def test_bad_forget_changes_nothing(memories, case):
    memories["A"] += 10 * torch.eye(3, dtype=torch.float64)  # so that one memory's A takes the other's rows
    raises_and_leaves(
        lambda **given: ek.memory_forget_(**{"ridge": 0.1, **given}),
        memories,
        *(BAD_ROWS | BAD_FORGETS)[case],
    )


def test_rows_that_are_views_of_the_state_are_refused():
    A, B = torch.eye(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="w: expected memory of its own"):
        ek.memory_accumulate_(A, B, A[:2], torch.ones(2, 4))
    with pytest.raises(ValueError, match="z: expected memory of its own"):
        ek.memory_accumulate_(A, B, torch.ones(2, 4), A[:2])
    assert torch.equal(A, torch.eye(4, dtype=torch.float64)) and not B.any()


def test_leading_dimensions_that_cannot_be_written_as_one():
    storage = torch.zeros(3, 2, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="A: expected leading dimensions that lie in one row, got strides"):
        ek.memory_accumulate_(
            storage.transpose(0, 1), torch.zeros(2, 3, 4, 5).double(), *rows((2, 3), 2, 4, 5)
        )
    assert not storage.any()


BAD_STREAMS = {
    "integer P": ({"P": lambda t: t.int()}, TypeError, "P: expected a tensor of float64, float32"),
    "P not square": ({"P": lambda t: t[:, :2]}, ValueError, r"P: expected shape \[..., K, K\]"),
    "M of another type": ({"M": lambda t: t.float()}, TypeError, "M: expected a tensor of float64"),
    "w of another width": ({"w": lambda t: t[..., :2]}, ValueError, r"w: expected shape \[2, 5, 3\]"),
    "z without a batch": ({"z": lambda t: t[0]}, ValueError, r"z: expected shape \[2, 5, 4\]"),
    "NaN P": ({"P": poison}, ValueError, "P: expected finite values, got 1 NaN"),
    "NaN M": ({"M": poison}, ValueError, "M: expected finite values, got 1 NaN"),
    "NaN w": ({"w": poison}, ValueError, "w: expected finite values, got 1 NaN"),
    "infinite z": ({"z": lambda t: t / 0}, ValueError, "z: expected finite"),
    "negative P": ({"P": lambda t: -9 * t}, ek.EngramError, "P: expected a positive definite matrix"),
}


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_bad_stream(memories, case):
    P = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    arguments = {"P": P, "M": memories["B"], "w": memories["w"], "z": memories["z"]}
    raises_and_leaves(ek.memory_stream, arguments, *BAD_STREAMS[case])


BAD_PURE = {
    "pseudo_inverse: vector": (ek.pseudo_inverse, (torch.ones(3),), {}, ValueError, "a: expected shape"),
    "pseudo_inverse: method": (
        ek.pseudo_inverse,
        (torch.ones(3, 2),),
        {"method": "svd"},
        ValueError,
        "method: expected one of cholesky, ben-israel, got 'svd'",
    ),
    "pseudo_inverse: ridge": (ek.pseudo_inverse, (torch.ones(3, 2),), {"ridge": -1}, ValueError, "ridge: "),
    "pseudo_inverse: ridge of the other method": (
        ek.pseudo_inverse,
        (torch.ones(3, 2),),
        {"ridge": 1.0, "method": "ben-israel"},
        ValueError,
        "ridge: expected None",
    ),
    "pseudo_inverse: steps": (ek.pseudo_inverse, (torch.ones(3, 2),), {"steps": 1.5}, TypeError, "steps: "),
    "pseudo_inverse: NaN": (
        ek.pseudo_inverse,
        (poison(torch.ones(3, 2)),),
        {},
        ValueError,
        "a: expected fin",
    ),
    "pseudo_inverse: too large": (
        ek.pseudo_inverse,
        (torch.full((3, 2), 1e200, dtype=torch.float64),),
        {},
        ValueError,
        "a: expected entries whose squares fit float64",
    ),
    "address: width": (
        ek.memory_address,
        (torch.ones(2, 3), torch.ones(4, 5)),
        {},
        ValueError,
        r"m0_pinv: expected shape \[3, 5\]",
    ),
    "address: batch": (
        ek.memory_address,
        (torch.ones(2, 3), torch.ones(2, 3, 5)),
        {},
        ValueError,
        "m0_pinv: expected shape",
    ),
    "address: type": (ek.memory_address, (torch.ones(2, 3).int(), torch.ones(3, 5)), {}, TypeError, "z: "),
    "read: M": (
        ek.memory_read,
        (torch.ones(2, 3), torch.ones(3, 5), torch.ones(4, 3)),
        {},
        ValueError,
        r"M_pinv: expected shape \[3, 4\]",
    ),
    "read: type": (
        ek.memory_read,
        (torch.ones(2, 3), torch.ones(3, 5), torch.ones(5, 3).double()),
        {},
        TypeError,
        "M: expected a tensor of float32, got float64",
    ),
    "solve: B": (
        ek.memory_solve,
        (torch.eye(3), torch.ones(2, 4)),
        {},
        ValueError,
        r"B: expected shape \[3, 4\]",
    ),
    "solve: NaN A": (
        ek.memory_solve,
        (poison(torch.eye(3)), torch.ones(3, 4)),
        {},
        ValueError,
        "A: expected f",
    ),
    "solve: NaN B": (
        ek.memory_solve,
        (torch.eye(3), poison(torch.ones(3, 4))),
        {},
        ValueError,
        "B: expected f",
    ),
    "solve: indefinite A": (
        ek.memory_solve,
        (-torch.eye(3), torch.ones(3, 4)),
        {},
        ek.EngramError,
        "A: expec",
    ),
    "solve: ridge": (
        ek.memory_solve,
        (torch.eye(3), torch.ones(3, 4)),
        {"ridge": NAN},
        ValueError,
        "ridge: ",
    ),
}


@pytest.mark.parametrize("case", BAD_PURE)
def test_bad_arguments(case):
    function, arguments, options, kind, message = BAD_PURE[case]
    with pytest.raises(kind, match=message) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)


# -- what torch asks for -------------------------------------------------------------------------------------


def test_ragged_operators_keep_their_promises_too():
    w, z = rows((), 5, 3, 4)
    A, B = state((2,), 3, 4)
    ends = torch.tensor([0, 2, 5])
    torch.library.opcheck(ops.memory_accumulate_.default, (A, B, w, z, None, ends))
    torch.library.opcheck(ops.memory_leverages.default, (A, w, ends, 100.0, 0.99))


def test_compiles_whole_with_dynamic_count(device):
    slots, latent, ridge = 6, 5, 0.5
    m0_pinv = torch.randn(latent, slots, dtype=torch.float64, device=device)

    def episode(z, forgotten):
        w = ek.memory_address(z, m0_pinv)
        A, B = torch.zeros(slots, slots).to(w), torch.zeros(slots, latent).to(w)
        ek.memory_accumulate_(A, B, w, z)
        leverages = ek.memory_forget_(A, B, w[:forgotten], z[:forgotten], ridge=ridge)
        memory = ek.memory_solve(A, B, ridge=ridge)
        return ek.memory_read(z, ek.pseudo_inverse(memory), memory), leverages

    def streaming(P, M, w, z):
        return ek.memory_stream(P, M, w, z)

    options = {"fullgraph": True, "dynamic": True, "backend": "aot_eager"}
    compiled, compiled_stream = torch.compile(episode, **options), torch.compile(streaming, **options)
    P, M = (tensor.to(device) for tensor in start_of(2, slots, latent))
    for count in (3, 4, 70):
        w, z = (tensor.to(device) for tensor in rows((2,), count, slots, latent))
        for mine, truth in zip(compiled(z[0], 2), episode(z[0], 2), strict=True):
            torch.testing.assert_close(mine, truth)
        w.requires_grad_()
        mine, truth = compiled_stream(P, M, w, z), streaming(P, M, w, z)
        torch.testing.assert_close(mine, truth)
        (gradient,) = torch.autograd.grad(mine[2].sum() + mine[3].sum(), w)
        (expected,) = torch.autograd.grad(truth[2].sum() + truth[3].sum(), w)
        torch.testing.assert_close(gradient, expected)


def test_autocast_changes_nothing():
    _, z = rows((), 9, 6, 5, torch.float32)
    m0 = torch.randn(6, 5)

    def episode():
        inverse = ek.pseudo_inverse(m0)
        w = ek.memory_address(z, inverse)
        other = ek.memory_address(z, ek.pseudo_inverse(m0, method="ben-israel"))
        P, M, readouts, leverages = ek.memory_stream(torch.eye(6), torch.zeros(6, 5), w, z)
        return w, other, P, M, readouts, leverages, ek.memory_read(z, ek.pseudo_inverse(M), M)

    plain = episode()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(episode(), plain, strict=True))
