"""What was written into a model by earlier calls, so that a later edit of a subject keeps what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..edit import Edit
from ..writing.records import EditRecord, Write


class Standing(NamedTuple):
    """A fact that stands in a model.

    Attributes:
        edit: the fact.
        change: `δ [out]`: by how much the answers to the subject were to change, of all layers together.
        module: the last of those that were written.
        norm: `‖v₀‖`, of its answer before the edit.
    """

    edit: Edit
    change: Tensor
    module: str
    norm: float


# By model the lists that results keep: one that is reverted empties its own.
_FACTS: WeakKeyDictionary[nn.Module, list[list[Standing]]] = WeakKeyDictionary()


def note(model: nn.Module, records: Sequence[EditRecord], writes: Sequence[Write]) -> list[Standing]:
    """Remember that facts stand in a model now; what leaves the list that is returned does so no longer."""
    standing = [
        Standing(records[number].edit, *one, records[number].value_norm)
        for number, one in changes(writes).items()
    ]
    _FACTS.setdefault(model, []).append(standing)
    return standing


def changes(writes: Sequence[Write]) -> dict[int, tuple[Tensor, str]]:
    """By the number of an edit, what all layers together were to change, and the last one's module."""
    found: dict[int, tuple[Tensor, str]] = {}
    for write in writes:
        for place, number in enumerate(write.edits):
            before = found[number][0] if number in found else 0
            found[number] = before + write.residuals[place], write.module
    return found


def facts_in(model: nn.Module) -> list[Standing]:
    """The facts that were written into a model and not taken back, the oldest first."""
    return [fact for standing in _FACTS.get(model, []) for fact in standing]
