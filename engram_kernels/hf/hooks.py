"""Forward hooks that are removed after use, and forward passes that a hook ends early."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn


class Stop(Exception):
    """Raised by a hook to end a forward pass: nothing above it is needed."""


@contextmanager
def capture(
    before: Mapping[nn.Module, Callable] | None = None, after: Mapping[nn.Module, Callable] | None = None
) -> Iterator[None]:
    """Register hooks on modules, and remove them at the end of the block, also after an error.

    Args:
        before: by module, `hook(module, arguments, keywords)`, called before its forward. What it returns,
            unless None, replaces both.
        after: by module, `hook(module, arguments, output)`, called after its forward. What it returns, unless
            None, replaces the output.

    Example:
        >>> with capture(after={layer: lambda _module, _arguments, output: seen.append(output)}):
        ...     model(ids)
    """
    with ExitStack() as stack:
        for module, hook in (before or {}).items():
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for module, hook in (after or {}).items():
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def run_until(model: nn.Module, **inputs) -> None:
    """Run a model until a hook raises `Stop`, or to its end; without a cache, unless inputs ask for one."""
    try:
        model(**{"use_cache": False, **inputs})
    except Stop:
        pass
