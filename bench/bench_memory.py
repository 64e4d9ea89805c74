"""Episodic memory: N sequential writes with a readout after each, and the pseudo-inverse alone.

    make bench                                           everything, on every device there is
    python -m pytest bench/bench_memory.py -k stream     one of them

Baselines, interleaved in one run, caches cold: an eager loop of rank-one updates, on GPUs also as a CUDA
graph; the block form in eager PyTorch and through `torch.compile`; the upstream algorithm, which inverts the
K × K matrix anew at every write by the Ben-Israel–Cohen iteration, 15 steps; and the same with
`torch.linalg.pinv`. Every variant is checked against fp64 before it is timed.
"""

import cases
import pytest
import torch
from baselines import calls
from harness import check, relative, timed

import engram_kernels as ek

# (slots K, latent size C, memories B): many small ones; Larimar's of one user and of many; a large one.
SIZES = [(32, 64, 64), (512, 768, 1), (512, 768, 64), (4096, 4096, 1), (4096, 4096, 64)]
COUNTS = [1, 4, 64, 1024]
# Within the range of the iteration, which starts from 5e-4 Aᵀ: eigenvalues of A from 1 to about 10.
RIDGE = 1.0
LOOP, UPSTREAM, PINV = "eager loop", "upstream iteration", "torch.linalg.pinv"
# Bytes and operations a second, seconds a launch, to leave out what takes too long: guesses, not measured.
RATES = {"cpu": (5e9, 5e10, 0.0), "cuda": (1e12, 5e12, 1e-5)}
PATIENCE = 8.0
CPU_STATE = 1 << 30


def eager_loop(P, M, w, z):
    """Rank-one updates in place, one after the other."""
    P, M, readouts, leverages = P.clone(), M.clone(), torch.empty_like(z), torch.empty_like(w[..., 0])
    for t in range(w.shape[1]):
        row = w[:, t : t + 1]
        u = row @ P
        gain = (row * u).sum(-1, keepdim=True)
        scaled = u.mT / (1 + gain)
        M.baddbmm_(scaled, z[:, t : t + 1] - row @ M)
        P.baddbmm_(scaled, u, alpha=-1)
        readouts[:, t : t + 1] = row @ M
        leverages[:, t] = (gain / (1 + gain)).flatten()
    return P, M, readouts, leverages


def chunk(P, M, w, z):
    u = P @ w.mT
    factor = torch.linalg.cholesky(torch.eye(w.shape[1], dtype=w.dtype, device=w.device) + w @ u)
    innovations = torch.linalg.solve_triangular(factor, z - w @ M, upper=False)
    v = torch.linalg.solve_triangular(factor, u.mT, upper=False).mT
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    readouts = z - innovations / pivots.unsqueeze(-1)
    return P - v @ v.mT, M + v @ innovations, readouts, 1 - pivots.square().reciprocal()


def in_chunks(function, P, M, w, z):
    outputs = []
    for part, latents in zip(w.split(64, 1), z.split(64, 1), strict=True):
        P, M, *rows = function(P, M, part, latents)
        outputs.append(rows)
    return P, M, *(torch.cat(column, 1) for column in zip(*outputs, strict=True))


def inverting(inverse, P, M, w, z):
    """Writes as upstream has them: A with the row added, its inverse anew, then M; `inverse` says how."""
    A, M, readouts = torch.linalg.inv(P), M.clone(), torch.empty_like(z)
    for t in range(w.shape[1]):
        row = w[:, t : t + 1]
        A.baddbmm_(row.mT, row)
        P = inverse(A)
        M.baddbmm_(P @ row.mT, z[:, t : t + 1] - row @ M)
        readouts[:, t : t + 1] = row @ M
    return P, M, readouts


def iteration(a, steps=15):
    inverse = 5e-4 * a.mT
    for _ in range(steps):
        inverse = 2 * inverse - inverse @ a @ inverse
    return inverse


compiled_chunk = torch.compile(chunk)


