"""torch.func: gradients and vmap of what is differentiable, against loops of calls and autograd's own."""

import pytest
import torch
from torch.func import grad, vmap

import engram_kernels as ek

WIDE = torch.float64


def spd(*shape):
    root = torch.randn(*shape, shape[-1], dtype=WIDE)
    return root @ root.mT + torch.eye(shape[-1], dtype=WIDE)


def stream(P, M, w, z):
    return ek.memory_stream(P, M, w, z)[2]


def update(mode, ridge, keys):
    inverse = spd(6)

    def call(weight, keys, values):
        return ek.low_rank_update(weight, keys, values, mode=mode, ridge=ridge, inverse_covariance=inverse)

    return call, lambda: (
        torch.randn(4, 6).double(),
        torch.randn(keys, 6).double(),
        torch.randn(keys, 4).double(),
    )


def three(size):
    return lambda: tuple(torch.randn(3, size, dtype=WIDE))


BASE = {size: ek.pack_mask(torch.arange(size) % 3 == 0) for size in (16, 13)}

# A function, and what makes arguments for it; each is one sample.
CASES = {
    "blend": (ek.graft_blend, three(13)),
    "blend, base of whole bytes": (lambda *x: ek.graft_blend(*x, BASE[16], 0.5), three(16)),
    "blend, base": (lambda *x: ek.graft_blend(*x, BASE[13], 0.5), three(13)),
    "packed blend": (lambda pre, ft, _: ek.graft_blend_packed(pre, ft, BASE[13]), three(13)),
    "update, independent": update("independent", 0.0, 1),
    "update, sequential": update("sequential", 0.0, 3),
    "update, joint": update("joint", 0.3, 2),
    "update, joint, many keys": update("joint", 0.3, 8),
    "solve": (lambda A, B: ek.memory_solve(A, B, ridge=0.1), lambda: (spd(5), torch.randn(5, 3, dtype=WIDE))),
    "stream": (
        stream,
        lambda: (spd(4), *(torch.randn(*s, dtype=WIDE) for s in ((4, 3), (6, 4), (6, 3)))),
    ),
    "inverse": (lambda a: ek.pseudo_inverse(a, ridge=0.1), lambda: (torch.randn(6, 4, dtype=WIDE),)),
    "read": (
        lambda z, M: ek.memory_read(z, ek.pseudo_inverse(M, ridge=0.1), M),
        lambda: (torch.randn(3, 6, dtype=WIDE), torch.randn(4, 6, dtype=WIDE)),
    ),
}


def loss_of(function):
    return lambda *args: function(*args).sin().sum()


@pytest.mark.parametrize("case", CASES)
def test_grad(case):
    function, draw = CASES[case]
    args = draw()
    leaves = [x.clone().requires_grad_() for x in args]
    got = grad(loss_of(function), argnums=tuple(range(len(args))))(*args)
    expected = torch.autograd.grad(loss_of(function)(*leaves), leaves, allow_unused=True)
    for mine, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if truth is None else truth)


@pytest.mark.parametrize("case", CASES)
def test_vmap(case):
    function, draw = CASES[case]
    samples = [draw() for _ in range(3)]
    args = [torch.stack(x, dim=-1) for x in zip(*samples, strict=True)]  # not in front
    got = vmap(function, in_dims=-1)(*args)
    for mine, sample in zip(got, samples, strict=True):
        torch.testing.assert_close(mine, function(*sample))
    shared = vmap(function, in_dims=(-1, *[None] * (len(args) - 1)))(args[0], *samples[0][1:])
    torch.testing.assert_close(shared[2], function(samples[2][0], *samples[0][1:]))


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_each_sample(case):
    function, draw = CASES[case]
    samples = [draw() for _ in range(3)]
    args = [torch.stack(x) for x in zip(*samples, strict=True)]
    got = vmap(grad(loss_of(function)))(*args)
    for mine, sample in zip(got, samples, strict=True):
        torch.testing.assert_close(mine, grad(loss_of(function))(*sample))
