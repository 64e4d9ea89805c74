"""Sound arguments of every operator, for what torch asks of all of them."""

import torch

import engram_kernels as ek


def operator_calls() -> dict[str, tuple]:
    """Arguments of each operator, by its name."""
    return {**_low_rank(), **_graft(), **_memory(), **_ridge()}


def _low_rank() -> dict[str, tuple]:
    weight, keys, values = torch.randn(2, 5, 7), torch.randn(2, 3, 7), torch.randn(2, 3, 5)
    left, right, preconditioned = values.mT.contiguous(), keys, keys.double()
    system = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    return {
        "precondition": (keys, torch.randn(2, 7, 7)),
        "residual_gram": (weight, keys, values, preconditioned),
        "residual_ridge": (weight, torch.randn(2, 9, 7), torch.randn(2, 9, 5), torch.eye(7)[None], 0.5),
        "small_solve": (system, values, "cholesky"),
        "apply_low_rank_": (weight.clone(), left, right, 0.5),
        "low_rank_update": (weight, left, right, 0.5),
        "second_moment_": (torch.zeros(7, 7), torch.randn(4, 7), torch.ones(4, dtype=torch.bool)),
    }


def _graft() -> dict[str, tuple]:
    pre, ft, logits, gradient = torch.randn(4, 20)
    mask = torch.rand(20) < 0.5
    packed = ek.pack_mask(mask)
    at = torch.tensor([3, 5], dtype=torch.int32)
    return {
        "graft_blend": (pre, ft, logits, packed, 0.5),
        "graft_logits_gradient": (gradient, pre, ft, logits, None, 0.5),
        "_foreach_graft_blend_": ([torch.zeros(20)], [pre], [ft], [logits], [packed], 0.5),
        "graft_mask_step_": ([logits.clone()], [gradient], [pre], [ft], [], 0.5, 0.1, 0.0, [torch.zeros(20)]),
        "pack_mask": (mask,),
        "unpack_mask": (packed, 20),
        "graft_blend_packed": (pre, ft, packed),
        "top_k_mask": ([pre], [ft], 3),
        "sparse_faults": ([pre], [at]),
        "sparse_diff": ([pre], [ft], 0.5, False),
        "sparse_apply_": ([pre.clone()], [at], [torch.ones(2)], [torch.zeros(2)], False),
    }


def _memory() -> dict[str, tuple]:
    w, z = torch.randn(2, 5, 3) / 3**0.5, torch.randn(2, 5, 4)
    A, B = w.double().mT @ w.double(), w.double().mT @ z.double()
    P, M = torch.eye(3).repeat(2, 1, 1), torch.randn(2, 3, 4)
    return {
        "memory_accumulate_": (A.clone(), B.clone(), w, z, torch.ones(2, 5, dtype=torch.float64), None),
        "memory_solve": (A, B, 0.1, True),
        "memory_leverages": (A, w, None, 0.1, 0.99),
        "memory_stream": (P, M, w, z),
        "memory_stream_gradient": (P, M, w, z, P, M, z, w[..., 0].contiguous()),
        "pseudo_inverse": (torch.randn(2, 5, 3, dtype=torch.float64), None, 1e-12, 1e300),
    }


def _ridge() -> dict[str, tuple]:
    q, k, v = torch.randn(2, 5, 2, 3), torch.randn(2, 5, 2, 3), torch.randn(2, 5, 2, 4)
    beta, decay = torch.rand(2, 5, 2), -torch.rand(2, 5, 2)
    state = torch.zeros(2, 2, 3, 3).double(), torch.zeros(2, 2, 3, 4).double(), torch.zeros(2, 2).double()
    arguments = q, k, v, beta, decay, torch.ones(2, 3), *state, None, False
    memory = torch.zeros(2, 2, 3, 4)
    return {
        "ridge_memory": arguments,
        "ridge_memory_gradient": (v, *state, *arguments),
        "linear_memory": (q, k, v, beta, decay, memory, None, True),
        "linear_memory_gradient": (v, memory, q, k, v, beta, decay, memory, None, True),
    }
