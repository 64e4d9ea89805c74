"""Is a function of another library the one that we know? Asked before anything is replaced.

A function is known by its parameters and by its vocabulary: the names that its code looks up, in itself and
in what is nested in it, its floating-point constants and its texts. A version that reads another
hyper-parameter, adds a term to the loss or ends at another loss has another vocabulary, while one that only
moves tensors elsewhere, or prints less, has not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

from ..errors import EngramError

# What says where tensors lie, takes them out of a tuple, or prints: it may be there or not.
_FREE = frozenset(
    "NotImplementedError STATS_DIR UserWarning ValueError append available cpu cuda device dtype "
    "enumerate format get_hidden_state get_module get_module_device getattr hasattr hidden_size "
    "is_available item len next normalize_device np parameters print range replace_hidden_state "
    "round shape stats_dir to transpose tuple type warn warnings weight".split()
)


@dataclass(frozen=True)
class Known:
    """What is known of a function.

    Attributes:
        names: what its code looks up, separated by spaces; beside them only what tells nothing may occur.
        parameters: their names, in order; None: whatever they are, they are handed on.
        floats: its floating-point constants.
        text: one of its string constants, if any.
    """

    names: str
    parameters: str | None = None
    floats: tuple[float, ...] = ()
    text: str | None = None


def known_function(module: ModuleType, name: str, known: Known) -> Callable:
    """The function of that name in a module, which is the one that is known.

    Args:
        module: of the other library.
        name: of the function there, or of a class and its method, with a dot.
        known: what it should be like.

    Raises:
        EngramError: there is none, or it is another one.
    """
    path = f"{module.__name__}.{name}"
    function: Any = module
    for part in name.split("."):
        function = getattr(function, part, None)
    code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
    if code is None:
        raise _unknown(path, "a function", "none")
    parameters = " ".join(inspect.signature(function).parameters)
    if known.parameters not in (None, parameters):
        raise _unknown(path, f"the parameters {known.parameters}", parameters)
    codes = list(_nested(code))
    names = {name for each in codes for name in each.co_names}
    expected = set(known.names.split())
    if missing := expected - names - _FREE:
        raise _unknown(path, f"code that uses {min(missing)!r}", "code without it")
    if surplus := names - expected - _FREE:
        raise _unknown(path, f"code without {min(surplus)!r}", "code that uses it")
    constants = [constant for each in codes for constant in each.co_consts]
    floats = sorted({constant for constant in constants if isinstance(constant, float)})
    if floats != sorted(known.floats):
        raise _unknown(path, f"the numbers {list(known.floats)}", floats)
    if known.text is not None and known.text not in constants:
        raise _unknown(path, f"the text {known.text!r}", "code without it")
    return function


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _unknown(path: str, expected: str, got: object) -> EngramError:
    return EngramError(f"{path}: expected a version that is known, with {expected}, got {got}")
