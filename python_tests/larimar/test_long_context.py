"""More facts than a memory holds, read recursively."""

import pytest
import torch
from larimar_helpers import LATENT

from engram_kernels.larimar import read_recursively
from engram_kernels.memory import EpisodicMemory


@pytest.mark.parametrize("keyed", [False, True])
def test_recursive_reading_holds_more_than_a_memory(keyed):
    memory = EpisodicMemory(16, 16, ridge=1e-9)
    values = torch.randn(200, 16, dtype=torch.float64)
    keys = torch.randn(200, 16, dtype=torch.float64) if keyed else values
    addressing = "key" if keyed else "content"
    found = read_recursively(values, keys, memory, keys if keyed else None, chunk=5, addressing=addressing)
    assert (torch.cdist(found, values).argmin(-1) == torch.arange(200)).all()
    if keyed:
        torch.testing.assert_close(found, values, rtol=1e-3, atol=1e-3)
        single = EpisodicMemory(16, 16, ridge=1e-9)
        single.write(values, keys=keys)
        one = torch.cdist(single.read(keys, addressing="key"), values).argmin(-1)
        assert (one == torch.arange(200)).double().mean() < 0.5


@pytest.mark.parametrize("addressing", ["key", "content"])
def test_recursive_reading_of_one_chunk_is_reading(addressing):
    memory = EpisodicMemory(16, LATENT, ridge=1e-3)
    values, queries = torch.randn(6, LATENT), torch.randn(4, LATENT)
    found = read_recursively(values, queries, memory, chunk=6, addressing=addressing)
    memory.write(values)
    torch.testing.assert_close(found, memory.read(queries, addressing=addressing), rtol=1e-4, atol=1e-4)


def test_recursive_reading_is_differentiable_and_checks():
    memory = EpisodicMemory(8, 4, ridge=0.1)
    values = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def read(values, queries):
        return read_recursively(values, queries, memory, chunk=3, addressing="key")

    assert torch.autograd.gradcheck(read, (values, queries))
    assert not read_recursively(values[:0], queries, memory).any()
    with pytest.raises(ValueError, match="chunk: expected at least 2, got 1"):
        read_recursively(values, queries, memory, chunk=1)
    with pytest.raises(ValueError, match="keys: expected shape"):
        read_recursively(values, queries, memory, keys=values[:3])
    with pytest.raises(ValueError, match="addressing: expected 'key' or 'content', got 'x'"):
        read_recursively(values, queries, memory, addressing="x")
