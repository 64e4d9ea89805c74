"""How an operator is defined.

An operator's run is: check shapes and types, check values, choose a backend, call it, check its results. The
value checks read the tensors, so they wait for the device; they are left out while a CUDA graph is captured.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .._namespace import NAMESPACE
from ..backends import select

_library = torch.library.Library(NAMESPACE, "DEF")

# The operators by name, for `engram doctor` and for tests.
OPERATORS: list[str] = []


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The type that products are accumulated in: fp64 for fp64 weights, fp32 for all others."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _first(argument: Tensor | list[Tensor]) -> Tensor:
    return argument[0] if isinstance(argument, list) else argument


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def define(
    schema: str,
    arguments: Callable[..., None],
    fake: Callable,
    values: Callable[..., None] | None = None,
    results: Callable[..., None] | None = None,
) -> None:
    """Define an operator.

    Args:
        schema: its torch schema. The first argument, a tensor or a list that is not empty, says the device.
        arguments: raises on wrong shapes, types and devices; sees no data.
        fake: returns empty tensors of the right shapes, for tracing.
        values: raises on arguments whose data cannot be used.
        results: raises on results that show that the request had no sound answer.
    """
    name = schema[: schema.index("(")]
    written = [
        i
        for i, argument in enumerate(torch._C.parse_schema(schema).arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    OPERATORS.append(name)
    _library.define(schema)

    def run(*args):
        arguments(*args)
        device = _first(args[0]).device
        capturing = _capturing(device)
        if values is not None and not capturing:
            values(*args)
        function = select(name, device, args)
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                result = function(*args)
        else:
            result = function(*args)
        if results is not None and not capturing:
            results(result, *args)
        for i in written:
            tensors = args[i] if isinstance(args[i], list) else [args[i]]
            torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])
        return result

    def trace(*args):
        arguments(*args)
        return fake(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", trace, lib=_library)


ops = getattr(torch.ops, NAMESPACE)
