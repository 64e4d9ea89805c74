"""The ridge memory against one dense fp64 solve a token; states, packed sequences, gradients, bad input."""

from itertools import pairwise

import pytest
import torch
from accuracy import error

import engram_kernels as ek
from engram_kernels.backends.torch import chunks as torch_chunks
from engram_kernels.backends.torch.ridge import prepare, whiten
from engram_kernels.errors import EngramError

VARIANTS = {"no decay": (False, False), "constant ridge": (True, False), "ridge decays": (True, True)}
SIZES = [(1, 4, 4), (7, 3, 5), (64, 8, 8), (150, 16, 8)]


def problem(length, keys, values, decays, batch=2, heads=3, dtype=torch.float32):
    q, k = torch.nn.functional.normalize(torch.randn(2, batch, length, heads, keys), dim=-1).to(dtype)
    v, beta = torch.randn(batch, length, heads, values).to(dtype), torch.rand(batch, length, heads)
    decay = -0.1 * torch.rand(batch, length, heads) if decays else None
    return q, k, v, beta, decay


def oracle(q, k, v, beta, decay, ridge, ridge_decays, state=None):
    """The sums of every token, and a dense solve with them."""
    q, k, v, beta = (x.double().cpu() for x in (q, k, v, beta))
    batch, length, heads, keys = q.shape
    gram, cross, log_decay = state or (
        torch.zeros(batch, heads, keys, keys).double(),
        torch.zeros(batch, heads, keys, v.shape[-1]).double(),
        torch.zeros(batch, heads).double(),
    )
    readouts = []
    for t in range(length):
        log = torch.zeros(batch, heads).double() if decay is None else decay[:, t].double().cpu()
        log_decay = log_decay + log
        weighted = (k[:, t] * beta[:, t, :, None]).unsqueeze(-1)
        gram = gram * log.exp()[..., None, None] + weighted * k[:, t].unsqueeze(-2)
        cross = cross * log.exp()[..., None, None] + weighted * v[:, t].unsqueeze(-2)
        left = log_decay.exp() if ridge_decays else torch.ones_like(log_decay)
        system = gram + torch.diag_embed(left.unsqueeze(-1) * ridge)
        readouts.append(torch.einsum("bhk,bhkv->bhv", q[:, t], torch.linalg.solve(system, cross)))
    return torch.stack(readouts, 1), (gram, cross, log_decay)


def bound(given, ridge, variant, truth):
    """Four times the error of the same formula in eager PyTorch in fp32.

    To first order an error is the problem's condition times the unit of the roundings: half of the last
    place, 2⁻²⁴, where a sum is rounded. A tensor core may cut it instead, which the ISA leaves open: then the
    unit is the whole of the last place, twice as much. By twice as much again may two orders of sums differ.
    """
    decays, ridge_decays = VARIANTS[variant]
    unit = torch.finfo(torch.float32).eps / 2  # of the result, which is rounded at least
    if decays and not ridge_decays:  # fp64 everywhere
        return 4 * unit
    q, k, v, beta, decay = (x if x is None else x.double() for x in given)
    (batch, _, heads, keys), values = q.shape, v.shape[-1]
    zeros = torch.zeros(batch, heads, keys, keys + values).double()
    state = *zeros.split([keys, values], -1), zeros[..., 0, 0]
    p = prepare(q, k, v, beta, decay, ridge, *state, None, ridge_decays, size=32)
    diagonal = torch.ones_like(p.beta) if p.log_decay is None else p.log_decay.exp()
    written = p.v * p.beta.sqrt().unsqueeze(-1)
    queries, rows, memory, written, diagonal = (x.float() for x in (*whiten(p)[1:], written, diagonal))
    factor = torch.linalg.cholesky(rows @ rows.mT + torch.diag_embed(diagonal))
    both = torch.cat([rows, written - rows @ memory], -1)
    both = torch.linalg.solve_triangular(factor, both, upper=False)
    directions, innovations = both.split([keys, values], -1)
    eager = p.chunks.join(queries @ memory + (queries @ directions.mT).tril() @ innovations)
    return 4 * max(error(eager, truth), unit)


