"""Every public function and method says the type of each argument and of what it returns."""

import functools
import importlib
import inspect
from collections.abc import Iterator

import pytest

PARTS = ("ops", "editing", "evaluation", "grafting", "integrations", "larimar", "layers", "memory", "tracing")


def functions(part: str) -> Iterator[tuple[str, object]]:
    module = importlib.import_module(f"engram_kernels.{part}")
    for name in module.__all__:
        found = getattr(module, name)
        if inspect.isfunction(found):
            yield name, found
        elif inspect.isclass(found):
            for attribute, value in vars(found).items():
                value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                value = value.func if isinstance(value, functools.cached_property) else value
                public = attribute == "__init__" or not attribute.startswith("_")
                # A dataclass's `__init__` is made of its fields, which have types.
                if public and inspect.isfunction(value) and value.__module__.startswith("engram_kernels"):
                    yield f"{name}.{attribute}", value


@pytest.mark.parametrize("part", PARTS)
def test_signatures_are_whole(part):
    untyped, count = [], 0
    for name, function in functions(part):
        signature, count = inspect.signature(function), count + 1
        untyped += [
            f"{name}({parameter.name})"
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls")
        ]
        if signature.return_annotation is signature.empty and not name.endswith("__init__"):
            untyped.append(f"{name} ->")
    assert count and not untyped
