"""The ridge memory: a readout after every token, beside the token loop, conjugate gradients, the cheap ends.

    python -m pytest bench/bench_ridge.py                     on every device there is
    ENGRAM_FLA=flash-linear-attention python -m pytest …      with that library's own code from a checkout

Baselines, interleaved in one run, caches cold: an eager loop of rank-one updates; the chunks in PyTorch,
which are the reference; the matrix products of the chunks alone, without a factorisation or a solve; from the
checkout the naive references of `mesa_net` (a dense solve a token, and thirty steps of conjugate gradients)
and of the delta rule; on GPUs its kernels, where it is installed. Errors are against dense fp64 solves.
"""

import importlib.util
import os
from pathlib import Path

import cases
import pytest
import torch
from harness import relative, timed
from torch.nn import functional as F

import engram_kernels as ek

# (T, heads, K = V): the acceptance's case, a longer one, and heads of real layers.
SIZES = [(2048, 4, 64), (512, 4, 64), (8192, 4, 64), (512, 16, 128), (2048, 16, 128)]
RIDGES = [1e-3, 0.25]
STEPS = 30
# What a dense solve a token may hold, and the tokens that the truth is solved for.
DENSE_BYTES = 1 << 30
ASKED = 64


def fla_file(path: str):
    """A module of a checkout that needs nothing else of it, or None."""
    folder = os.environ.get("ENGRAM_FLA")
    if not folder or importlib.util.find_spec("einops") is None:
        return None
    source = Path(folder) / path
    spec = importlib.util.spec_from_file_location(f"fla_{source.parent.name}_naive", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def token_loop(q, k, v, beta, ridge):
    """Rank-one updates of P and M, all heads at once, in the inputs' type."""
    batch, length, heads, keys = q.shape
    P = torch.eye(keys, dtype=q.dtype, device=q.device).div(ridge).repeat(batch * heads, 1, 1)
    M = torch.zeros(batch * heads, keys, v.shape[-1], dtype=q.dtype, device=q.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).unsqueeze(2) for x in (q, k, v))
    beta, out = beta.transpose(1, 2).reshape(-1, length, 1, 1), torch.empty_like(v)
    for t in range(length):
        u = P @ k[:, t].mT
        scaled = u * (beta[:, t] / (1 + beta[:, t] * (k[:, t] @ u)))
        M.baddbmm_(scaled, v[:, t] - k[:, t] @ M)
        P.baddbmm_(scaled, u.mT, alpha=-1)
        out[:, t] = q[:, t] @ M
    return out.view(batch, heads, length, -1).transpose(1, 2)


def matrix_products(length, heads, keys, device, chunk=64):
    """The products of a chunk's algebra in fp64, with everything that they need at hand."""
    count = heads * length // chunk

    def some(*shape):
        return torch.randn(count, *shape, dtype=torch.float64, device=device)

    x, y, state, square = some(chunk, keys), some(chunk, keys), some(keys, keys), some(chunk, chunk)

    def products():
        for left, right in ((x.mT, x), (x.mT, y), (x, x.mT), (x, state), (y, state), (y, x.mT), (square, y)):
            torch.bmm(left, right)

    return products


def truth(q, k, v, beta, ridge):
    """Dense solves in fp64 at some tokens, which are returned too: the last one among them."""
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    tokens = torch.linspace(0, q.shape[1] - 1, min(ASKED, q.shape[1])).long().tolist()
    identity = ridge * torch.eye(q.shape[-1], dtype=torch.float64, device=q.device)
    found = []
    for t in tokens:
        weighted = (k * beta.unsqueeze(-1))[:, : t + 1]
        gram = torch.einsum("bthk,bthl->bhkl", weighted, k[:, : t + 1])
        cross = torch.einsum("bthk,bthv->bhkv", weighted, v[:, : t + 1])
        found.append(torch.einsum("bhk,bhkv->bhv", q[:, t], torch.linalg.solve(gram + identity, cross)))
    return torch.stack(found, 1), tokens


def on_torch(function):
    def call():
        with ek.use_backend("torch"):
            return function()

    return call


