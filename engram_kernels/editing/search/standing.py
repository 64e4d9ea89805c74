"""How the rows of a search stand: what falls short is computed at every step, the rest now and then."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import EngramError
from .losses import Losses

# A row that does not fall short is computed at one step in so many: 4 saves a quarter of a search, 6 or more
# let some of them slip back and the search swing.
REST = 4


class Standing:
    """The rows' losses and gradients, as they were when they were last computed.

    Where a target is as likely as asked for, its loss is small and changes little from one step to the next.
    Meanwhile it counts as it was, and so does its gradient. An edit's KL prompt goes with any other row.

    Args:
        losses: of the rows.
        wanted: the probability from which on a row rests; None: none does.
    """

    def __init__(self, losses: Losses, wanted: float | None):
        self._losses = losses
        self._bound = -math.inf if wanted is None else -math.log(wanted)
        edits = losses.batch.edits
        ends = itertools.accumulate((one.size for one in edits), initial=0)
        self._rows = [range(*pair) for pair in itertools.pairwise(ends)]
        self._bare = [[rows[at] for at in one.firsts] for rows, one in zip(self._rows, edits, strict=True)]
        count = len(losses.batch.rows)
        self._loss, self._missing, self._target = ([math.inf] * count for _ in range(3))
        # In steps; at first as of rows that are due.
        self._age = [REST] * count
        self._first = True
        self._graphs: list[tuple[list[int], list[int], Tensor, Tensor]] = []
        self._gradients: list[Tensor | None] = [None] * count

    def look(self, delta: Tensor, edits: Sequence[int], whole: bool = False) -> None:
        """Compute the rows of some edits that are due, or every one, with `δ [all edits, out]`.

        Raises:
            EngramError: no gradient passes through the model.
            UnfitError: recorded states give other predictions than whole passes.
        """
        due = [(row, edit) for edit in sorted(edits) for row in self._due(edit, whole)]
        if not due:
            return
        rows, owner = map(list, zip(*due, strict=True))
        with torch.enable_grad():
            change = delta.detach()[owner].requires_grad_()
            loss, missing, target = self._losses.of(change, rows)
        if not loss.requires_grad:
            raise EngramError(
                "model: expected one that gradients pass through, got one of whose layers some stop them "
                "(quantised activations do): make the edit on the model in full precision"
            )
        self._graphs.append((rows, owner, change, loss))
        found = torch.stack([loss.detach(), missing, target], 1).tolist()
        for row, values in zip(rows, found, strict=True):
            self._loss[row], self._missing[row], self._target[row] = values
            self._age[row] = 0

    def loss(self, edit: int) -> float:
        """The sum over an edit's rows."""
        return sum(self._loss[row] for row in self._rows[edit])

    def fresh(self, edit: int) -> bool:
        """Whether every row of it was computed at this step."""
        return not any(self._age[row] for row in self._rows[edit])

    def reached(self, edit: int) -> bool:
        """Whether no row of it falls short."""
        return not any(self._short(row) for row in self._rows[edit])

    def asked(self, edit: int) -> float:
        """The largest `−log p`, after one of its prompts by itself, of a whole target whose word ends."""
        return max(self._target[row] for row in self._bare[edit])

    def gradients(self, edits: Sequence[int]) -> list[Tensor]:
        """The gradients of some edits' losses, `[out]` each, with which a step ends."""
        chosen = set(edits)
        for rows, owner, change, loss in self._graphs:
            going = [at for at, edit in enumerate(owner) if edit in chosen]
            if going:
                (found,) = torch.autograd.grad(loss[going].sum(), change)
                for at in going:
                    self._gradients[rows[at]] = found[at]
        self._graphs.clear()
        # With δ = 0 nothing has changed that shall stay: what was computed so says little of the next step.
        self._age = [REST if self._first else age + 1 for age in self._age]
        self._first = False
        return [torch.stack([self._gradients[row] for row in self._rows[edit]]).sum(0) for edit in edits]

    def _due(self, edit: int, whole: bool) -> list[int]:
        *texts, kl_prompt = self._rows[edit]
        due = [row for row in texts if whole or self._short(row) or self._age[row] >= REST]
        return [row for row in (*due, kl_prompt) if self._age[row]] if due else []

    def _short(self, row: int) -> bool:
        return not self._missing[row] < self._bound
