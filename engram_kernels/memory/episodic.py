"""An episodic memory: latents written, read and forgotten in closed form."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..errors import EngramError
from ..ops import (
    memory_accumulate_,
    memory_address,
    memory_forget_,
    memory_read,
)
from . import files, solution
from .addressing import addressing_matrix
from .ledger import Entry, Id, Ledger, checked_texts, entries_of
from .ridge import choose_ridge
from .rows import Rows, rows_of

STATE_DTYPES = (torch.float64, torch.float32)
ADDRESSINGS = ("memory", "prior")
LOO = "loo"
RIDGE = 1e-2

# The state is summed anew from the ledger once its rows are less than this share of all that was written.
HELD_SHARE = 0.1

# An fp32 state is warned about where its condition number times the rounding of fp32 passes the root of that
# rounding: half of the digits of M are lost then.
FP32_CONDITION = torch.finfo(torch.float32).eps ** -0.5


class EpisodicMemory(nn.Module):
    """Memories of K slots that hold latents of size C, by least squares.

        w = z M₀⁺                              addressing by a fixed M₀
        A = Σ αᵢ wᵢᵀ wᵢ,  B = Σ αᵢ wᵢᵀ zᵢ       α = +1 writes, −1 forgets
        M = (A + λI)⁻¹ B                       the memory
        ẑ = (z M⁺) M                           read by content, or (z M₀⁺) M by the prior's addresses

    The state is A without the ridge, and B: sums, so that the order of writes does not matter, memories can
    be merged, λ can be chosen later, and taking a row's term out again is forgetting it. It is kept in
    `state_dtype` even where a surrounding model is converted to half precision. `M` and `M⁺` are computed
    when they are first asked for after a change, and kept.

    Whose rows are meant, wherever rows are given: a matrix [N, C] belongs to the memory of the number
    `memory`, which may be left out where there is only one; with `cu_seqlens` [batch + 1] its rows
    `cu_seqlens[i] : cu_seqlens[i + 1]` belong to memory i; a tensor [batch, N, C] has a block for each.

    Rows written with ids are kept in the `ledger`, as they were given, so that they can be forgotten exactly.
    Rows without ids are not kept. The ledger is saved by `save_pretrained`; `state_dict` has the state alone,
    and loading one empties the ledger.

    Args:
        slots: K.
        latent: C.
        batch: the number of memories.
        ridge: λ, above 0, in units of ‖w‖²; or "loo": for each memory the λ of the least leave-one-out error
            over its ledger, chosen anew after a change. Then every row needs an id.
        m0: M₀: "random" (orthonormal, from the seed), "identity" (the first entries of a latent), or a tensor
            [K, C] of full rank.
        seed: of a random M₀.
        state_dtype: fp64, or fp32 for half the memory and fewer digits: see `condition`.
        encoder: what the latents come from, for the files.

    Attributes:
        gram: A [batch, K, K], without the ridge.
        cross: B [batch, K, C].
        count: rows in each memory, [batch].
        energy: Σ ‖w‖² and Σ ‖z‖² over all rows ever written, [batch, 2]: the scale of what rounding leaves.
        ridges: λ of each memory, [batch].
        m0, m0_pinv: M₀ [K, C] and its pseudo-inverse [C, K].
        ledger: rows by id.

    Raises:
        ValueError: a size under 1, a ridge that is not above 0, an M₀ that is no [K, C] of full rank.
        TypeError: wrong type or dtype.

    Example:
        >>> memory = EpisodicMemory(slots=384, latent=384)
        >>> memory.write(latents, ids=["paris", "rome"])
        >>> readout = memory.read(latents)
        >>> memory.forget(ids=["rome"])

    Source: Das et al. 2024 (arXiv 2403.11901), eq. 3 and 4; Pham et al. 2022 (generative pseudo-inverse
        memory).
    """

    def __init__(
        self,
        slots: int,
        latent: int,
        batch: int = 1,
        ridge: float | str = RIDGE,
        m0: str | Tensor = "random",
        seed: int = 0,
        state_dtype: torch.dtype = torch.float64,
        encoder: str | None = None,
    ):
        super().__init__()
        for name, value in (("slots", slots), ("latent", latent), ("batch", batch)):
            check.integer(name, value)
            check.expect(value >= 1, name, "at least 1", value)
        check.integer("seed", seed)
        check.expect(state_dtype in STATE_DTYPES, "state_dtype", "float64 or float32", state_dtype, TypeError)
        named = encoder is None or isinstance(encoder, str)
        check.expect(named, "encoder", "its name, or None", type(encoder).__name__, TypeError)
        self._ridge = _checked_ridge(ridge, state_dtype)
        self.encoder = encoder
        self.ledger = Ledger()
        prior, inverse = addressing_matrix(m0, slots, latent, seed)
        state = {"dtype": state_dtype, "device": prior.device}
        self.register_buffer("gram", torch.zeros(batch, slots, slots, **state))
        self.register_buffer("cross", torch.zeros(batch, slots, latent, **state))
        self.register_buffer("count", torch.zeros(batch, dtype=torch.int64, device=prior.device))
        self.register_buffer("energy", torch.zeros(batch, 2, **state))
        initial = RIDGE if self.ridge == LOO else self.ridge
        self.register_buffer("ridges", torch.full((batch,), initial, **state))
        self.register_buffer("m0", prior.to(state_dtype))
        self.register_buffer("m0_pinv", inverse.to(state_dtype))
        self._found: dict[str, Tensor] = {}
        # The checksum of each folder as it was read or written: if it has another, somebody changed it.
        self._folders: dict[Path, str] = {}
        self._warned = False

    @property
    def ridge(self) -> float | str:
        """λ as it was asked for, a number or "loo"; it can be changed at any time."""
        return self._ridge

    @ridge.setter
    def ridge(self, ridge: float | str) -> None:
        ridge = _checked_ridge(ridge, self.state_dtype)
        named = ridge != LOO or len(self.ledger) == len(self)
        check.expect(named, "ridge", "a number, as there are rows without ids", repr(ridge))
        self._ridge = ridge
        if ridge != LOO:
            self.ridges.fill_(ridge)
        self._found.clear()

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
        return self.gram.dtype

    @property
    def ids(self) -> list[Id]:
        """The ids in the ledger, in the order of writing."""
        return self.ledger.ids()

    def __len__(self) -> int:
        """The number of rows in all memories, with and without ids."""
        return int(self.count.sum())

    # nn.Module has no length, and some code asks it for its truth.
    def __bool__(self) -> bool:
        return True

    @torch.no_grad()
    def write(
        self,
        values: Tensor,
        keys: Tensor | None = None,
        ids: Sequence[Id] | None = None,
        texts: Sequence[str | None] | None = None,
        *,
        memory: int | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        """Write rows: `A += wᵀw`, `B += wᵀz` with `w = key M₀⁺`.

        Writing is no step of autograd; for gradients through a write, call `ek.memory_solve` and its kin.

        Args:
            values: z, [N, C] or [batch, N, C], any floating dtype.
            keys: what is asked for later, of the values' shape; default: the values themselves, so that they
                can be completed from a part (auto-associative).
            ids: a name for each row, text or integer, in the rows' order; of all memories together they are
                different. Rows with ids are kept.
            texts: what each row says, kept with its id.
            memory: the number of the memory that a matrix goes to.
            cu_seqlens: bounds of the memories in a matrix, [batch + 1].

        Raises:
            ValueError: wrong shape, device or number of ids; values or keys that are NaN or infinite, or so
                large that the state would overflow.
            TypeError: wrong dtype.
            EngramError: an id that is taken.
        """
        rows = rows_of(values, keys, self.batch, self.latent, memory, cu_seqlens)
        check.same_device("values", values, self.gram.device)
        names = entries = None
        if ids is not None:
            names = self.ledger.check_new(ids, len(rows.values))
            entries = entries_of(rows, keys is None, checked_texts(texts, len(names)))
        check.expect(ids is not None or texts is None, "texts", "ids with them", "none")
        check.expect(
            ids is not None or self.ridge != LOO or not len(rows.values),
            "ids", "one for each row, as the ridge is chosen over the rows kept", "none",
        )  # fmt: skip
        weights = self._weights(rows.keys)
        energy = self._energy_with(rows, weights)
        self._accumulate(rows, weights, rows.values, None)
        self._changed(rows.sizes, energy)
        if entries is not None:
            self.ledger.add(names, entries)

    @torch.no_grad()
    def forget(
        self,
        values: Tensor | None = None,
        keys: Tensor | None = None,
        ids: Sequence[Id] | None = None,
        *,
        memory: int | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        """Take rows out: `A −= wᵀw`, `B −= wᵀz`. All of them, or none if one cannot be.

        By ids, what the ledger kept is taken out, which is what was written, to the bit. By values, rows that
        the ledger has are taken out of it too; others only as far as rows were written without ids, and only
        if the leverage of all of them together shows that the state can have held them. It does not prove
        that it did.

        A memory whose last row is forgotten is as new: zero to the bit.

        Args:
            values: what was written, as for `write`; or None with ids.
            keys: as they were written; default: the values.
            ids: names of rows.
            memory, cu_seqlens: as for `write`.

        Raises:
            EngramError: an id or a row that is not in the memory, or rows whose leverage is too large.
            ValueError, TypeError: as for `write`.
        """
        given = (ids is None) != (values is None)
        check.expect(given, "ids", "ids or values", "both" if ids is not None else "neither")
        if ids is not None:
            for name, argument in (("keys", keys), ("memory", memory), ("cu_seqlens", cu_seqlens)):
                check.expect(argument is None, name, "None with ids", "one")
            names, rows = self._kept(ids)
        else:
            rows = rows_of(values, keys, self.batch, self.latent, memory, cu_seqlens)
            check.same_device("values", values, self.gram.device)
            names, unnamed = self.ledger.match(rows, self.count.tolist(), self.state_dtype)
            self._check_unnamed(rows, unnamed)
        weights = self._weights(rows.keys)
        self._accumulate(rows, weights, rows.values, -weights.new_ones(len(weights)))
        self.ledger.remove(names)
        self._changed([-size for size in rows.sizes], self.energy)
        self._settle(self._energy_of(rows, weights))

    @torch.no_grad()
    def overwrite(self, ids: Sequence[Id], values: Tensor, texts: Sequence[str | None] | None = None) -> None:
        """Give rows other values at their own keys: forget, and write anew, in one step. All or none.

        Args:
            ids: names of rows.
            values: the new values in the order of the ids, [N, C].
            texts: what each row says now.

        Raises:
            EngramError: an id that is not in the memory.
            ValueError, TypeError: as for `write`.
        """
        found = self.ledger.find(ids)
        names, old = list(found), list(found.values())
        check.floating("values", values)
        check.shape("values", values, (len(names), self.latent), "[N, C], a row for each id")
        check.same_device("values", values, self.gram.device)
        check.finite("values", values)
        said = checked_texts(texts, len(names))
        order = sorted(range(len(names)), key=lambda i: old[i].memory)
        rows = self._rows_of_entries([old[i] for i in order])
        fresh = values[order].to(self.state_dtype)
        weights = self._weights(rows.keys)
        energy = self._energy_with(Rows(rows.keys, fresh, rows.sizes, rows.shape), weights)
        # The same addresses: A stays as it is, to the bit, and B changes by the difference.
        with self._plain():
            pairs = zip(rows.split(weights), rows.split(fresh - rows.values), strict=True)
            for (memories, address), (_, change) in pairs:
                self.cross[memories] += address.mT @ change
        self._changed([0] * self.batch, energy)
        self.ledger.add(
            names,
            [
                Entry(entry.memory, entry.key, value.clone(), text)
                for entry, value, text in zip(old, values, said, strict=True)
            ],
        )
        self._settle(self._energy_of(rows, weights))

    def read(
        self,
        queries: Tensor,
        *,
        addressing: str = "memory",
        noise: float = 0.0,
        generator: torch.Generator | None = None,
        memory: int | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return what the memory has at the addresses of queries, `ẑ = w M`.

        "memory" addresses by content, `w = z M⁺`: the query is projected onto what the memory holds, which
        completes or cleans a value (Larimar's reading). "prior" addresses by `w = z M₀⁺`, as writing does:
        the query is a key, and the answer is what was written under keys like it. It is the one to use where
        values have keys of their own. Differentiable in the queries.

        Args:
            queries: [N, C] or [batch, N, C], any floating dtype.
            addressing: "memory" or "prior".
            noise: the standard deviation of noise on w, for generation.
            generator: of the noise.
            memory, cu_seqlens: as for `write`.

        Returns:
            Readouts of the queries' shape and dtype; zeros from an empty memory.

        Raises:
            ValueError, TypeError: wrong shape, dtype, device or addressing, or queries that are not finite.
            EngramError: a ridge that is lost in the rounding of the state.
        """
        known = addressing in ADDRESSINGS
        check.expect(known, "addressing", f"one of {', '.join(ADDRESSINGS)}", repr(addressing))
        check.number("noise", noise, at_least=0)
        rows = rows_of(queries, None, self.batch, self.latent, memory, cu_seqlens, "queries")
        check.same_device("queries", queries, self.gram.device)
        matrix = self.matrix()
        if addressing == "memory":
            inverse = self.inverse()
        else:
            inverse = self.m0_pinv.expand(self.batch, -1, -1)
        readouts = []
        for memories, block in rows.split(rows.values):
            if noise:
                weights = memory_address(block, inverse[memories])
                shape = {"dtype": weights.dtype, "device": weights.device}
                weights = weights + noise * torch.randn(weights.shape, generator=generator, **shape)
                with self._plain():
                    readout = (weights @ matrix[memories]).to(queries.dtype)
            else:
                readout = memory_read(block, inverse[memories], matrix[memories])
            readouts.append(readout.reshape(-1, self.latent))
        return torch.cat(readouts).reshape(queries.shape)

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
        self._refresh_ridges()
        identity = torch.eye(self.slots, dtype=self.state_dtype, device=self.gram.device)
        return self.gram + self.ridges[:, None, None] * identity

    @torch.no_grad()
    def leverage(
        self,
        values: Tensor,
        keys: Tensor | None = None,
        *,
        memory: int | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return `h = w (A + λI)⁻¹ wᵀ` of rows: how much of the memory hangs on each alone.

        Below 1 for every row that is in the memory: near 1 where nothing else there is like it, near 1/n for
        one of n equal rows. For a row that is not there it says how new it would be, and has no bound. A
        small leverage does not prove that a row is there.

        Args:
            values, keys, memory, cu_seqlens: as for `write`; the values count only where there are no keys.

        Returns:
            Leverages, [N] or [batch, N], in `state_dtype`.

        Raises:
            ValueError, TypeError, EngramError: as for `read`.
        """
        rows = rows_of(values, keys, self.batch, self.latent, memory, cu_seqlens)
        check.same_device("values", values, self.gram.device)
        precision, weights = self.precision(), self._weights(rows.keys)
        found = []
        for memories, address in rows.split(weights):
            whitened = solution.solve(precision[memories], address.mT, self.ridges[memories]).mT
            found.append((address * whitened).sum(-1).reshape(-1))
        return torch.cat(found).reshape(rows.shape)

    def condition(self) -> float:
        """The largest 2-norm condition number of A + λI over the memories.

        The relative error of M is about this times the rounding of `state_dtype`. In fp32 (ε = 1.2e-7) half
        of its digits are lost at 2.9e3; a solution beyond that warns, once.
        """
        return solution.condition(self.precision(), self.ridges)

    def merge(self, other: EpisodicMemory) -> EpisodicMemory:
        """Take up all that another memory holds: `A += A'`, `B += B'`, as if it had been written here.

        Args:
            other: one of the same slots, latents, number of memories, M₀, ridge, encoder and `state_dtype`;
                it stays as it is.

        Returns:
            This memory.

        Raises:
            ValueError: a memory of another kind.
            EngramError: ids that both have.
        """
        check.expect(
            isinstance(other, EpisodicMemory), "other", "an EpisodicMemory", type(other).__name__, TypeError
        )
        for name in ("slots", "latent", "batch", "ridge", "state_dtype", "encoder"):
            mine, theirs = getattr(self, name), getattr(other, name)
            check.expect(mine == theirs, "other", f"a memory of {name} {mine!r}", repr(theirs))
        near = 64 * torch.finfo(self.state_dtype).eps * float(self.m0.abs().max())
        same = torch.allclose(self.m0, other.m0.to(self.m0.device), rtol=0, atol=near)
        check.expect(same, "other", "a memory of the same m0", "another")
        shared = [name for name in other.ids if name in self.ledger]
        if shared:
            raise EngramError(f"other: expected a memory of other ids, got one that has {shared[0]!r} too")
        energy = self.energy + other.energy.to(self.energy.device)
        check.finite("other", energy)
        self.gram += other.gram.to(self.gram.device)
        self.cross += other.cross.to(self.cross.device)
        self._changed(other.count.tolist(), energy)
        self.ledger.add(other.ids, [entry for _, entry in other.ledger.items()])
        return self

    def reset(self) -> None:
        """Forget everything."""
        for buffer in (self.gram, self.cross, self.count, self.energy):
            buffer.zero_()
        self.ledger.clear()
        self._found.clear()
        self._warned = False

    def save_pretrained(self, directory: str | os.PathLike, replace: bool = False) -> None:
        """Write the memory with its ledger into a folder, whole or not at all.

        Args:
            directory: a new or empty folder.
            replace: it may also be one that holds a memory, which is replaced.

        Raises:
            EngramError: the directory exists and holds something else, or cannot be written; or it was
                changed by another since this memory read or wrote it.
        """
        files.save(self, directory, replace)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> EpisodicMemory:
        """Read what `save_pretrained` wrote, to the bit.

        Raises:
            EngramError: the folder holds no memory, or a file of it is damaged.
        """
        return files.load(directory)

    def extra_repr(self) -> str:
        return (
            f"slots={self.slots}, latent={self.latent}, batch={self.batch}, ridge={self.ridge}, "
            f"state_dtype={self.state_dtype}"
        )

    def _apply(self, fn: Callable, recurse: bool = True) -> EpisodicMemory:
        """Follow to other devices, but stay in `state_dtype` when a surrounding model is converted."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        self._found.clear()
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """The whole state or nothing of it: the ledger belongs to the one that is there."""
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
        self._found.clear()

    def _weights(self, keys: Tensor) -> Tensor:
        """w of rows, [T, K], in `state_dtype` whatever the latents': the same for the same latent, always."""
        return memory_address(keys, self.m0_pinv)

    def _accumulate(self, rows: Rows, weights: Tensor, values: Tensor, alpha: Tensor | None) -> None:
        groups = list(rows.groups())
        if len(groups) == 1:
            memories, shape = groups[0]
            memory_accumulate_(
                self.gram[memories],
                self.cross[memories],
                weights.reshape(*shape, self.slots),
                values.reshape(*shape, self.latent),
                None if alpha is None else alpha.reshape(shape),
            )
        else:
            memory_accumulate_(self.gram, self.cross, weights, values, alpha, cu_seqlens=rows.cu_seqlens)

    def _check_unnamed(self, rows: Rows, unnamed: Sequence[bool]) -> None:
        """Check by their leverage that the rows without ids can have held these; the ledger's stay sound.

        Raises:
            EngramError: they cannot, or they would be the last ones and something would be left.
        """
        self._refresh_ridges()
        groups = self.ledger.by_memory(self.batch)
        for number, kept in enumerate(groups):
            mine = [i for i, owner in enumerate(rows.owners) if owner == number and unnamed[i]]
            if not mine:
                continue
            named = self._rows_of_entries(kept)
            weights, gone = self._weights(named.keys), self._weights(rows.keys[mine])
            with self._plain():
                gram = self.gram[number] - weights.mT @ weights
                cross = self.cross[number] - weights.mT @ named.values
            memory_forget_(gram, cross, gone, rows.values[mine], ridge=float(self.ridges[number]))
            if int(self.count[number]) - len(kept) == len(mine):
                rounding = 8 * self.slots * torch.finfo(self.state_dtype).eps * self.energy[number]
                limits = rounding[0], (rounding[0] * rounding[1]).sqrt()
                if gram.norm() > limits[0] or cross.norm() > limits[1]:
                    raise EngramError(
                        f"values: expected the last {len(mine)} rows that were written without ids, got "
                        "others, which would leave something behind; reset() forgets everything"
                    )

    def _settle(self, gone: Tensor) -> None:
        """Sum a memory anew from its ledger where most of what was ever written is gone.

        What was taken out has left its rounding: ε of the largest that was ever there.

        Args:
            gone: the energy of the rows that were taken out just now, [batch, 2].
        """
        held = self.gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        stale = (held < HELD_SHARE * self.energy[:, 0]) | (gone > (1 - HELD_SHARE) * self.energy).any(-1)
        numbers = (stale & (self.count > 0)).nonzero().flatten().tolist()
        groups = self.ledger.by_memory(self.batch) if numbers else []
        for number in numbers:
            entries = groups[number]
            if len(entries) == int(self.count[number]):
                rows = self._rows_of_entries(entries)
                weights = self._weights(rows.keys)
                energy = self._energy_of(rows, weights)[number]
                # Apart from the state, which must stay whole if there is no memory for this.
                gram, cross = (torch.zeros_like(buffer[number]) for buffer in (self.gram, self.cross))
                memory_accumulate_(gram, cross, weights, rows.values)
                for buffer, new in ((self.gram, gram), (self.cross, cross), (self.energy, energy)):
                    buffer[number] = new
            else:
                self._warn_of_rounding(number)

    def _warn_of_rounding(self, number: int) -> None:
        eps = torch.finfo(self.state_dtype).eps
        lost = eps * float(self.energy[number, 0] / self.ridges[number])
        if lost > eps**0.5 and not self._warned:
            self._warned = True
            warnings.warn(
                f"memory {number}: what was forgotten has left rounding of about {lost:.1e} of what is still "
                "there; rows that are written with ids can be summed anew",
                stacklevel=5,
            )

    def _changed(self, added: Sequence[int], energy: Tensor) -> None:
        """Count what came and went; a memory that holds nothing any more is zero."""
        self.count += torch.tensor(added, device=self.count.device)
        self.energy.copy_(energy)
        if min(added) < 0:
            empty = (self.count == 0)[:, None, None]
            for buffer in (self.gram, self.cross):
                buffer.masked_fill_(empty, 0)
            self.energy.masked_fill_(empty[:, 0], 0)
        self._found.clear()

    def _energy_of(self, rows: Rows, weights: Tensor) -> Tensor:
        """Σ ‖w‖² and Σ ‖z‖² of rows, for each memory, [batch, 2]."""
        squares = torch.stack(
            [weights.square().sum(-1), rows.values.to(self.state_dtype).square().sum(-1)], dim=-1
        )
        owners = torch.tensor(rows.owners, dtype=torch.int64, device=squares.device)
        return torch.zeros_like(self.energy).index_add(0, owners, squares)

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

    def _kept(self, ids: Sequence[Id]) -> tuple[list[Id], Rows]:
        """Ids and their rows, memory after memory."""
        found = sorted(self.ledger.find(ids).items(), key=lambda item: item[1].memory)
        return [name for name, _ in found], self._rows_of_entries([entry for _, entry in found])

    def _rows_of_entries(self, entries: Sequence[Entry]) -> Rows:
        """Rows of entries that are ordered by memory, in `state_dtype`."""
        to = {"dtype": self.state_dtype, "device": self.gram.device}
        none = self.cross.new_zeros(0, self.latent)
        keys, values = (
            torch.stack([getattr(entry, name).to(**to) for entry in entries]) if entries else none
            for name in ("key", "value")
        )
        sizes = [0] * self.batch
        for entry in entries:
            sizes[entry.memory] += 1
        return Rows(keys, values, sizes, (len(entries),))

    def _plain(self) -> torch.autocast:
        """Products in the state's own dtype, inside the caller's autocast too."""
        return torch.autocast(self.gram.device.type, enabled=False)

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if name not in self._found:
            # Kept for later, when the caller may want gradients through a reading.
            with torch.inference_mode(False), torch.no_grad(), self._plain():
                self._found[name] = compute()
        return self._found[name]

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

    def _refresh_ridges(self) -> None:
        """Under "loo", choose λ anew for each memory whose rows are kept, once after a change."""
        if self.ridge != LOO or "ridges" in self._found:
            return
        for number, entries in enumerate(self.ledger.by_memory(self.batch)):
            rows = self._rows_of_entries(entries)
            weights = self._weights(rows.keys)
            chosen = choose_ridge(self.gram[number], self.cross[number], weights, rows.values)
            if chosen is not None:
                self.ridges[number] = chosen
            elif len(entries) == int(self.count[number]):
                self.ridges[number] = RIDGE  # As in a new memory: there is nothing left to choose it by.
        self._found["ridges"] = self.ridges


def _checked_ridge(ridge: float | str, dtype: torch.dtype) -> float | str:
    if ridge == LOO:
        return LOO
    expected = "a number above 0, or 'loo'"
    is_number = isinstance(ridge, (int, float)) and not isinstance(ridge, bool)
    check.expect(is_number, "ridge", expected, repr(ridge), TypeError)
    if not 0 < ridge < float("inf"):
        raise ValueError(
            f"ridge: expected {expected}, got {ridge} (without a ridge, a memory of fewer rows than slots "
            "has no solution, and its pseudo-inverse does not forget)"
        )
    shown = float(torch.tensor(float(ridge), dtype=torch.float64, device="cpu").to(dtype))
    fits = 0 < shown < float("inf")
    check.expect(fits, "ridge", f"a number that fits {str(dtype).removeprefix('torch.')}", ridge)
    return float(ridge)