def to(device, *tensors):
    return [x if x is None else x.to(device) for x in tensors]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_token_reads_the_least_squares_of_those_before(device, poisoned, size, variant):
    decays, ridge_decays = VARIANTS[variant]
    given = problem(*size, decays)
    ridge = torch.rand(3, size[1]).double() + 1e-2
    truth, after = oracle(*given, ridge, ridge_decays)
    got, state = ek.ridge_memory(*to(device, *given), ridge.to(device), ridge_decays=ridge_decays)
    assert got.dtype == torch.float32 and error(got, truth) < bound(given, ridge, variant, truth)
    assert all(error(mine, true) < 1e-13 for mine, true in zip(state[: 2 + decays], after, strict=False))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_a_small_ridge_costs_no_digits(device, dtype, bound, variant):
    """λ = 1e-3 at the width of a real head, where thirty steps of conjugate gradients are off by 3.6e-2."""
    decays, ridge_decays = VARIANTS[variant]
    given = problem(96, 64, 64, decays, batch=1, heads=1, dtype=dtype)
    truth, _ = oracle(*given, torch.full((1, 64), 1e-3).double(), ridge_decays)
    got, _ = ek.ridge_memory(*to(device, *given), ridge=1e-3, ridge_decays=ridge_decays)
    assert got.dtype == dtype and error(got, truth) < bound


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_goes_on(device, variant):
    """In pieces of any length as in one piece."""
    decays, ridge_decays = VARIANTS[variant]
    given = to(device, *problem(150, 8, 6, decays, dtype=torch.float64))
    whole, after = ek.ridge_memory(*given, ridge=0.1, ridge_decays=ridge_decays)
    pieces, state = [], None
    for start, end in ((0, 1), (1, 2), (2, 90), (90, 150)):
        piece = [x if x is None else x[:, start:end] for x in given]
        out, state = ek.ridge_memory(*piece, ridge=0.1, initial_state=state, ridge_decays=ridge_decays)
        pieces.append(out)
    assert error(torch.cat(pieces, 1), whole) < 1e-12
    assert all(error(mine, once) < 1e-12 for mine, once in zip(state[: 2 + decays], after, strict=False))


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_sequences_are_those_sequences(device, variant):
    decays, ridge_decays = VARIANTS[variant]
    q, k, v, beta, decay = to(device, *problem(160, 8, 6, decays, batch=1))
    ends = [0, 70, 70, 71, 160]
    packed, state = ek.ridge_memory(
        q, k, v, beta, decay, cu_seqlens=torch.tensor(ends).to(device), ridge_decays=ridge_decays
    )
    for i, (start, end) in enumerate(pairwise(ends)):
        one = [x if x is None else x[:, start:end] for x in (q, k, v, beta, decay)]
        alone, after = ek.ridge_memory(*one, ridge_decays=ridge_decays)
        assert error(packed[:, start:end], alone) < 1e-6
        assert all(error(mine[i : i + 1], single) < 1e-12 for mine, single in zip(state, after, strict=True))


@pytest.mark.parametrize("length", [5, 100])
def test_reading_at_the_key_is_the_streaming_write(device, length):
    """With q = k and P₀ = I/λ: rows √β k and √β v, and the readout over √β."""
    _, k, v, beta, _ = to(device, *problem(length, 8, 6, False, dtype=torch.float64))
    got, _ = ek.ridge_memory(k, k, v, beta, ridge=0.1)
    root = beta.double().sqrt().unsqueeze(-1)
    w, z = ((root * x).transpose(1, 2) for x in (k, v))
    P = (torch.eye(8).double() / 0.1).expand(2, 3, 8, 8).to(device)
    readouts = ek.memory_stream(P, torch.zeros(2, 3, 8, 6).double().to(device), w, z)[2]
    assert error(got * root, readouts.transpose(1, 2)) < 1e-10


def test_a_reset_forgets_all_but_the_ridge(device):
    q, k, v, beta, decay = to(device, *problem(80, 8, 6, True))
    decay[:, 40] = -60
    whole, _ = ek.ridge_memory(q, k, v, beta, decay, ridge=0.1)
    later = [x[:, 40:] for x in (q, k, v, beta, decay)]
    assert error(whole[:, 40:], ek.ridge_memory(*later, ridge=0.1)[0]) < 1e-6


@pytest.mark.parametrize("chunk", [2, 64])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_all_inputs(monkeypatch, variant, packed, chunk):
    monkeypatch.setattr(torch_chunks, "SIZE", chunk)
    decays, ridge_decays = VARIANTS[variant]
    batch, length = (1, 6) if packed else (2, 4)
    q, k, v, beta, decay = problem(length, 3, 2, decays, batch, heads=2, dtype=torch.float64)
    count = 4 if packed else batch
    root, cross = torch.randn(count, 2, 3, 3).double(), torch.randn(count, 2, 3, 2).double()
    leaves = [q, k, v, beta.double() + 0.1, torch.rand(2, 3).double() + 0.3]
    leaves += [root @ root.mT, cross, -torch.rand(count, 2).double()] + ([decay.double()] if decays else [])
    ends = torch.tensor([0, 3, 3, 4, 6]) if packed else None

    def function(q, k, v, beta, ridge, gram, cross, log_decay, decay=None):
        state = ek.RidgeState(gram, cross, log_decay)
        out, after = ek.ridge_memory(q, k, v, beta, decay, ridge, state, ends, ridge_decays)
        return out, *after

    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_whole_for_any_length(variant):
    decays, ridge_decays = VARIANTS[variant]

    def loss(q, k, v, beta, decay):
        return ek.ridge_memory(q, k, v, beta, decay, ridge=0.1, ridge_decays=ridge_decays)[0].square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5, 9, 70):
            given = problem(length, 4, 3, decays)
            results = []
            for function in (loss, compiled):
                leaves = [x if x is None else x.clone().requires_grad_() for x in given]
                function(*leaves).backward()
                results.append([leaf.grad for leaf in leaves if leaf is not None])
            assert all(torch.equal(mine, eager) for mine, eager in zip(*results, strict=True))


