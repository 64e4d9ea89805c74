"""What was written into a model by earlier calls, so that a later edit of a subject keeps what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    made = {number: (record.edit, record.value_norm) for number, record in enumerate(records)}
    facts = standing(made, writes)
    _FACTS.setdefault(model, []).append(facts)
    return facts


def standing(made: Mapping[int, tuple[Edit, float]], writes: Sequence[Write]) -> list[Standing]:
    """What writes made of some facts, in their order; by number, each fact and its `‖v₀‖`."""
    changes: dict[int, tuple[Tensor, str]] = {}
    for write in writes:
        for place, number in enumerate(write.edits):
            if number in made:
                before = changes[number][0] if number in changes else 0
                changes[number] = before + write.residuals[place], write.module
    return [Standing(edit, *changes[number], norm) for number, (edit, norm) in made.items()]


def facts_in(model: nn.Module) -> list[Standing]:
    """The facts that were written into a model and not taken back, the oldest first."""
    return [fact for facts in _FACTS.get(model, []) for fact in facts]
