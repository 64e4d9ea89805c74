"""What was written into a model by earlier calls, so that a later edit of a subject keeps what it says."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from torch import nn

from ..hf.placement import unwrapped
from .edit import Edit

# By model the lists that results keep: one that is reverted empties its own.
_FACTS: WeakKeyDictionary[nn.Module, list[list[Edit]]] = WeakKeyDictionary()


def note(model: nn.Module, facts: Iterable[Edit]) -> list[Edit]:
    """Remember that facts stand in a model now; what leaves the list that is returned does so no longer."""
    standing = list(facts)
    _FACTS.setdefault(unwrapped(model), []).append(standing)
    return standing


def facts_in(model: nn.Module) -> list[Edit]:
    """The facts that were written into a model and not taken back, the oldest first."""
    return [fact for standing in _FACTS.get(unwrapped(model), []) for fact in standing]
