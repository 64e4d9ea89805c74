"""How an operator is defined.

An operator's run is: check its arguments, check their values, choose a backend, call it, check its results.
Values and results are checked as `checks` of waiting.py says: at once, which waits for the device, by a flag
on the device, or not at all.
"""

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling, is_dynamo_compiling

from .._namespace import NAMESPACE
from ..backends import select
from ..errors import EngramError
from .sharding import is_divided, register
from .waiting import flags, later, mode_for, synchronize_checks

_library = torch.library.Library(NAMESPACE, "DEF")
_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}
_calling = threading.local()

# The operators by name, for `engram doctor` and for tests.
OPERATORS: list[str] = []

ops = getattr(torch.ops, NAMESPACE)


def _first(argument: Tensor | list[Tensor]) -> Tensor:
    return argument[0] if isinstance(argument, list) else argument


def define(
    schema: str,
    check: Callable[..., None],
    canonical: Callable[..., None],
    fake: Callable,
    apart: Callable[..., None] | None = None,
    values: Callable[..., None] | None = None,
    results: Callable[..., None] | None = None,
    guard: Callable[..., tuple] | None = None,
    suspect: Callable[..., Tensor] | None = None,
    complaint: str = "",
    batched: Callable[[Callable], Callable] | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> Callable:
    """Define an operator, and return the call of it for arguments that have passed `check`.

    A public function runs `check` on what its caller gave, so that errors speak of the caller's shapes. Then
    it brings the arguments to canonical rank, layout and type, and makes the call that is returned here. An
    operator that is called otherwise, through `torch.ops` or by compiled code, runs both checks itself.

    Args:
        schema: its torch schema. The first argument, a tensor or a list that is not empty, says the device.
        check: raises on wrong shapes, types and devices, in any rank that the public function takes; sees no
            data.
        canonical: raises on tensors that are not as a backend takes them: rank, layout, type.
        fake: returns empty tensors of the right shapes, for tracing.
        apart: raises on memory that is written and also read, or written twice.
        values: raises on arguments whose data cannot be used; waits.
        results: raises on results that show that the request had no sound answer; waits.
        guard: `values` without a wait. Returns a flag on the device, not 0 where that would raise, and
            arguments which then leave what is written as it is.
        suspect: `results` without a wait. Returns a flag on the device, not 0 where that would raise.
        complaint: what is said of a flag that is not 0.
        batched: makes of the operator its rule under `torch.func.vmap` (batching.py).
        tags: what else compilers may want to know of it.
    """
    name = schema[: schema.index("(")]
    written = [
        i
        for i, argument in enumerate(torch._C.parse_schema(schema).arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    OPERATORS.append(name)
    # Its strides are as the caller has them: a layout of a compiler's choice could be one that is refused.
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides, *tags))

    def check_all(*args):
        canonical(*args)
        check(*args)

    def run(*args):
        if getattr(_calling, "checked", False):
            _calling.checked = False
        else:
            check_all(*args)
        first = _first(args[0])
        device = "cpu" if first.is_cpu else first.device.type  # whose name takes its time
        mode = mode_for(device)
        if mode == "sync" and flags:
            synchronize_checks()
        if apart is not None:
            apart(*args)
        found = select(name, device, args)
        if found.looks and mode != "off":
            refused = found.function(*args, look=True)
            if mode == "async":
                later(refused, complaint)
            elif refused:
                values(*args)  # names the culprit
                raise EngramError(complaint)
            result = None
        else:
            if values is not None and (mode == "sync" or (mode == "async" and guard is None)):
                values(*args)
            elif mode == "async" and guard is not None:
                flag, args = guard(*args)
                later(flag, complaint)
            result = found.function(*args)
        if results is not None and (mode == "sync" or (mode == "async" and suspect is None)):
            results(result, *args)
        if mode == "async" and suspect is not None:
            later(suspect(result, *args), complaint)
        for i in written:
            if isinstance(args[i], list):
                increment_version([x for x in args[i] if not x.is_inference()])
            elif not args[i].is_inference():
                increment_version(args[i])
        return result

    def trace(*args):
        check_all(*args)
        return fake(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", trace, lib=_library)
    operator = getattr(ops, name).default
    for kind, key in _AUTOCAST.items():
        _library.impl(name, without_autocast(operator, kind), key)
    if batched is not None:
        torch.library.register_vmap(f"{NAMESPACE}::{name}", batched(operator), lib=_library)

    def call(*args):
        if is_dynamo_compiling():
            return operator(*args)
        if type(args[0]) is not Tensor and is_divided(args[0]):
            # DTensor calls it again, on parts: nothing is known of those.
            register(ops)
            return operator(*args)
        _calling.checked = True
        try:
            return operator(*args)
        finally:
            _calling.checked = False

    return call


def without_autocast(operator: Callable, kind: str) -> Callable:
    """The operator for a device on which autocast is on: in the types of its own arguments."""

    def run(*args):
        with torch.autocast(kind, enabled=False):
            return operator(*args)

    return run


def apply(function: type[torch.autograd.Function], *args):
    """`function.apply(*args)`; outside torch.func without its slow look at signatures."""
    if is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def dynamic_size() -> int:
    """A size that depends on data, for a fake."""
    return torch.library.get_ctx().new_dynamic_size()


def backward(body: Callable) -> staticmethod:
    """A backward in its tensors' own types, also where autocast is on; differentiable once."""

    @functools.wraps(body)
    def run(ctx, *gradients: Tensor | None):
        known = [gradient for gradient in gradients if gradient is not None]
        if not known:
            return (None,) * len(ctx.needs_input_grad)
        with torch.autocast(known[0].device.type, enabled=False):
            return body(ctx, *gradients)

    return staticmethod(once_differentiable(run))
