"""Replace attributes of another library's modules, all or none, and put the very same objects back."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import ModuleType


class Declined(Exception):
    """This package cannot serve a call soundly; the library's own function does. The message says why."""


@dataclass(frozen=True)
class Replacement:
    """One attribute of a module, and what takes its place.

    Attributes:
        module, name: where the library looks the function up when it calls it.
        new: the function that takes its place.
        purpose: what is gained, in a few words.
    """

    module: ModuleType
    name: str
    new: Callable
    purpose: str

    @property
    def path(self) -> str:
        """The attribute's full name."""
        return f"{self.module.__name__}.{self.name}"


@dataclass(repr=False)
class Acceleration:
    """What was replaced in a library, what was not and why; `revert`, or the end of `with`, takes it back.

    Attributes:
        library: its name.
        replaced: by the attribute's full name, what is gained.
        kept: what was not replaced, and why.
        declined: how many calls were handed to the library's own function, by function and reason.
    """

    library: str
    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    declined: Counter[tuple[str, str]] = field(default_factory=Counter)
    _originals: ExitStack = field(default_factory=ExitStack)
    _active: bool = False

    def replace(self, replacements: Iterable[Replacement]) -> None:
        """Put the replacements in place; everything about them has been checked."""
        for each in replacements:
            if each.path in self.replaced:
                continue  # several algorithms share it
            self._originals.callback(setattr, each.module, each.name, getattr(each.module, each.name))
            setattr(each.module, each.name, each.new)
            self.replaced[each.path] = each.purpose
        self._active = True

    def revert(self) -> None:
        """Put back what was there before, the very same objects; a second call does nothing."""
        self._originals.close()
        self._active = False

    def decline(self, name: str, reason: str) -> None:
        """Count a call that the library's own function takes, and warn of the first."""
        self.declined[name, reason] += 1
        if self.declined[name, reason] == 1:
            warnings.warn(f"{name} is {self.library}'s own for now: {reason}", stacklevel=3)

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_error: object) -> None:
        self.revert()

    def __repr__(self) -> str:
        state = "accelerated" if self._active else "as it was"
        lines = [f"{self.library}: {state}"]
        for title, entries in (("replaced", self.replaced), ("not replaced", self.kept)):
            lines += [f"{title}:", *(f"  {name}: {text}" for name, text in entries.items())]
        if self.declined:
            counted = self.declined.items()
            lines += ["calls left to the library:", *(f"  {n} x {name}: {why}" for (name, why), n in counted)]
        return "\n".join(lines)


def replacing(original: Callable, ours: Callable, report: Acceleration) -> Callable:
    """A function with the original's signature that calls ours, and the original where ours declines."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*arguments, **keywords):
        given = signature.bind(*arguments, **keywords)
        given.apply_defaults()
        try:
            return ours(**given.arguments)
        except Declined as declined:
            report.decline(original.__name__, str(declined))
        return original(*arguments, **keywords)

    return mark(call)


def mark(function: Callable) -> Callable:
    """Mark a function as one of ours."""
    function.accelerated = True  # type: ignore[attr-defined]
    return function


def is_accelerated(function: object) -> bool:
    """Whether a function is one of ours already."""
    return getattr(function, "accelerated", False)
