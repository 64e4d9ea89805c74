"""The sums that a memory keeps, and what is computed from them: M, its pseudo-inverse, its condition."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..hf.scripts import is_whole
from ..ops import memory_accumulate_, memory_address
from ..ops.waiting import raises_at_once
from . import solution
from .addressing import addressing_matrix
from .ledger import Ledger, rows_of_entries
from .ridge import LOO, RIDGE, checked_ridge, choose_ridge
from .rows import Rows

Kept = TypeVar("Kept")

STATE_DTYPES = (torch.float64, torch.float32)

# An fp32 state is warned about where its condition number times the rounding of fp32 passes the root of that
# rounding: half of the digits of M are lost then.
FP32_CONDITION = torch.finfo(torch.float32).eps ** -0.5


def checked_labels(labels: Sequence[str | None] | None, batch: int) -> list[str | None]:
    """A label for each memory, or None; no two have the same.

    Raises:
        TypeError: something that is no text.
        ValueError: another number of labels than memories, or one label twice.
    """
    labels = [None] * batch if labels is None else list(labels)
    check.expect(len(labels) == batch, "labels", f"{batch}, one for each memory", len(labels))
    given = [label for label in labels if label is not None]
    for label in given:
        check.expect(isinstance(label, str), "labels", "texts or None", type(label).__name__, TypeError)
        check.expect(is_whole(label), "labels", "whole characters", repr(label))
    check.expect(len(set(given)) == len(given), "labels", "different ones", given)
    return labels


class MemoryState(nn.Module):
    """The buffers of `EpisodicMemory`, their dtype and device, and the solution, which is computed lazily."""

    gram: Tensor
    cross: Tensor
    count: Tensor
    keyed: Tensor
    energy: Tensor
    ridges: Tensor
    m0: Tensor
    m0_pinv: Tensor

    def __init__(
        self,
        slots: int,
        latent: int,
        batch: int,
        ridge: float | str,
        m0: str | Tensor,
        seed: int,
        state_dtype: torch.dtype,
        labels: Sequence[str | None] | None = None,
    ):
        super().__init__()
        for name, value in (("slots", slots), ("latent", latent), ("batch", batch)):
            check.integer(name, value)
            check.expect(value >= 1, name, "at least 1", value)
        check.integer("seed", seed)
        check.expect(state_dtype in STATE_DTYPES, "state_dtype", "float64 or float32", state_dtype, TypeError)
        self._ridge = checked_ridge(ridge, state_dtype)
        self.labels = checked_labels(labels, batch)
        self.ledger = Ledger()
        with torch.inference_mode(False):
            self._register(slots, latent, batch, m0, seed, state_dtype)
        self._kept: dict[str, Any] = {}
        # Under "loo", the memories whose ridge is to be chosen anew.
        self._stale = torch.ones(batch, dtype=torch.bool, device="cpu")
        self._warned = False

    def _register(
        self, slots: int, latent: int, batch: int, m0: str | Tensor, seed: int, state_dtype: torch.dtype
    ) -> None:
        prior, inverse = addressing_matrix(m0, slots, latent, seed)
        state = {"dtype": state_dtype, "device": prior.device}
        number = {"dtype": torch.int64, "device": prior.device}
        self.register_buffer("gram", torch.zeros(batch, slots, slots, **state))
        self.register_buffer("cross", torch.zeros(batch, slots, latent, **state))
        self.register_buffer("count", torch.zeros(batch, **number))
        self.register_buffer("keyed", torch.zeros(batch, **number))
        self.register_buffer("energy", torch.zeros(batch, 2, **state))
        initial = RIDGE if self.ridge == LOO else self.ridge
        self.register_buffer("ridges", torch.full((batch,), initial, **state))
        self.register_buffer("m0", prior.to(state_dtype))
        self.register_buffer("m0_pinv", inverse.to(state_dtype))

    @property
    def ridge(self) -> float | str:
        """λ as it was asked for, a number or "loo"; it can be changed at any time."""
        return self._ridge

    @ridge.setter
    def ridge(self, ridge: float | str) -> None:
        ridge = checked_ridge(ridge, self.state_dtype)
        named = ridge != LOO or len(self.ledger) == len(self)
        check.expect(named, "ridge", "a number, as there are rows without ids", repr(ridge))
        self._ridge = ridge
        if ridge != LOO:
            self.ridges.fill_(ridge)
        self._kept.clear()
        self._stale.fill_(True)

    @property
    def slots(self) -> int:
        """K."""
        return self.gram.shape[-1]

    @property
    def latent(self) -> int:
        """C."""
        return self.cross.shape[-1]

    @property
    def batch(self) -> int:
        """The number of memories."""
        return self.gram.shape[0]

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the sums and of the solution."""
        return self.gram.dtype

    def __len__(self) -> int:
        """The number of rows in all memories, with and without ids."""
        return int(self.count.sum())

    # A module is true, even one of length zero.
    def __bool__(self) -> bool:
        return True

    def matrix(self) -> Tensor:
        """M = (A + λI)⁻¹ B of each memory, [batch, K, C] in `state_dtype`; kept until the next change.

        Raises:
            EngramError: a ridge that is lost in the rounding of the state.
        """
        return self._once("matrix", self._solved)

    def inverse(self) -> Tensor:
        """M⁺ of each memory, [batch, C, K] in `state_dtype`; kept until the next change.

        Singular values of M that rounding alone may have made are cut off: see `solution.cut_inverse`.

        Raises:
            EngramError: as for `matrix`.
        """
        return self._once("inverse", lambda: solution.cut_inverse(self.matrix(), self.energy, self.ridges))

    def precision(self) -> Tensor:
        """A + λI of each memory, [batch, K, K]: the inverse covariance of the rows' estimates."""
        self._choose_ridges()
        identity = torch.eye(self.slots, dtype=self.state_dtype, device=self.gram.device)
        return self.gram + self.ridges[:, None, None] * identity

    def condition(self) -> float:
        """The largest 2-norm condition number of A + λI over the memories.

        The relative error of M is about this times the rounding of `state_dtype`. In fp32 (ε = 1.2e-7) half
        of its digits are lost at 2.9e3; a solution beyond that warns, once.
        """
        return solution.condition(self.precision(), self.ridges)

    def reset(self) -> None:
        """Forget everything."""
        for buffer in (self.gram, self.cross, self.count, self.keyed, self.energy):
            buffer.zero_()
        self.ledger.clear()
        self._kept.clear()
        self._stale.fill_(True)
        self._warned = False

    def _weights(self, keys: Tensor) -> Tensor:
        """w of rows, [T, K], in `state_dtype` whatever the keys' dtype: the same key, the same w, always."""
        return memory_address(keys, self.m0_pinv)

    @raises_at_once
    def _accumulate(self, rows: Rows, weights: Tensor, alpha: int = 1) -> None:
        """A += α wᵀw, B += α wᵀz."""
        alphas = None if alpha == 1 else weights.new_full((len(weights),), alpha)
        groups = list(rows.groups())
        if len(groups) != 1:
            state = self.gram, self.cross
            memory_accumulate_(*state, weights, rows.values, alphas, cu_seqlens=rows.cu_seqlens)
            return
        memories, shape = groups[0]
        memory_accumulate_(
            self.gram[memories],
            self.cross[memories],
            weights.reshape(*shape, self.slots),
            rows.values.reshape(*shape, self.latent),
            None if alphas is None else alphas.reshape(shape),
        )

    def _changed(self, memories: Tensor, count: Tensor, keyed: Tensor, energy: Tensor) -> None:
        """Count the rows that came or went; a memory that holds nothing any more is zero to the bit.

        Args:
            memories: which have changed, bool [batch].
            count, keyed: how many rows each has more, [batch].
            energy: what it is now, [batch, 2].
        """
        self._stale |= memories.cpu()
        self.count += count
        self.keyed += keyed
        # Rows without ids can be forgotten that were never there: more with a key than there are, or fewer.
        self.keyed.copy_(torch.minimum(self.keyed.clamp_min(0), self.count))
        self.energy.copy_(energy)
        if count.numel() and int(count.min()) < 0:
            empty = (self.count == 0)[:, None, None]
            for buffer in (self.gram, self.cross):
                buffer.masked_fill_(empty, 0)
            self.energy.masked_fill_(empty[:, 0], 0)
        self._kept.clear()

    def _energy_of(self, rows: Rows, weights: Tensor) -> Tensor:
        """Σ ‖w‖² and Σ ‖z‖² of rows, for each memory, [batch, 2]."""
        # Norms, as they need no copy of the values in the state's dtype.
        squares = [
            torch.linalg.vector_norm(part, dim=-1, dtype=torch.promote_types(part.dtype, self.state_dtype))
            .square()
            .to(self.state_dtype)
            for part in (weights, rows.values)
        ]
        return rows.summed(torch.stack(squares, dim=-1))

    def _energy_with(self, rows: Rows, weights: Tensor) -> Tensor:
        """`energy` with these rows, or an error: every entry of A and B is smaller, so it must be finite."""
        energy = self.energy + self._energy_of(rows, weights)
        if not check.is_finite(energy):
            dtype = str(self.state_dtype).removeprefix("torch.")
            raise ValueError(
                f"values: expected rows whose squares fit {dtype}, got a largest entry of "
                f"{float(torch.maximum(rows.values.abs().max(), rows.keys.abs().max())):.2g}"
            )
        return energy

    def _rows_of(self, entries: Iterable) -> Rows:
        """Rows of ledger entries that are ordered by memory, in `state_dtype`."""
        return rows_of_entries(entries, self.cross)

    def _plain(self) -> torch.autocast:
        return solution.without_autocast(self.gram)

    def _once(self, name: str, compute: Callable[[], Kept]) -> Kept:
        if name not in self._kept:
            # Kept for later, when the caller may want gradients through a reading.
            with torch.inference_mode(False), torch.no_grad(), self._plain():
                self._kept[name] = compute()
        return self._kept[name]

    def _solved(self) -> Tensor:
        matrix = solution.solve(self.precision(), self.cross, self.ridges)
        if self.state_dtype == torch.float32 and not self._warned:
            condition = self.condition()
            if condition > FP32_CONDITION:
                self._warned = True
                warnings.warn(
                    f"state_dtype: a condition number of {condition:.1e} costs an fp32 state more than half "
                    f"of its digits (bound {FP32_CONDITION:.1e}); use float64, or a larger ridge",
                    stacklevel=4,
                )
        return matrix

    def _choose_ridges(self) -> None:
        """Under "loo", choose λ anew for each memory that has changed and whose rows are in the ledger."""
        if self.ridge != LOO or not self._stale.any():
            return
        groups = self.ledger.by_memory(self.batch)
        for number in self._stale.nonzero().flatten().tolist():
            entries = groups[number]
            rows = self._rows_of(entries)
            weights = self._weights(rows.keys)
            chosen = choose_ridge(self.gram[number], self.cross[number], weights, rows.values)
            if chosen is not None:
                self.ridges[number] = chosen
            elif len(entries) == int(self.count[number]):
                self.ridges[number] = RIDGE  # As in a new memory: there is nothing left to choose it by.
        self._stale.fill_(False)

    def _apply(self, fn: Callable, recurse: bool = True) -> MemoryState:
        """Follow to other devices, but stay in `state_dtype` when a surrounding model is converted."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        self._kept.clear()
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Load the whole state or nothing of it: the ledger belongs to the one that is there."""
        missing, wrong = [], []
        for name, buffer in self._buffers.items():
            loaded = state_dict.get(prefix + name)
            if loaded is None:
                missing.append(prefix + name)
            elif loaded.shape != buffer.shape:
                wrong.append(f"{prefix}{name}: expected {list(buffer.shape)}, got {list(loaded.shape)}")
        if not missing and not wrong and self.ridge != LOO:
            ridges = state_dict[prefix + "ridges"].to(self.ridges)
            if not torch.equal(ridges, self.ridges):
                wrong.append(f"{prefix}ridges: expected {self.ridge}, got {ridges.tolist()}")
        if missing or wrong:
            missing_keys += missing
            error_msgs += wrong
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.ledger.clear()
        self._kept.clear()
        self._stale.fill_(True)
