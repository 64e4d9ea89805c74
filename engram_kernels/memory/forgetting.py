"""The safety of forgetting: rows without ids are checked by leverage, and rounding is cleared away."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import EngramError
from ..ops import checks, memory_accumulate_, memory_forget_
from .rows import Rows
from .state import MemoryState

# The state is summed anew from the ledger once its rows are less than this share of all that was written.
HELD_SHARE = 0.1


def check_unnamed(state: MemoryState, rows: Rows, unnamed: Sequence[bool]) -> None:
    """Check by their leverage that the rows without ids can have held these; the ledger's stay sound.

    Args:
        state: as it is before anything is taken out.
        rows: what is to be forgotten.
        unnamed: which of the rows the ledger does not have.

    Raises:
        EngramError: they cannot, or they would be the last ones and something would be left.
    """
    state._choose_ridges()
    owners = rows.owners
    for number, kept in enumerate(state.ledger.by_memory(state.batch)):
        mine = [i for i, owner in enumerate(owners) if owner == number and unnamed[i]]
        if not mine:
            continue
        named = state._rows_of(kept)
        weights, gone = state._weights(named.keys), state._weights(rows.keys[mine])
        with state._plain():
            gram = state.gram[number] - weights.mT @ weights
            cross = state.cross[number] - weights.mT @ named.values
        memory_forget_(gram, cross, gone, rows.values[mine], ridge=float(state.ridges[number]))
        if int(state.count[number]) - len(kept) == len(mine):
            rounding = 8 * state.slots * torch.finfo(state.state_dtype).eps * state.energy[number]
            limits = rounding[0], (rounding[0] * rounding[1]).sqrt()
            if gram.norm() > limits[0] or cross.norm() > limits[1]:
                raise EngramError(
                    f"values: expected the last {len(mine)} rows that were written without ids, got "
                    "others, which would leave something behind; reset() forgets everything"
                )


def settle(state: MemoryState, gone: Tensor) -> None:
    """Sum a memory anew from its ledger where most of what was ever written is gone.

    What was taken out has left its rounding: ε of the largest that was ever there.

    Args:
        state: as it is after the rows were taken out.
        gone: their energy, [batch, 2].
    """
    held = state.gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    stale = (held < HELD_SHARE * state.energy[:, 0]) | (gone > (1 - HELD_SHARE) * state.energy).any(-1)
    numbers = (stale & (state.count > 0)).nonzero().flatten().tolist()
    groups = state.ledger.by_memory(state.batch) if numbers else []
    for number in numbers:
        if len(groups[number]) < int(state.count[number]):
            _warn_of_rounding(state, number)
            continue
        rows = state._rows_of(groups[number])
        weights = state._weights(rows.keys)
        energy = state._energy_of(rows, weights)[number]
        # Apart from the state, which must stay whole if there is no memory for this.
        gram, cross = (torch.zeros_like(buffer[number]) for buffer in (state.gram, state.cross))
        with checks("sync"):
            memory_accumulate_(gram, cross, weights, rows.values)
        for buffer, new in ((state.gram, gram), (state.cross, cross), (state.energy, energy)):
            buffer[number] = new


def _warn_of_rounding(state: MemoryState, number: int) -> None:
    eps = torch.finfo(state.state_dtype).eps
    lost = eps * float(state.energy[number, 0] / state.ridges[number])
    if lost > eps**0.5 and not state._warned:
        state._warned = True
        warnings.warn(
            f"memory {number}: what was forgotten has left rounding of about {lost:.1e} of what is still "
            "there; rows that are written with ids can be summed anew",
            stacklevel=5,
        )
