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
        changes: by the name of a module, `δ [out]`: by how much its answer to the subject was to change.
    """

    edit: Edit
    changes: dict[str, Tensor]


# By model the lists that results keep: one that is reverted empties its own.
_FACTS: WeakKeyDictionary[nn.Module, list[list[Standing]]] = WeakKeyDictionary()


def note(model: nn.Module, records: Sequence[EditRecord], writes: Sequence[Write]) -> list[Standing]:
    """Remember that facts stand in a model now; what leaves the list that is returned does so no longer."""
    standing = [Standing(record.edit, {}) for record in records]
    for write in writes:
        for place, number in enumerate(write.edits):
            changes = standing[number].changes
            changes[write.module] = changes.get(write.module, 0) + write.residuals[place]
    _FACTS.setdefault(model, []).append(standing)
    return standing


def facts_in(model: nn.Module) -> list[Standing]:
    """The facts that were written into a model and not taken back, the oldest first."""
    return [fact for standing in _FACTS.get(model, []) for fact in standing]
