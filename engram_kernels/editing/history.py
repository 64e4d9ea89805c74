"""What was written into a model by earlier calls, so that a later edit of a subject keeps what it says."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

from ..hf.placement import unwrapped
from .edit import Edit

if TYPE_CHECKING:
    from .result import EditResult


@dataclass(frozen=True)
class _Entry:
    """The facts of a result, and the result itself while somebody keeps it: it may be reverted."""

    facts: list[Edit]
    result: weakref.ref[EditResult]
    module: nn.Module

    def now(self) -> list[Edit]:
        result = self.result()
        if result is None:
            return self.facts
        modules = [original.projection.module for original in result._originals.values()]
        there = any(module is self.module for module in modules)
        return [record.edit for record in result.records] if there else []


_MADE: WeakKeyDictionary[nn.Module, list[_Entry]] = WeakKeyDictionary()


def note(model: nn.Module, result: EditResult) -> None:
    """Remember that the edits of a result stand in a model now."""
    module = next(iter(result._originals.values())).projection.module
    facts = [record.edit for record in result.records]
    _MADE.setdefault(unwrapped(model), []).append(_Entry(facts, weakref.ref(result), module))


def facts_in(model: nn.Module) -> list[Edit]:
    """The facts that were written into a model and not taken back, the oldest first."""
    return [fact for entry in _MADE.get(unwrapped(model), []) for fact in entry.now()]