@pytest.mark.parametrize("ridge", RIDGES, ids=lambda ridge: f"ridge={ridge:g}")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ridge_memory(benchmark, record, device, size, ridge):
    """Readouts and the final state, fp32 in and out, no decay."""
    length, heads, keys = size
    torch.manual_seed(0)
    q, k = F.normalize(torch.randn(2, 1, length, heads, keys, device=device), dim=-1)
    v, beta = torch.randn_like(q), torch.rand(1, length, heads, device=device)
    log, lamb = torch.zeros_like(beta), torch.full((heads, keys), ridge, device=device)
    variants = {
        "engram": lambda: ek.ridge_memory(q, k, v, beta, ridge=ridge)[0],
        "chunks in PyTorch": on_torch(lambda: ek.ridge_memory(q, k, v, beta, ridge=ridge)[0]),
        "token loop": lambda: token_loop(q, k, v, beta, ridge),
    }
    if mesa := fla_file("fla/ops/mesa_net/naive.py"):
        if 4 * length * heads * keys * keys <= DENSE_BYTES:
            variants["fla, dense solves"] = lambda: mesa.naive_mesa_net_exact(q, k, v, log, lamb, beta)[0]
        variants[f"fla, {STEPS} steps"] = lambda: mesa.naive_mesa_net_CG(
            q, k, v, log, lamb, beta, 64, max_CG_iteration=STEPS
        )[0]
    if device == "cuda" and importlib.util.find_spec("fla"):
        from fla.ops.mesa_net import chunk_mesa_net

        halves = [x.bfloat16() for x in (q, k, v)]
        variants["fla's kernel, bf16"] = lambda: chunk_mesa_net(
            *halves, log, beta, lamb, max_CG_iteration=STEPS, output_final_state=True
        )[0]
    expected, tokens = truth(q, k, v, beta, ridge)
    errors = {name: relative(variant()[:, tokens], expected) for name, variant in variants.items()}
    assert errors["engram"] <= 1e-5 and errors["chunks in PyTorch"] <= 1e-5, errors
    once = tuple(name for name in variants if "fla" in name and "kernel" not in name)
    variants["matrix products alone"] = matrix_products(length, heads, keys, device)

    cost = cases.ridge_memory(length, heads, keys, keys, torch.float32)
    case = f"ridge {device} T={length} H={heads} K=V={keys} ridge={ridge:g}"
    timed(benchmark, record, case, variants, device, 10**7, cost.traffic, cost.work, errors, once)


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_cheap_ends(benchmark, record, device, size):
    """The delta rule and Hebb's on the same shapes, beside the ridge memory."""
    length, heads, keys = size
    torch.manual_seed(0)
    q, k = F.normalize(torch.randn(2, 1, length, heads, keys, device=device), dim=-1)
    v, beta = torch.randn_like(q), torch.rand(1, length, heads, device=device)
    variants = {
        "engram": lambda: ek.delta_memory(q, k, v, beta)[0],
        "Hebb's rule": lambda: ek.hebbian_memory(q, k, v, beta)[0],
        "ridge memory": lambda: ek.ridge_memory(q, k, v, beta)[0],
    }
    wide = [x.double() for x in (q, k, v, beta)]
    errors = {"engram": relative(variants["engram"](), ek.delta_memory(*wide)[0])}
    if naive := fla_file("fla/ops/delta_rule/naive.py"):
        turned = [x.transpose(1, 2) for x in (q * keys**0.5, k, v, beta)]  # it scales queries itself

        def theirs():
            return naive.delta_rule_recurrence(*turned)[0].transpose(1, 2)

        variants["fla, delta rule's loop"] = theirs
        errors["fla, delta rule's loop"] = relative(theirs(), ek.delta_memory(*wide)[0])
    assert all(error <= 1e-5 for error in errors.values()), errors
    cost = cases.delta_memory(length, heads, keys, keys, torch.float32)
    case = f"delta {device} T={length} H={heads} K=V={keys}"
    once = tuple(name for name in variants if "fla" in name)
    timed(benchmark, record, case, variants, device, 10**7, cost.traffic, cost.work, errors, once)


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_variants_under_a_decay(benchmark, record, device, size):
    """A constant ridge takes a factorisation a token, one that decays a chunk's products; and gradients."""
    length, heads, keys = size
    torch.manual_seed(0)
    q, k = F.normalize(torch.randn(2, 1, length, heads, keys, device=device), dim=-1)
    v, beta = torch.randn_like(q), torch.rand(1, length, heads, device=device)
    decay = -0.05 * torch.rand(1, length, heads, device=device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, beta)]
    variants = {
        "engram": lambda: ek.ridge_memory(q, k, v, beta, decay, 0.25)[0],
        "ridge that decays": lambda: ek.ridge_memory(q, k, v, beta, decay, 0.25, ridge_decays=True)[0],
        "forward and backward, no decay": lambda: ek.ridge_memory(*leaves)[0].sum().backward(),
    }
    lamb = torch.full((heads, keys), 0.25, device=device)
    wide = [x.double() for x in (q, k, v, beta, decay, lamb)]
    errors = {"engram": relative(variants["engram"](), ek.ridge_memory(*wide)[0])}
    if mesa := fla_file("fla/ops/mesa_net/naive.py"):

        def theirs():
            return mesa.naive_mesa_net_CG(q, k, v, decay, lamb, beta, 64, max_CG_iteration=STEPS)[0]

        variants[f"fla, {STEPS} steps"] = theirs
        errors[f"fla, {STEPS} steps"] = relative(theirs(), ek.ridge_memory(*wide)[0])
    assert errors["engram"] <= 1e-5, errors
    cost = cases.ridge_memory(length, heads, keys, keys, torch.float32, factorisations=length)
    case = f"ridge {device} T={length} H={heads} K=V={keys} decay"
    timed(benchmark, record, case, variants, device, 10**7, cost.traffic, cost.work, errors)
