"""Other ways to run the same algebra, as plug-ins: eager PyTorch, `torch.compile`, a CUDA graph of eager.

A baseline takes a function and the arguments it will be called with, and returns a call without arguments, or
None where it cannot run. What an upstream does differently is a function of the benchmark's own.
"""

from collections.abc import Callable

import torch

Call = Callable[[], object]
BASELINES: dict[str, Callable[..., Call | None]] = {}


def baseline(name: str) -> Callable:
    """Register the decorated function under the name that tables show."""

    def register(function: Callable[..., Call | None]) -> Callable[..., Call | None]:
        BASELINES[name] = function
        return function

    return register


@baseline("eager")
def eager(function: Callable, arguments: tuple, device: str) -> Call:
    return lambda: function(*arguments)


# Compiled once for all shapes, as a user would: the second shape makes the sizes dynamic.
_compiled: dict[Callable, Callable] = {}


@baseline("torch.compile")
def compiled(function: Callable, arguments: tuple, device: str) -> Call:
    call = _compiled.setdefault(function, torch.compile(function))
    return lambda: call(*arguments)


@baseline("CUDA graph")
def cuda_graph(function: Callable, arguments: tuple, device: str) -> Call | None:
    """Eager's kernels without its launches; a function that waits for the GPU cannot be captured."""
    if device != "cuda":
        return None
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        function(*arguments)  # libraries allocate at their first call
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*arguments)

    def replay() -> object:
        graph.replay()
        return result

    return replay


def calls(
    function: Callable, arguments: tuple, device: str, names: tuple[str, ...] = tuple(BASELINES)
) -> dict[str, Call]:
    """The baselines that can run here, ready to be called."""
    found = {name: BASELINES[name](function, arguments, device) for name in names}
    return {name: call for name, call in found.items() if call is not None}
