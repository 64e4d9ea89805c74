"""Gradients taken under autocast, and gradients that come back not finite, as under a scaler."""

import pytest
import torch

import engram_kernels as ek


def _write(mode, ridge):
    torch.manual_seed(0)
    weight, keys, values = torch.randn(12, 9), torch.randn(3, 9), torch.randn(3, 12)
    inverse = torch.eye(9, dtype=torch.float64) * 0.5
    return (weight, keys, values), lambda *args: ek.low_rank_update(
        *args, mode=mode, ridge=ridge, inverse_covariance=inverse
    )


def _solve():
    torch.manual_seed(0)
    root = torch.randn(6, 6)
    return (root @ root.T + torch.eye(6), torch.randn(6, 4)), lambda A, B: ek.memory_solve(A, B, ridge=0.1)


def _stream():
    torch.manual_seed(0)
    given = torch.eye(5), torch.randn(5, 4), torch.randn(7, 5), torch.randn(7, 4)
    return given, lambda *args: ek.memory_stream(*args)[2]


def _sequence(function):
    torch.manual_seed(0)
    q, k, v, decay = *torch.randn(3, 1, 7, 2, 4), -torch.rand(1, 7, 2)
    return (q, k, v, decay), lambda q, k, v, decay: function(q, k, v, decay=decay)[0]


def _blend():
    torch.manual_seed(0)
    return (torch.randn(8, 3), torch.randn(8, 3), torch.randn(8, 3)), ek.graft_blend


def _inverse():
    torch.manual_seed(0)
    return (torch.randn(7, 4),), lambda a: ek.pseudo_inverse(a, ridge=0.1)


CASES = {
    "sequential": lambda: _write("sequential", 0.0),
    "joint": lambda: _write("joint", 0.3),
    "solve": _solve,
    "stream": _stream,
    "ridge": lambda: _sequence(ek.ridge_memory),
    "delta": lambda: _sequence(ek.delta_memory),
    "hebbian": lambda: _sequence(ek.hebbian_memory),
    "blend": _blend,
    "inverse": _inverse,
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_under_autocast_are_the_same_bits(case):
    given, function = CASES[case]()
    found = []
    for autocast in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            function(*leaves).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(plain, mine) for plain, mine in zip(*found, strict=True))
    assert all(gradient.any() for gradient in found[0])


def gradients(case, change):
    """The gradients of a case in fp64, for a gradient of ones changed at its first entry."""
    given, function = CASES[case]()
    leaves = [tensor.double().requires_grad_() for tensor in given]
    result = function(*leaves)
    gradient = torch.ones_like(result)
    gradient.view(-1)[0] = change
    result.backward(gradient)
    return torch.cat([leaf.grad.flatten() for leaf in leaves])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_gradients_that_are_not_finite_come_back_so(case, bad):
    """What depends on the entry is not finite, as a gradient scaler must see; what does not is as ever."""
    one, two, found = (gradients(case, change) for change in (1.0, 2.0, bad))
    depends = (one - two).abs() > 1e-9 * one.abs().max()
    assert depends.any() and not found[depends].isfinite().any()
    sound = found.isfinite()
    torch.testing.assert_close(found[sound], one[sound])
