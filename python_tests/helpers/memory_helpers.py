"""What the tests of memories share: latents, least squares in NumPy, memories that hold something."""

import numpy as np
import torch

from engram_kernels.memory import EpisodicMemory

K, C = 48, 64
STATE = ("gram", "cross", "count", "keyed", "energy", "ridges")


def latents(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def least_squares(memory, values, keys=None, ridge=None):
    """M by NumPy: the augmented system [W; √λ I] M = [Z; 0], with W = keys · pinv(M₀)."""
    values = values.double().numpy()
    keys = values if keys is None else keys.double().numpy()
    weights = keys @ np.linalg.pinv(memory.m0.double().numpy())
    ridge = memory.ridge if ridge is None else ridge
    slots = memory.slots
    system = np.concatenate([weights, np.sqrt(ridge) * np.eye(slots)])
    right = np.concatenate([values, np.zeros((slots, values.shape[1]))])
    return np.linalg.lstsq(system, right, rcond=None)[0]


def apart(got, expected):
    got, expected = (np.asarray(x, dtype=np.float64) for x in (got, expected))
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def frozen(memory):
    """All that must not change when a call is refused."""
    ledger = [(name, *entry) for name, entry in memory.ledger.items()]
    return {name: getattr(memory, name).clone() for name in STATE}, ledger


def assert_unchanged(memory, before):
    state, ledger = before
    for name, tensor in state.items():
        assert torch.equal(getattr(memory, name), tensor), name
    now = [(name, *entry) for name, entry in memory.ledger.items()]
    assert [(row[0], row[1], row[4]) for row in now] == [(row[0], row[1], row[4]) for row in ledger]
    assert all(torch.equal(a[2], b[2]) and torch.equal(a[3], b[3]) for a, b in zip(now, ledger, strict=True))


def filled(**settings):
    memory = EpisodicMemory(K, C, **settings)
    memory.write(latents(6, C), ids=list("abcdef"), texts=[f"fact {i}" for i in range(6)])
    return memory


def largest(entry):
    """A row of small entries but one."""
    row = latents(1, C) / 10
    row[0, 3] = entry
    return row


def mixed(**settings):
    """Two memories, three dtypes, keys of their own."""
    memory = EpisodicMemory(8, 6, batch=2, ridge="loo", encoder="minilm", **settings)
    memory.write(latents(2, 3, 6, dtype=torch.bfloat16), ids=["é", 1, "1", 2, 3, 4], texts=["Paris"] * 6)
    memory.write(latents(4, 6, seed=1).float(), latents(4, 6, seed=2).float(), ids=range(10, 14), memory=1)
    return memory
