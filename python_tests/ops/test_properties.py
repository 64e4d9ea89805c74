"""Every public function against fp64 NumPy, for shapes, strides, offsets and types that hypothesis draws.

Bounds are those of rounding errors: of n products summed in a type of spacing ε, at most (n + 2) ε of the sum
of their sizes; one rounding to the result's type; for systems, times the condition number.
"""

from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from accuracy import wide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engram_kernels as ek
from engram_kernels._linalg import compute_dtype

cases = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    # The backend that is forced, and the seed, are the same for all examples of a test.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SIZES = st.sampled_from([0, 1, 2, 3, 5, 8, 17, 33])
SOME = st.sampled_from([1, 2, 3, 5, 8, 17, 33])
BATCHES = st.sampled_from([(), (1,), (3,), (0,)])
LEADING = st.sampled_from([(), (2,), (2, 3), (0,), (1, 2)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
STATES = st.sampled_from([torch.float64, torch.float32])
REST = 7.0  # what lies between the entries of a strided tensor
DATA = st.data()


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


class Laid:
    """Values laid out somehow in a larger storage: dimensions in any order, steps, an offset."""

    def __init__(self, draw, values: torch.Tensor, device):
        order = draw(st.permutations(range(values.dim())))
        reach, strides = 1, [0] * values.dim()
        for dimension in order:
            strides[dimension] = reach * draw(st.integers(1, 2))
            reach = strides[dimension] * max(1, values.shape[dimension])
        offset = draw(st.integers(0, 3))
        self.place = values.shape, strides, offset
        self.storage = torch.full((offset + reach,), REST, dtype=values.dtype, device=device)
        self.tensor = self.storage.as_strided(*self.place)
        self.tensor.copy_(values)

    def rest_is_untouched(self) -> bool:
        inside = torch.zeros_like(self.storage, dtype=torch.bool)
        inside.as_strided(*self.place).fill_(True)
        return bool((self.storage[~inside] == REST).all())


def normal(draw, shape, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def close(got: torch.Tensor, truth, bound) -> None:
    """Entry by entry: within a bound, and one rounding to the result's type."""
    truth, got_wide = wide(truth), wide(got.detach())
    assert got_wide.shape == truth.shape and np.isfinite(got_wide).all()
    if truth.size:
        # The smallest normal number: below it a type's spacing shrinks no more.
        allowed = bound + eps(got.dtype) * np.maximum(np.abs(truth), torch.finfo(got.dtype).tiny)
        assert (np.abs(got_wide - truth) <= allowed).all(), float((np.abs(got_wide - truth) - allowed).max())


def product(left, right, dtype, terms=None):
    """A matrix product in extended precision, and the bound of its rounding errors."""
    left, right = wide(left), wide(right)
    count = left.shape[-1] if terms is None else terms
    return left @ right, (count + 2) * eps(dtype) * (np.abs(left) @ np.abs(right))


# -- low rank ------------------------------------------------------------------------------------------------


@cases
@given(DATA)
def test_apply_low_rank(device, data):
    draw = data.draw
    batch, rows, columns, rank, dtype = (draw(s) for s in (BATCHES, SIZES, SIZES, SIZES, DTYPES))
    start = normal(draw, (*batch, rows, columns), dtype)
    weight = Laid(draw, start, device)
    left = Laid(draw, normal(draw, (*batch, rows, rank), draw(DTYPES)), device).tensor
    right = Laid(draw, normal(draw, (*batch, rank, columns), draw(DTYPES)), device).tensor
    alpha = draw(st.sampled_from([1.0, -0.3, 0.0]))
    compute = compute_dtype(start)
    change, bound = product(left.to(compute), right.to(compute), compute)
    got = ek.apply_low_rank_(weight.tensor, left, right, alpha)
    assert got is weight.tensor and weight.rest_is_untouched()
    truth = wide(start) + np.longdouble(alpha) * change
    close(got, truth, 2 * bound + 2 * eps(compute) * (np.abs(wide(start)) + np.abs(truth)))


@cases
@given(DATA)
@pytest.mark.parametrize("mode", ["joint", "sequential", "independent"])
def test_low_rank_update_and_its_factors(device, mode, data):
    draw = data.draw
    batch, rows, columns, dtype = draw(BATCHES), draw(SIZES), draw(SOME), draw(DTYPES)
    count = draw(st.integers(0, 2 * columns if mode == "joint" else columns))
    ridge = draw(st.sampled_from([0.1, 3.0])) if mode == "joint" else 0.0
    weight = normal(draw, (*batch, rows, columns), dtype)
    keys = normal(draw, (*batch, count, columns), torch.float32)
    values = normal(draw, (*batch, count, rows), torch.float32)
    root = normal(draw, (columns, columns)) / columns**0.5
    covariance = root @ root.T + torch.eye(columns)
    inverse = torch.linalg.inv(covariance)
    arguments = [Laid(draw, x, device).tensor for x in (weight, keys, values)]
    inverse = Laid(draw, (inverse + inverse.T) / 2, device).tensor
    options = {"mode": mode, "ridge": ridge, "inverse_covariance": inverse}
    got = ek.low_rank_update(*arguments, **options)
    left, right = ek.low_rank_factors(*arguments, **options)
    assert got.dtype == dtype and left.shape[-1] == right.shape[-2] == count
    compute = compute_dtype(weight)
    flat, whole = (
        [x.cpu().double().numpy().reshape(int(np.prod(batch)), *x.shape[-2:]) for x in part]
        for part in ((weight, keys, values), (got, left @ right))
    )
    for w, k, v, mine, change in zip(*flat, *whole, strict=True):
        truth = oracle.write(mode, w, k, v, covariance.numpy(), ridge)
        # Normwise: what the n × n system and what the writes in a row may amplify.
        size = np.linalg.norm(truth - w) * (1 + np.linalg.norm(k)) + np.linalg.norm(w) + 1
        amplified = np.linalg.cond(k) if count and mode == "sequential" else 1
        bound = 30 * eps(compute) * (columns + count + 1) * size * amplified
        assert np.linalg.norm(change - (truth - w)) <= bound
        assert np.linalg.norm(mine - truth) <= bound + eps(dtype) * np.linalg.norm(truth)


@cases
@given(DATA)
def test_second_moment(device, data):
    draw = data.draw
    leading, width, dtype, state = draw(LEADING), draw(SIZES), draw(DTYPES), draw(STATES)
    start, inputs = normal(draw, (width, width), state), normal(draw, (*leading, width), dtype)
    moment = Laid(draw, start, device)
    mask = normal(draw, leading) > 0 if draw(st.booleans()) else None
    laid = None if mask is None else Laid(draw, mask, device).tensor
    got = ek.second_moment_(moment.tensor, Laid(draw, inputs, device).tensor, laid)
    assert got is moment.tensor and moment.rest_is_untouched()
    rows = inputs.reshape(int(np.prod(leading)), width) if mask is None else inputs[mask]
    rows = rows.reshape(len(rows), width)
    change, bound = product(rows.T, rows, state)
    close(got, wide(start) + change, bound + 2 * eps(state) * np.abs(wide(start)))


# -- grafting ------------------------------------------------------------------------------------------------


def gate(logits, base, bias):
    x = wide(logits) - bias
    return 1 / (1 + np.exp(np.where(wide(base) > 0, x, -x)))


@st.composite
def models(draw, device, shared_dtype=False):
    """Lists (pre, ft, logits, base bools) of tensors of any shapes, all laid out somehow."""
    count = draw(st.integers(0, 3))
    one, lists = draw(DTYPES), ([], [], [], [])
    for _ in range(count):
        shape = draw(st.lists(SIZES, min_size=0, max_size=2).map(tuple))
        dtype = one if shared_dtype else draw(DTYPES)
        pre = normal(draw, shape, dtype)
        ft = (pre.double() + 0.1 * normal(draw, shape)).to(dtype)
        logits = (3 * normal(draw, shape)).to(compute_dtype(pre))
        for kept, x in zip(lists, (pre, ft, logits, normal(draw, shape) > 0.5), strict=True):
            kept.append(Laid(draw, x, device))
    return lists


def tensors(laid: list[Laid]) -> list[torch.Tensor]:
    return [x.tensor for x in laid]


def blended(pre, ft, logits, base, bias):
    """θ and the bound of its rounding errors: in the difference, and a few units in the gate."""
    pre, change = wide(pre), wide(ft) - wide(pre)
    return pre + gate(logits, base, bias) * change, 8 * (np.abs(pre) + np.abs(change))


@cases
@given(DATA)
def test_blends(device, data):
    draw = data.draw
    pre, ft, logits, base = (tensors(x) for x in draw(models(device)))
    bias, masked = draw(st.sampled_from([0.0, 0.7])), draw(st.booleans())
    packed = [ek.pack_mask(x) for x in base]
    out = [Laid(draw, torch.full_like(x, 3.0, device="cpu").clone(), device) for x in pre]
    ek._foreach_graft_blend_(tensors(out), pre, ft, logits, packed if masked else None, bias)
    for i, target in enumerate(out):
        on = base[i] if masked else torch.zeros_like(base[i])
        truth, size = blended(pre[i], ft[i], logits[i], on, bias)
        one = ek.graft_blend(pre[i], ft[i], logits[i], packed[i] if masked else None, bias)
        assert one.is_contiguous() and target.rest_is_untouched()
        for result in (one, target.tensor):
            close(result, truth, eps(logits[i].dtype) * size)


@cases
@given(DATA)
def test_mask_step(device, data):
    draw = data.draw
    laid = draw(models(device))
    pre, ft, logits, base = (tensors(x) for x in laid)
    bias, lr, l1, masked = draw(st.sampled_from([0.0, 0.7])), 0.5, 0.1, draw(st.booleans())
    grads = [Laid(draw, normal(draw, x.shape, x.dtype), device).tensor for x in pre]
    before = [x.cpu().clone() for x in logits]
    packed = [ek.pack_mask(x) for x in base] if masked else None
    out = [Laid(draw, torch.zeros_like(x, device="cpu").clone(), device) for x in pre]
    with_out = draw(st.booleans())
    ek.graft_mask_step_(logits, grads, pre, ft, packed, bias, lr, l1, out=tensors(out) if with_out else None)
    for i, scores in enumerate(laid[2]):
        on = base[i] if masked else torch.zeros_like(base[i])
        slope = gate(before[i], on, bias)
        slope = np.where(wide(on) > 0, -1, 1) * slope * (1 - slope)
        drive = wide(grads[i]) * (wide(ft[i]) - wide(pre[i])) + l1
        size = np.abs(wide(before[i])) + np.abs(wide(grads[i])) * (np.abs(wide(pre[i])) + 1) + 1
        close(scores.tensor, wide(before[i]) - lr * slope * drive, 8 * eps(scores.tensor.dtype) * size)
        assert scores.rest_is_untouched() and out[i].rest_is_untouched()
        if with_out:
            truth, size = blended(pre[i], ft[i], scores.tensor, on, bias)
            close(out[i].tensor, truth, eps(scores.tensor.dtype) * size)


@cases
@given(DATA)
def test_packed_masks(device, data):
    draw = data.draw
    pre, ft, _, base = (tensors(x) for x in draw(models(device)))
    for p, f, mask in zip(pre, ft, base, strict=True):
        packed = ek.pack_mask(mask)
        bits = mask.cpu().numpy().reshape(-1)
        assert packed.cpu().numpy().tolist() == np.packbits(bits, bitorder="little").tolist()
        strided = Laid(draw, packed.cpu(), device).tensor
        assert torch.equal(ek.unpack_mask(strided, mask.shape), mask)
        chosen = ek.graft_blend_packed(p, f, strided)
        assert torch.equal(chosen, torch.where(mask, f, p))


@cases
@given(DATA)
def test_top_k(device, data):
    draw = data.draw
    pre, ft, scores, _ = (tensors(x) for x in draw(models(device, shared_dtype=True)))
    total = sum(x.numel() for x in pre)
    k = draw(st.integers(0, total))
    exact = [np.abs(wide(f) - wide(p)) for p, f in zip(pre, ft, strict=True)]
    if pre and pre[0].dtype == torch.float64:  # the difference itself is rounded in the weights' type
        exact = [np.abs(f.cpu().numpy() - p.cpu().numpy()) for p, f in zip(pre, ft, strict=True)]
    exact = [
        x.astype(np.float32 if p.dtype != torch.float64 else np.float64)
        for x, p in zip(exact, pre, strict=True)
    ]
    for masks, keys in ((ek.graft_top_k(pre, ft, k), exact), (ek.top_k_mask(scores, k), scores)):
        flat = np.concatenate([np.zeros(0), *(wide(x).reshape(-1) for x in keys)])
        truth = np.zeros(total, bool)
        truth[np.argsort(-flat, kind="stable")[:k]] = True
        got = [ek.unpack_mask(m, p.shape).cpu().numpy().reshape(-1) for m, p in zip(masks, pre, strict=True)]
        assert np.array_equal(np.concatenate([np.zeros(0, bool), *got]), truth)


@cases
@given(DATA)
def test_sparse_apply(device, data):
    draw = data.draw
    (laid, *_) = draw(models(device))
    weights, indices, values, expected = tensors(laid), [], [], []
    before = [x.cpu().clone() for x in weights]
    for start in before:
        count = draw(st.integers(0, start.numel()))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        at = torch.randperm(start.numel(), generator=generator)[:count]
        new = normal(draw, (count,), start.dtype)
        flat = start.numpy().reshape(-1).copy() if start.dtype != torch.bfloat16 else None
        changed = start.reshape(-1).clone()
        changed[at] = new
        assert flat is None or np.array_equal(np.delete(flat, at), np.delete(changed.numpy(), at))
        expected.append((changed, start.reshape(-1)[at]))
        index = at.to(draw(st.sampled_from([torch.int32, torch.int64])))
        indices.append(Laid(draw, index, device).tensor)
        values.append(Laid(draw, new, device).tensor)
    old = ek.sparse_apply_(weights, indices, values)
    for target, was, (changed, overwritten) in zip(laid, old, expected, strict=True):
        assert torch.equal(target.tensor.cpu().reshape(-1), changed) and target.rest_is_untouched()
        assert torch.equal(was.cpu(), overwritten)
    ek.sparse_apply_(weights, indices, old)
    assert all(torch.equal(x.cpu(), start) for x, start in zip(weights, before, strict=True))


# -- episodic memory -----------------------------------------------------------------------------------------


@cases
@given(DATA)
def test_pseudo_inverse(device, data):
    draw = data.draw
    leading, rows, columns, dtype = draw(LEADING), draw(SIZES), draw(SIZES), draw(DTYPES)
    a = normal(draw, (*leading, rows, columns), dtype)
    got = ek.pseudo_inverse(Laid(draw, a, device).tensor, ridge=0.3)
    assert got.dtype == dtype and got.shape == (*leading, columns, rows)
    exact = a.double().numpy()
    gram = exact.swapaxes(-1, -2) @ exact + 0.3 * np.eye(columns)
    close(got, np.linalg.solve(gram, exact.swapaxes(-1, -2)), 1e-10)


@cases
@given(DATA)
def test_address_and_read(device, data):
    draw = data.draw
    leading, count, slots, latent = draw(LEADING), draw(SIZES), draw(SIZES), draw(SIZES)
    dtype, state = draw(DTYPES), draw(STATES)
    z = normal(draw, (*leading, count, latent), dtype)
    inverse = normal(draw, (*(leading if draw(st.booleans()) else ()), latent, slots), state)
    laid = [Laid(draw, x, device).tensor for x in (z, inverse)]
    w = ek.memory_address(*laid)
    truth, bound = product(z, inverse, state)
    assert w.dtype == state
    close(w, truth, bound)
    memory = normal(draw, (*leading, slots, latent), state)
    each = inverse.expand(*leading, latent, slots)
    read = ek.memory_read(laid[0], each.to(device), Laid(draw, memory, device).tensor)
    assert read.dtype == dtype
    size = np.abs(wide(z)) @ np.abs(wide(each)) @ np.abs(wide(memory))
    close(read, wide(z) @ wide(each) @ wide(memory), (latent + slots + 4) * eps(state) * size)


@cases
@given(DATA)
def test_accumulate_and_forget(device, data):
    draw = data.draw
    leading, count, slots, latent = draw(LEADING), draw(SIZES), draw(SIZES), draw(SIZES)
    dtype, state, ragged = draw(DTYPES), draw(STATES), draw(st.booleans())
    boundaries = None
    if ragged:
        leading = leading[:1] or (1,)
        lengths = draw(st.lists(SIZES, min_size=leading[0], max_size=leading[0]))
        ends = np.cumsum([0, *lengths])
        boundaries = torch.tensor(
            ends, dtype=draw(st.sampled_from([torch.int32, torch.int64])), device=device
        )
    shape = (int(ends[-1]),) if ragged else (*leading, count)
    w = normal(draw, (*shape, slots), dtype)
    z = normal(draw, (*shape, latent), dtype)
    alpha = normal(draw, shape, state) if draw(st.booleans()) else None
    start = (
        torch.eye(slots, dtype=state).expand(*leading, slots, slots),
        normal(draw, (*leading, slots, latent), state),
    )
    # Leading dimensions that are written must lie in one row.
    states = (
        [x.clone().to(device) for x in start] if len(leading) > 1 else [Laid(draw, x, device) for x in start]
    )
    A, B = (x.tensor if isinstance(x, Laid) else x for x in states)
    rows = [Laid(draw, x, device).tensor for x in (w, z)]
    given_alpha = None if alpha is None else Laid(draw, alpha, device).tensor
    got = ek.memory_accumulate_(A, B, *rows, given_alpha, cu_seqlens=boundaries)
    assert got[0] is A and got[1] is B
    assert all(x.rest_is_untouched() for x in states if isinstance(x, Laid))
    signed = wide(w) if alpha is None else wide(w) * wide(alpha)[..., None]
    for mine, before, other in ((A, start[0], wide(w)), (B, start[1], wide(z))):
        parts = [slice(a, b) for a, b in pairwise(ends)] if ragged else [...]
        changes = [product(signed[p].swapaxes(-1, -2), other[p], state) for p in parts]
        change, bound = (
            (np.stack(x) if ragged else x[0] for x in zip(*changes, strict=True)) if changes else (0, 0)
        )
        close(mine, wide(before) + change, 2 * bound + 2 * eps(state) * np.abs(wide(before)))
    if alpha is None:
        leverages = ek.memory_forget_(A, B, *rows, cu_seqlens=boundaries, tolerance=0.0)
        assert leverages.shape == shape
        size = 1 + float(np.square(wide(w)).sum()) + float(np.abs(wide(z)).sum() * np.abs(wide(w)).sum())
        close(A, wide(start[0]), 50 * eps(state) * size)
        close(B, wide(start[1]), 50 * eps(state) * size)
        if not ragged and slots:
            full = np.eye(slots) + wide(w).swapaxes(-1, -2).astype(float) @ wide(w).astype(float)
            solved = np.linalg.solve(full, w.double().numpy().swapaxes(-1, -2))
            truth = (w.double().numpy() * solved.swapaxes(-1, -2)).sum(-1)
            close(leverages, truth, 50 * eps(state) * size)


@cases
@given(DATA)
def test_solve(device, data):
    draw = data.draw
    leading, slots, latent, state = draw(LEADING), draw(SIZES), draw(SIZES), draw(STATES)
    root = normal(draw, (*leading, slots, slots))
    A, B = (root @ root.mT).to(state), normal(draw, (*leading, slots, latent), state)
    got = ek.memory_solve(Laid(draw, A, device).tensor, Laid(draw, B, device).tensor, ridge=0.5)
    system = (A + A.mT).double().numpy() / 2 + 0.5 * np.eye(slots)
    condition = np.linalg.cond(system).max() if system.size else 1
    truth = np.linalg.solve(system, B.double().numpy())
    close(got, truth, 8 * (slots + 1) * eps(state) * condition * np.abs(truth).max(initial=0))


@cases
@given(DATA)
def test_stream(device, data):
    draw = data.draw
    leading, slots, latent, state = draw(LEADING), draw(SIZES), draw(SIZES), draw(STATES)
    count, dtype = draw(st.sampled_from([0, 1, 2, 5, 70])), draw(DTYPES)
    P = torch.eye(slots, dtype=state).expand(*leading, slots, slots)
    M = normal(draw, (*leading, slots, latent), state)
    w = (normal(draw, (*leading, count, slots)) / max(1, slots) ** 0.5).to(dtype)
    z = normal(draw, (*leading, count, latent), dtype)
    got = ek.memory_stream(*(Laid(draw, x, device).tensor for x in (P, M, w, z)))
    p, m, rows, latents = (x.double().numpy().copy() for x in (P, M, w, z))
    readouts, leverages = np.zeros(latents.shape), np.zeros(rows.shape[:-1])
    for t in range(count):
        row, latent_row = rows[..., t, :, None], latents[..., t, None, :]
        u = p @ row
        share = 1 / (1 + (row.swapaxes(-1, -2) @ u))
        m = m + u @ (latent_row - row.swapaxes(-1, -2) @ m) * share
        p = p - u @ u.swapaxes(-1, -2) * share
        readouts[..., t, :] = (row.swapaxes(-1, -2) @ m)[..., 0, :]
        leverages[..., t] = (row.swapaxes(-1, -2) @ p @ row)[..., 0, 0]
    size = 1 + np.abs(m).max(initial=0) + np.abs(latents).max(initial=0)
    for mine, truth in zip(got, (p, m, readouts, leverages), strict=True):
        assert mine.dtype == state
        close(mine, truth, 20 * eps(state) * (count + slots + 4) * size)