def seconds(device, slots, latent, batch, count, itemsize) -> dict[str, float]:
    """About how long each slow baseline takes."""
    writes, (byte_rate, operations, launch) = batch * count, RATES[device]
    return {
        LOOP: 3 * writes * slots * (slots + latent) * itemsize / byte_rate + 6 * count * launch,
        UPSTREAM: 60 * writes * slots**3 / operations + 40 * count * launch,
        PINV: 100 * writes * slots**3 / operations + 1000 * count * launch,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stream(benchmark, record, device, size, count, dtype):
    """P, M, and the readout and leverage after each of N writes, from an empty memory with a ridge."""
    slots, latent, batch = size
    slow = seconds(device, slots, latent, batch, count, dtype.itemsize)
    if device == "cpu":
        if slow[LOOP] > PATIENCE:
            pytest.skip(f"the eager loop alone would take about {slow[LOOP]:.0f} s on a CPU")
        state = batch * slots * (slots + latent) * dtype.itemsize
        if state > CPU_STATE:
            pytest.skip(f"a state of {state / 2**30:.0f} GiB, several times over, is left to GPUs")
    P = torch.eye(slots, dtype=dtype, device=device).div_(RIDGE).repeat(batch, 1, 1)
    M = torch.zeros(batch, slots, latent, dtype=dtype, device=device)
    w = torch.randn(batch, count, slots, dtype=dtype, device=device) / slots**0.5
    z = torch.randn(batch, count, latent, dtype=dtype, device=device)
    args = P, M, w, z
    variants = {
        "engram": lambda: ek.memory_stream(*args),
        LOOP: lambda: eager_loop(*args),
        **calls(eager_loop, args, device, names=("CUDA graph",)),
        "eager blocks": lambda: in_chunks(chunk, *args),
        "torch.compile": lambda: in_chunks(compiled_chunk, *args),
        UPSTREAM: lambda: inverting(iteration, *args),
        PINV: lambda: inverting(lambda a: torch.linalg.pinv(a, hermitian=True), *args),
    }
    variants = {name: f for name, f in variants.items() if slow.get(name, 0) <= PATIENCE}
    once = tuple(name for name in variants if slow.get(name, 0) > 1)

    A = w.double().mT @ w.double() + RIDGE * torch.eye(slots, dtype=torch.float64, device=device)
    truth = torch.linalg.solve(A, w.double().mT @ z.double())
    last = w[:, -1:].double() @ truth
    errors = {}
    for name, variant in variants.items():
        _, memory, readouts, *_ = variant()
        errors[name] = max(relative(memory, truth), relative(readouts[:, -1:], last))
    check(errors, slack=1e-4 if dtype == torch.float32 else 1e-7)

    cost = cases.stream(batch, slots, latent, count, dtype)
    case = f"stream {device} {str(dtype)[6:]} B={batch} K={slots} C={latent} N={count}"
    size = P.numel() + M.numel() + 10 * count * slots
    timed(benchmark, record, case, variants, device, size, cost.traffic, cost.work, errors, once)


@pytest.mark.parametrize("shape", [(512, 768), (4096, 4096)], ids=str)
def test_pseudo_inverse(benchmark, record, device, shape):
    """M⁺ of an fp32 memory, fp64 inside; the iteration in fp32, as upstream has it."""
    slots, latent = shape
    if device == "cpu" and slots > 1024:
        alone = 100 * slots**3 / RATES["cpu"][1]
        pytest.skip(f"torch.linalg.pinv alone would take about {alone:.0f} s on a CPU, several times")
    left, _ = torch.linalg.qr(torch.randn(slots, slots, dtype=torch.float64, device=device))
    right, _ = torch.linalg.qr(torch.randn(latent, slots, dtype=torch.float64, device=device))
    # Singular values where the iteration converges.
    a = (left * torch.linspace(1, 40, slots, dtype=torch.float64, device=device)) @ right.mT
    a = a.float()
    variants = {
        "engram": lambda: ek.pseudo_inverse(a),
        UPSTREAM: lambda: iteration(a),
        PINV: lambda: torch.linalg.pinv(a),
    }
    truth = torch.linalg.pinv(a.double())
    errors = {name: relative(variant(), truth) for name, variant in variants.items()}
    check(errors, slack=1e-4)
    cost = cases.pseudo_inverse(slots, latent, a.dtype)
    case = f"pseudo-inverse {device} float32 {slots}×{latent}"
    timed(benchmark, record, case, variants, device, 10**7, cost.traffic, cost.work, errors)
