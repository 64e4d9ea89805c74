"""An episodic memory: latents written, read and forgotten in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..errors import EngramError
from ..ops import memory_address, memory_read
from . import solution
from .addressing import check_addressing
from .folder import MemoryFolder
from .forgetting import check_unnamed, settle
from .ledger import Id, checked_metadata, checked_parts, checked_texts, entries_of
from .recall import MemoryRecall
from .ridge import LOO, RIDGE
from .rows import Rows, rows_of
from .state import MemoryState, checked_labels


class EpisodicMemory(MemoryState, MemoryRecall, MemoryFolder):
    """Memories of K slots that hold latents of size C, by least squares.

        w = z M₀⁺                              the address of z, by a fixed M₀
        A = Σ αᵢ wᵢᵀ wᵢ,  B = Σ αᵢ wᵢᵀ zᵢ       α = +1 writes, −1 forgets
        M = (A + λI)⁻¹ B                       the memory
        ẑ = (z M₀⁺) M  or  (z M⁺) M            read by key, or by content

    The state is A without the ridge, and B. Both are sums, so the order of writes does not matter, memories
    can be merged, λ can be chosen later, and a row is forgotten by taking its term out again. The state stays
    in `state_dtype` when a surrounding model is converted to half precision. `M` and `M⁺` are computed when
    they are first asked for after a change, and kept.

    Which memory rows belong to, wherever rows are given: a matrix [N, C] goes to the memory of the number
    `memory`, which may be left out where there is only one. With `cu_seqlens` [batch + 1] its rows
    `cu_seqlens[i] : cu_seqlens[i + 1]` go to memory i. A tensor [batch, N, C] has a block for each.

    Rows written with ids are kept in the `ledger`, as they were given, so that they can be forgotten exactly.
    Rows without ids are not kept. `save_pretrained` saves the ledger; `state_dict` has the state alone, and
    loading one empties the ledger.

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
        encoder: the name of what makes the latents, which is saved with them.
        labels: a name for each memory, such as its user's; wherever a `memory` is asked for, it may be given
            by number or by label.

    Attributes:
        gram: A [batch, K, K], without the ridge.
        cross: B [batch, K, C].
        count: rows in each memory, [batch].
        keyed: how many of them have a key of their own, one that is not their value, [batch].
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
        labels: Sequence[str | None] | None = None,
    ):
        super().__init__(slots, latent, batch, ridge, m0, seed, state_dtype, labels)
        named = encoder is None or isinstance(encoder, str)
        check.expect(named, "encoder", "its name, or None", type(encoder).__name__, TypeError)
        self.encoder = encoder
        self._folders = {}

    @property
    def ids(self) -> list[Id]:
        """The ids in the ledger, in the order of writing."""
        return self.ledger.ids()

    def number(self, memory: int | str | None) -> int | None:
        """The number of the memory of a label; numbers and None stay as they are.

        Raises:
            ValueError: no memory has that label.
        """
        if not isinstance(memory, str):
            return memory
        known = ", ".join(repr(label) for label in self.labels if label is not None) or "none that has one"
        check.expect(
            memory in self.labels, "memory", f"a number or one of the labels ({known})", repr(memory)
        )
        return self.labels.index(memory)

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_memory(self, label: str | None = None) -> int:
        """Add an empty memory to the others, such as one for a new user, and return its number.

        Args:
            label: its name; None: it has none.

        Raises:
            ValueError, TypeError: a label that is taken, or is no text.
        """
        self.labels = checked_labels([*self.labels, label], self.batch + 1)
        empty = EpisodicMemory(self.slots, self.latent, 1, self.ridge, "identity", 0, self.state_dtype)
        for name in ("gram", "cross", "count", "keyed", "energy", "ridges"):
            mine = getattr(self, name)
            self.register_buffer(name, torch.cat([mine, getattr(empty, name).to(mine)]))
        self._stale = torch.cat([self._stale, empty._stale])
        self._kept.clear()
        return self.batch - 1

    @torch.inference_mode(False)
    def grow(self, slots: int, m0: str | Tensor = "random", seed: int = 0) -> EpisodicMemory:
        """Give the memory other slots, and write every fact of the ledger to them anew.

        Args:
            slots: K from now on; more than C add nothing.
            m0, seed: as for a new memory.

        Returns:
            This memory.

        Raises:
            EngramError: rows without ids, which are not kept and cannot be addressed again.
            ValueError, TypeError: as for a new memory.

        Example:
            >>> memory.grow(384)
        """
        named = sum(len(entry.value) for _, entry in self.ledger.items())
        if named != len(self):
            raise EngramError(
                f"slots: expected a memory whose rows all have ids, got {len(self) - named} without"
            )
        settings = {**self.settings, "slots": slots}
        grown = EpisodicMemory(**settings, m0=m0, seed=seed).to(self.gram.device)
        facts = sorted(self.ledger.items(), key=lambda item: item[1].memory)
        rows = grown._rows_of(entry for _, entry in facts)
        weights = grown._weights(rows.keys)
        energy = grown._energy_with(rows, weights)
        grown._accumulate(rows, weights)
        grown._changed(rows.counts > 0, rows.counts, rows.keyed(self.state_dtype), energy)
        for name, buffer in grown.named_buffers():
            self.register_buffer(name, buffer)
        self._stale.fill_(True)
        self._kept.clear()
        return self

    @property
    def settings(self) -> dict:
        """What memories must share to be merged, by name."""
        names = ("slots", "latent", "batch", "ridge", "state_dtype", "encoder", "labels")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def write(
        self,
        values: Tensor,
        keys: Tensor | None = None,
        ids: Sequence[Id] | None = None,
        texts: Sequence[str | None] | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        parts: Sequence[int] | None = None,
        *,
        memory: int | str | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        """Write rows: `A += wᵀw`, `B += wᵀz` with `w = key M₀⁺`.

        Autograd does not record writing; for gradients through a write, call `ek.memory_solve` and its kin.

        Args:
            values: z, [N, C] or [batch, N, C], any floating dtype.
            keys: what is asked for later, of the values' shape; default: the values themselves, so that they
                can be completed from a part (auto-associative).
            ids: a name for each row, text or integer, in the rows' order; no two facts of any memory have
                the same. Rows with ids are kept in the ledger.
            texts: what each fact says, kept with its id.
            metadata: what else is known about each fact, as JSON has it, kept with its id.
            parts: how many rows each fact has, such as those of a long text; they have one id, and are
                forgotten together. Default: one.
            memory: the number or the label of the memory that a matrix goes to.
            cu_seqlens: bounds of the memories in a matrix, [batch + 1].

        Raises:
            ValueError: wrong shape, device or number of ids; values or keys that are NaN or infinite, or so
                large that the state would overflow.
            TypeError: wrong dtype.
            EngramError: an id that is taken.
        """
        rows = rows_of(values, keys, self.batch, self.latent, self.number(memory), cu_seqlens)
        check.same_device("values", values, self.gram.device)
        names = entries = None
        if ids is not None:
            sizes = checked_parts(parts, rows)
            names = self.ledger.check_new(ids, len(sizes))
            known = checked_metadata(metadata, len(names))
            entries = entries_of(rows, sizes, checked_texts(texts, len(names)), known)
        for name, given in (("texts", texts), ("metadata", metadata), ("parts", parts)):
            check.expect(ids is not None or given is None, name, "ids with them", "none")
        check.expect(
            ids is not None or self.ridge != LOO or not len(rows.values),
            "ids", "one for each row, as the ridge is chosen over the rows kept", "none",
        )  # fmt: skip
        weights = self._weights(rows.keys)
        energy = self._energy_with(rows, weights)
        self._accumulate(rows, weights)
        self._changed(rows.counts > 0, rows.counts, rows.keyed(self.state_dtype), energy)
        if entries is not None:
            self.ledger.add(names, entries)

    @torch.no_grad()
    def forget(
        self,
        values: Tensor | None = None,
        keys: Tensor | None = None,
        ids: Sequence[Id] | None = None,
        *,
        memory: int | str | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        """Take rows out: `A −= wᵀw`, `B −= wᵀz`. All of them, or none if one cannot be.

        By ids, exactly what was written is taken out: the ledger kept it. By values, rows that the ledger has
        leave it too. Other rows can only be forgotten if as many were written without ids, and if their
        leverage together shows that the state can have held them; it does not prove that it did.

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
            names, rows = self._named(ids)
        else:
            rows = rows_of(values, keys, self.batch, self.latent, self.number(memory), cu_seqlens)
            check.same_device("values", values, self.gram.device)
            names, unnamed = self.ledger.match(rows, self.count.tolist(), self.state_dtype)
            check_unnamed(self, rows, unnamed)
        weights = self._weights(rows.keys)
        self._accumulate(rows, weights, -1)
        self.ledger.remove(names)
        self._changed(rows.counts > 0, -rows.counts, -rows.keyed(self.state_dtype), self.energy)
        settle(self, self._energy_of(rows, weights))

    @torch.no_grad()
    def overwrite(self, ids: Sequence[Id], values: Tensor, texts: Sequence[str | None] | None = None) -> None:
        """Give rows other values at their own keys: forget, and write anew, in one step. All or none.

        Args:
            ids: names of rows.
            values: the new values of the facts' rows in the order of the ids, [N, C].
            texts: what each fact says now.

        Raises:
            EngramError: an id that is not in the memory.
            ValueError, TypeError: as for `write`.
        """
        found = self.ledger.find(ids)
        names, old = list(found), list(found.values())
        check.floating("values", values)
        parts = [len(entry.value) for entry in old]
        check.shape("values", values, (sum(parts), self.latent), "[N, C], a row for each of the ids'")
        check.same_device("values", values, self.gram.device)
        check.finite("values", values)
        said = checked_texts(texts, len(names))
        order = sorted(range(len(names)), key=lambda i: old[i].memory)
        rows = self._rows_of(old[i] for i in order)
        split = values.split(parts)
        ordered = torch.cat([split[i] for i in order]) if order else values
        fresh = Rows(rows.keys, ordered.to(self.state_dtype), rows.sizes, rows.shape)
        weights = self._weights(rows.keys)
        energy = self._energy_with(fresh, weights)
        # The same addresses: A stays as it is, to the bit, and B changes by the difference.
        with self._plain():
            pairs = zip(rows.split(weights), rows.split(fresh.values - rows.values), strict=True)
            for (memories, address), (_, change) in pairs:
                self.cross[memories] += address.mT @ change
        keyed = fresh.keyed(self.state_dtype) - rows.keyed(self.state_dtype)
        self._changed(rows.counts > 0, torch.zeros_like(self.count), keyed, energy)
        self.ledger.add(
            names,
            [
                entry._replace(value=value.clone(), text=text)
                for entry, value, text in zip(old, split, said, strict=True)
            ],
        )
        settle(self, self._energy_of(rows, weights))

    def read(
        self,
        queries: Tensor,
        *,
        addressing: str | None = None,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
        memory: int | str | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return what the memory has at the addresses of queries, `ẑ = w M`.

        By "key", `w = z M₀⁺`: the query is addressed as it would be for writing, and the answer is what was
        written under keys like it. By "content", `w = z M⁺`: the query is projected onto what the memory
        holds, which completes or cleans a value (Larimar's reading). Differentiable in the queries.

        Args:
            queries: z, [N, C] or [batch, N, C], any floating dtype.
            addressing: "key" or "content". None: by key in each memory that has a row with a key of its own,
                by content in the others.
            noise: the standard deviation of noise on w, for generation.
            generator: of the noise.
            memory, cu_seqlens: as for `write`.

        Returns:
            Readouts of the queries' shape and dtype; zeros from an empty memory.

        Raises:
            ValueError, TypeError: wrong shape, dtype, device or addressing, or queries that are not finite.
            EngramError: a ridge that is lost in the rounding of the state.

        Example:
            >>> memory.write(facts, keys=questions)
            >>> memory.read(questions)  # near to the facts
        """
        if addressing is not None:
            check_addressing(addressing)
        check.number("noise", noise, at_least=0)
        rows = rows_of(queries, None, self.batch, self.latent, self.number(memory), cu_seqlens, "queries")
        check.same_device("queries", queries, self.gram.device)
        matrix, inverse = self.matrix(), self._inverse_for(addressing)
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

    @torch.no_grad()
    def leverage(
        self,
        values: Tensor,
        keys: Tensor | None = None,
        *,
        memory: int | str | None = None,
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
        rows = rows_of(values, keys, self.batch, self.latent, self.number(memory), cu_seqlens)
        check.same_device("values", values, self.gram.device)
        precision, weights = self.precision(), self._weights(rows.keys)
        found = []
        for memories, address in rows.split(weights):
            whitened = solution.solve(precision[memories], address.mT, self.ridges[memories]).mT
            found.append((address * whitened).sum(-1).reshape(-1))
        return torch.cat(found).reshape(rows.shape)

    def merge(self, other: EpisodicMemory) -> EpisodicMemory:
        """Add all that another memory holds: `A += A'`, `B += B'`, as if it had been written here.

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
        theirs = other.settings
        for name, mine in self.settings.items():
            check.expect(mine == theirs[name], "other", f"a memory of {name} {mine!r}", repr(theirs[name]))
        near = 64 * torch.finfo(self.state_dtype).eps * float(self.m0.abs().max())
        same = torch.allclose(self.m0, other.m0.to(self.m0.device), rtol=0, atol=near)
        check.expect(same, "other", "a memory of the same m0", "another")
        shared = [name for name in other.ids if name in self.ledger]
        if shared:
            raise EngramError(f"other: expected a memory of other ids, got one that has {shared[0]!r} too")
        device = self.gram.device
        energy = self.energy + other.energy.to(device)
        check.finite("other", energy)
        self.gram += other.gram.to(device)
        self.cross += other.cross.to(device)
        self._changed(other.count.to(device) > 0, other.count.to(device), other.keyed.to(device), energy)
        self.ledger.add(other.ids, [entry for _, entry in other.ledger.items()])
        return self

    def extra_repr(self) -> str:
        sizes = f"slots={self.slots}, latent={self.latent}, batch={self.batch}, ridge={self.ridge}"
        return f"{sizes}, state_dtype={self.state_dtype}, rows={self.count.tolist()}"

    def _inverse_for(self, addressing: str | None) -> Tensor:
        """What addresses queries of each memory, M₀⁺ or M⁺: [batch, C, K]."""
        by_key = self.keyed > 0
        if addressing is not None:
            by_key = torch.full_like(by_key, addressing == "key")
        if by_key.all():
            return self.m0_pinv.expand(self.batch, -1, -1)
        if not by_key.any():
            return self.inverse()
        return torch.where(by_key[:, None, None], self.m0_pinv, self.inverse())

    def _named(self, ids: Sequence[Id]) -> tuple[list[Id], Rows]:
        """Ids and their rows, memory after memory."""
        found = sorted(self.ledger.find(ids).items(), key=lambda item: item[1].memory)
        return [name for name, _ in found], self._rows_of(entry for _, entry in found)
