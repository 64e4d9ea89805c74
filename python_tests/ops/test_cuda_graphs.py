"""Every kernel in a CUDA graph: captured over zeros, replayed on data, and equal to the call itself."""

import pytest
import torch
from operator_calls import operator_calls

import engram_kernels as ek
from engram_kernels.backends import explain, unavailable
from engram_kernels.ops.define import OPERATORS, ops

# None where torch sees no GPU: then nothing here is run.
CASES = [
    (backend, name)
    for backend in ("triton", "cuda")
    if unavailable(backend, "cuda") is None
    for name in OPERATORS
]


def each(function, value):
    """Apply a function to every tensor of an argument or a result."""
    if isinstance(value, (list, tuple)):
        return type(value)(each(function, part) for part in value)
    return function(value) if isinstance(value, torch.Tensor) else value


def tensors(value) -> list[torch.Tensor]:
    found = []
    each(found.append, value)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "name"), CASES)
def test_a_graph_computes_what_the_call_does(backend, name):
    given = each(lambda tensor: tensor.cuda(), operator_calls()[name])
    operator = getattr(ops, name)
    with ek.use_backend(backend):
        if explain(name, "cuda", given)[0] != (backend, None):
            pytest.skip(f"{backend} has no kernel for these arguments")
        called = each(torch.clone, given)
        expected = operator(*called)
        captured = each(torch.clone, given)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            operator(*each(torch.clone, given))  # libraries allocate at their first call on a stream
        torch.cuda.current_stream().wait_stream(aside)
        for tensor in tensors(captured):
            tensor.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            result = operator(*captured)
        assert not any(tensor.any() for tensor in tensors(captured)), "the capture itself has run"
        for mine, data in zip(tensors(captured), tensors(given), strict=True):
            mine.copy_(data)
        graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(tensors(result), tensors(expected))
    torch.testing.assert_close(tensors(captured), tensors(called))