def test_no_tokens_leave_the_state(device):
    given = to(device, *problem(5, 4, 3, True))
    _, state = ek.ridge_memory(*given)
    out, after = ek.ridge_memory(*(x[:, :0] for x in given), initial_state=state)
    assert out.shape == (2, 0, 3, 3) and all(map(torch.allclose, after, state))


@pytest.mark.parametrize("function", [ek.ridge_memory, ek.delta_memory, ek.hebbian_memory])
def test_no_sequences_have_no_readouts(device, function):
    q, k, v, beta, decay = to(device, *problem(5, 4, 3, True, batch=1))
    assert function(q[:0], k[:0], v[:0], beta[:0], decay[:0])[0].shape == (0, 5, 3, 3)
    none = torch.zeros(1, dtype=torch.int64, device=device)
    empty = [x[:, :0] for x in (q, k, v, beta, decay)]
    assert function(*empty, cu_seqlens=none)[0].shape == (1, 0, 3, 3)


def test_a_forgotten_pair_was_never_written(device):
    q, k, v, beta, decay = to(device, *problem(60, 8, 6, True, dtype=torch.float64))
    _, state = ek.ridge_memory(q, k, v, beta, decay)
    without = beta.clone()
    without[:, 10] = 0
    _, never = ek.ridge_memory(q, k, v, without, decay)
    left = (beta[:, 10] * decay[:, 11:].sum(1).exp()).unsqueeze(1)
    state = ek.ridge_forget(state, k[:, 10:11], v[:, 10:11], left)
    assert all(error(mine, true) < 1e-7 for mine, true in zip(state, never, strict=True))
    assert error(state.gram, never.gram) < 1e-7
    with pytest.raises(ValueError, match="k: expected pairs that the state holds"):
        ek.ridge_forget(state, 100 * k[:, :1], v[:, :1])


BAD = {
    "q: expected shape": lambda a: {"q": a["q"][0]},
    "k: expected shape": lambda a: {"k": a["k"][..., :2]},
    "v: expected shape": lambda a: {"v": a["v"][:, :2]},
    "beta: expected shape": lambda a: {"beta": a["beta"][..., None]},
    "beta: expected numbers of at least 0": lambda a: {"beta": -a["beta"]},
    "decay: expected shape": lambda a: {"decay": a["decay"][:1]},
    "ridge: expected a finite number above 0": lambda a: {"ridge": 0.0},
    "ridge: expected shape": lambda a: {"ridge": torch.ones(4)},
    "ridge: expected numbers above 0": lambda a: {"ridge": -torch.ones(3, 4)},
    "q: expected a batch of 1": lambda a: {"cu_seqlens": torch.tensor([0, 5])},
    "cu_seqlens: expected numbers that do not fall": lambda a: {
        **{name: x[:1] for name, x in a.items()},
        "cu_seqlens": torch.tensor([0, 7]),
    },
    "k: expected finite values": lambda a: {"k": a["k"] / 0},
    "initial_state.gram: expected shape": lambda a: {
        "initial_state": ek.RidgeState(torch.zeros(2, 3, 4, 3), torch.zeros(2, 3, 4, 3), torch.zeros(2, 3))
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(device, message):
    arguments = dict(zip(("q", "k", "v", "beta", "decay"), problem(5, 4, 3, True), strict=True))
    arguments |= BAD[message](arguments)
    with pytest.raises(ValueError, match=message):
        ek.ridge_memory(**arguments)


def test_a_ridge_that_has_decayed_away_is_an_error(device):
    _, k, v, beta, decay = to(device, *problem(64, 4, 3, True))
    same = k[:, :1].expand_as(k).contiguous()
    with pytest.raises(EngramError, match="a ridge that decays vanishes"):
        ek.ridge_memory(same, same, v, beta, 40 * decay, ridge_decays=True)
