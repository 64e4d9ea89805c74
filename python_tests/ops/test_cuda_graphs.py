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


def captured(call):
    """A graph of a call that has run once on its stream."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        call()
    return graph


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_plans_are_captured():
    """A step, a swap and a choice, replayed on other data than was captured; other gradients are refused."""
    pre, ft, logits, grads = ([torch.randn(300, 7).cuda(), torch.randn(11).cuda()] for _ in range(4))
    out, expected = [torch.zeros_like(x) for x in pre], [x.clone() for x in logits]
    at = [torch.arange(0, x.numel(), 3, device="cuda") for x in pre]
    step, top = ek.GraftPlan(logits, pre, ft, out=out), ek.TopKPlan(logits, 100)
    swap = ek.SparsePlan(out, at, [x.view(-1)[places] for x, places in zip(ft, at, strict=True)])
    graphs = [captured(lambda: step.step_(grads, lr=0.5)), captured(swap.swap_), captured(top.select_)]
    for logit, start, gradient in zip(logits, expected, grads, strict=True):
        logit.copy_(start)
        gradient.neg_()
    graphs[0].replay()
    ek.graft_mask_step_(expected, grads, pre, ft, lr=0.5)
    torch.testing.assert_close(logits, expected)
    before = [x.clone() for x in out]
    graphs[1].replay()
    graphs[1].replay()
    assert all(torch.equal(x, y) for x, y in zip(out, before, strict=True))
    graphs[2].replay()
    assert all(torch.equal(x, y) for x, y in zip(top.masks, ek.top_k_mask(logits, 100), strict=True))
    others = [x.clone() for x in grads]
    with pytest.raises(ek.EngramError, match="grads: expected those of the last step"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            step.step_(others)
