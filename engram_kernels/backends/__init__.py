"""Which implementation serves which operator: a table, an order (order.py), a way to force one.

A backend is a subpackage with one file an operator family. Importing it fills the table through `implements`;
its module-level `unavailable()` says in one sentence why it cannot run here, or None.

The module itself can be called: `backends()` says of every backend whether it can run here.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from ..errors import EngramError
from .order import Size, order, size_of

NAMES = ("torch", "cpu", "triton", "cuda")
# The one that imports this package: a fork of it may load a backend later, and has not torch's threads.
PROCESS = os.getpid()


class Implementation(NamedTuple):
    """One backend's function for one operator.

    Attributes:
        function: takes the operator's arguments.
        declines: says of the same arguments why the function does not take them, or None.
        looks: the function also takes `look=True`: then it looks at the data first. Where they cannot be used
            it writes nothing. It returns whether that is so, on a GPU as a flag there.
    """

    function: Callable
    declines: Callable[..., str | None]
    looks: bool = False


_table: dict[str, dict[str, Implementation]] = {}
# By the `with` block that forces it: blocks of several threads need not end in the order of their beginning.
_forced: list[tuple[object, str]] = []


def implements(
    operator: str,
    backend: str,
    declines: Callable[..., str | None] = lambda *args: None,
    looks: bool = False,
) -> Callable:
    """Register the decorated function as `backend`'s implementation of `operator`."""

    def register(function: Callable) -> Callable:
        _table.setdefault(operator, {})[backend] = Implementation(function, declines, looks)
        return function

    return register


def _module(backend: str):
    return importlib.import_module(f"{__name__}.{backend}")


@functools.cache
def unavailable(backend: str, device: str | None = None) -> str | None:
    """Say why a backend cannot run here (on that type of device, if one is named), or None if it can."""
    module = _module(backend)
    reason = module.unavailable()
    if reason is None and device is not None and module.DEVICES is not None and device not in module.DEVICES:
        reason = f"serves {' and '.join(module.DEVICES)} tensors, not {device}"
    return reason


class _Backends(ModuleType):
    """This module, which answers when it is called as a function."""

    def __call__(self) -> dict[str, str | None]:
        """Return every backend by name, with why it cannot run on this machine, or None where it can.

        Example:
            >>> ek.backends()["torch"] is None
            True
        """
        return {name: unavailable(name) for name in NAMES}


sys.modules[__name__].__class__ = _Backends


def forced() -> str | None:
    """Return the backend forced by `use_backend` or by the environment variable ENGRAM_BACKEND, read once."""
    return _forced[-1][1] if _forced else _environment()


@functools.cache
def _environment() -> str | None:
    name = os.environ.get("ENGRAM_BACKEND") or None
    if name is not None and name not in NAMES:
        raise ValueError(f"ENGRAM_BACKEND: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator by one backend inside the `with` block, in all threads of the process.

    An operator or an argument that the backend has no kernel for is served by the torch reference.

    Args:
        name: "torch", "cpu", "triton" or "cuda".

    Raises:
        ValueError: no backend has that name.
        EngramError: the backend cannot run on this machine; the message says why.

    Example:
        >>> with ek.use_backend("torch"):
        ...     ek.apply_low_rank_(weight, left, right)
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    reason = unavailable(name)
    if reason is not None:
        raise EngramError(f"name: expected a backend that can run here, got {name!r}, which cannot: {reason}")
    block = object(), name
    _forced.append(block)
    try:
        yield
    finally:
        _forced.remove(block)


def _asked(operator: str, device: str, size: Size | None, name: str | None) -> tuple[str, ...]:
    """Return the backends in the order in which they are asked; `name` is forced."""
    if name is None:
        return order(operator, device, size)
    if reason := unavailable(name, device):
        raise EngramError(f"backend: expected one that serves {device} tensors, got {name!r}: {reason}")
    return (name,) if name == "torch" else (name, "torch")


def _implementation(operator: str, backend: str, device: str) -> Implementation | str:
    """Return a backend's implementation of an operator, or the reason why it has none to offer."""
    return unavailable(backend, device) or _table.get(operator, {}).get(backend, "has no kernel for it")


def _declines(backend: str, found: Implementation, args: tuple) -> str | None:
    """Say why a backend does not take a call, or None. No native kernel sees sizes of 0."""
    if backend == "torch":
        return None
    for argument in args:
        if isinstance(argument, Tensor):
            is_empty = argument.numel() == 0
        else:
            is_empty = isinstance(argument, list) and argument and not any(map(Tensor.numel, argument))
        if is_empty:
            return "leaves tensors without elements to the reference"
    return found.declines(*args)


@functools.cache
def _candidates(
    operator: str, device: str, size: Size | None, name: str | None
) -> tuple[tuple[str, Implementation], ...]:
    """Return those who are asked and have an implementation."""
    answers = ((b, _implementation(operator, b, device)) for b in _asked(operator, device, size, name))
    return tuple((backend, found) for backend, found in answers if isinstance(found, Implementation))


def explain(operator: str, device: str, args: tuple | None = None) -> list[tuple[str, str | None]]:
    """List the backends that are asked to serve an operator, in order, with the reason of each refusal."""
    answers = []
    for backend in _asked(operator, device, args and size_of(operator, args), forced()):
        found = _implementation(operator, backend, device)
        if isinstance(found, Implementation):
            answers.append((backend, None if args is None else _declines(backend, found, args)))
        else:
            answers.append((backend, found))
    return answers


def select(operator: str, device: str, args: tuple) -> Implementation:
    """Return what serves this call on a type of device: the first backend's in order that takes it."""
    size = None if device == "cpu" else size_of(operator, args)  # a CPU's order is the same for every size
    for backend, found in _candidates(operator, device, size, forced()):
        if _declines(backend, found, args) is None:
            return found
    raise AssertionError("the reference takes every call")
