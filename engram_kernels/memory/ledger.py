"""The facts that were written with ids, as they were given, so that they can be forgotten exactly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._hashing import tensor_bytes
from ..errors import EngramError
from ..hf.scripts import is_whole
from .rows import Rows

Id = str | int


class Entry(NamedTuple):
    """A fact: one row of a memory, or several that are forgotten together.

    Attributes:
        memory: the number of the memory that it lies in.
        key: the latents that its addressing weights come from, [rows, C].
        value: the latents that are stored there, [rows, C].
        text: what it says, for people; may be None.
        metadata: what else is known about it, as JSON has it; may be None.
    """

    memory: int
    key: Tensor
    value: Tensor
    text: str | None = None
    metadata: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        """Without the latents, which are hundreds of numbers each."""
        said = f"{self.text!r}, " if self.text is not None else ""
        known = f", metadata={self.metadata!r}" if self.metadata is not None else ""
        return f"Entry({said}memory={self.memory}, rows={len(self.value)}{known})"


class Ledger:
    """Entries by id, in the order of writing.

    Every check comes before any change: a call that raises leaves the ledger as it was.
    """

    def __init__(self, entries: Mapping[Id, Entry] | None = None):
        self._entries: dict[Id, Entry] = dict(entries or {})

    def __repr__(self) -> str:
        return f"Ledger({len(self)} facts)"

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: Id) -> bool:
        return name in self._entries

    def __getitem__(self, name: Id) -> Entry:
        return self._entries[name]

    def items(self) -> Iterator[tuple[Id, Entry]]:
        return iter(self._entries.items())

    def ids(self) -> list[Id]:
        return list(self._entries)

    def by_memory(self, batch: int) -> list[list[Entry]]:
        """The entries of each of `batch` memories."""
        groups: list[list[Entry]] = [[] for _ in range(batch)]
        for entry in self._entries.values():
            groups[entry.memory].append(entry)
        return groups

    def check_new(self, ids: Sequence[Id], facts: int) -> list[Id]:
        """Check that there is a new id for each fact, and return them as a list.

        Raises:
            TypeError: an id that is no text and no integer.
            ValueError: another number of ids than facts, or an id given twice.
            EngramError: an id that is taken.
        """
        ids = _distinct(ids)
        check.expect(len(ids) == facts, "ids", f"{facts}, one for each row", len(ids))
        taken = [name for name in ids if name in self._entries]
        if taken:
            raise EngramError(
                f"ids: expected new ones, got {taken[0]!r}, which is in the memory; forget or overwrite it"
            )
        return ids

    def find(self, ids: Sequence[Id]) -> dict[Id, Entry]:
        """Return the entries of known, different ids, in the order of the ids.

        Raises:
            TypeError, ValueError: as for `check_new`.
            EngramError: an id that is not in the memory.
        """
        ids = _distinct(ids)
        unknown = [name for name in ids if name not in self._entries]
        if unknown:
            raise EngramError(
                f"ids: expected ones that were written, got {unknown[0]!r}"
                + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
            )
        return {name: self._entries[name] for name in ids}

    def match(self, rows: Rows, counts: Sequence[int], dtype: torch.dtype) -> tuple[list[Id], list[bool]]:
        """Find rows bit for bit in `dtype`: the ids of those that are here, and which of the rows are not.

        A fact of several rows is forgotten by its id alone: its rows are not found.

        Args:
            rows: to be looked for.
            counts: the rows in each memory, with and without ids.
            dtype: of the memory's state.

        Raises:
            EngramError: more rows are not here than were written without ids.
        """

        def bits(memory: int, key: Tensor, value: Tensor) -> tuple:
            return memory, *(bytes(tensor_bytes(latent.to(dtype))) for latent in (key, value))

        here: dict[tuple, list[Id]] = {}
        unnamed = list(counts)
        for name, entry in self._entries.items():
            if len(entry.value) == 1:
                here.setdefault(bits(entry.memory, entry.key, entry.value), []).append(name)
            unnamed[entry.memory] -= len(entry.value)
        names, strangers, others = [], [], [0] * len(unnamed)
        for owner, key, value in zip(rows.owners, rows.keys, rows.values, strict=True):
            same = here.get(bits(owner, key, value))
            strangers.append(not same)
            if same:
                names.append(same.pop())
            else:
                others[owner] += 1
        for wanted, there in zip(others, unnamed, strict=True):
            if wanted > there:
                raise EngramError(
                    f"values: expected rows that were written, got {wanted} that the ledger does not have, "
                    f"where {there or 'none'} {'was' if there == 1 else 'were'} written without ids"
                )
        return names, strangers

    def add(self, ids: Sequence[Id], entries: Sequence[Entry]) -> None:
        """Add entries, or replace those of known ids."""
        self._entries.update(zip(ids, entries, strict=True))

    def remove(self, ids: Sequence[Id]) -> None:
        for name in ids:
            del self._entries[name]

    def clear(self) -> None:
        self._entries.clear()


def checked_texts(texts: Sequence[str | None] | None, facts: int) -> list[str | None]:
    """Check that there is a text or None for each fact."""
    if texts is None:
        return [None] * facts
    texts = list(texts)
    check.expect(len(texts) == facts, "texts", f"{facts}, one for each id", len(texts))
    for text in texts:
        is_text = text is None or isinstance(text, str)
        check.expect(is_text, "texts", "texts or None", type(text).__name__, TypeError)
        check.expect(is_whole(text or ""), "texts", "whole characters", check.excerpt(text or ""))
    return texts


def checked_metadata(
    metadata: Sequence[Mapping[str, Any] | None] | None, facts: int
) -> list[Mapping[str, Any] | None]:
    """Copies of what is known about each fact: mappings that JSON can hold, or None."""
    if metadata is None:
        return [None] * facts
    metadata = list(metadata)
    check.expect(len(metadata) == facts, "metadata", f"{facts}, one for each id", len(metadata))
    for known in metadata:
        is_mapping = known is None or isinstance(known, Mapping)
        check.expect(is_mapping, "metadata", "mappings or None", type(known).__name__, TypeError)
    try:
        content = [None if known is None else dict(known) for known in metadata]
        written = json.dumps(content, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata: expected what JSON can hold ({error})") from None
    check.expect(is_whole(written), "metadata", "whole characters", "half of one")
    return json.loads(written)


def checked_parts(parts: Sequence[int] | None, rows: Rows) -> list[int]:
    """The number of rows of each fact: one, or as `parts` says."""
    total = len(rows.values)
    if parts is None:
        return [1] * total
    parts = list(parts)
    for part in parts:
        check.integer("parts", part, at_least=1)
    check.expect(
        sum(parts) == total, "parts", f"numbers whose sum is {total}, the number of rows", sum(parts)
    )
    # Where a memory's rows end, a fact must end too.
    ends = {0, *accumulate(parts)}
    whole = all(end in ends for end in accumulate(rows.sizes))
    check.expect(whole, "parts", "facts that lie in one memory each", "one that lies in two")
    return parts


def entries_of(
    rows: Rows,
    parts: Sequence[int],
    texts: Sequence[str | None],
    metadata: Sequence[Mapping[str, Any] | None],
) -> list[Entry]:
    """Copy single facts: a view would keep all that was written with it, after it is forgotten too."""
    entries, at, owners = [], 0, rows.owners
    for part, text, known in zip(parts, texts, metadata, strict=True):
        mine = slice(at, at + part)
        value = rows.values[mine].clone()
        key = rows.keys[mine]
        # A key that is the value is kept once.
        key = value if rows.keys is rows.values or _same(key, value) else key.clone()
        entries.append(Entry(owners[at], key, value, text, known))
        at += part
    return entries


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def rows_of_entries(entries: Iterable[Entry], cross: Tensor) -> Rows:
    """Rows of entries that are ordered by memory, in the dtype and on the device of B [batch, K, C]."""
    entries = list(entries)
    keys, values = (
        torch.cat([getattr(entry, name).to(cross) for entry in entries])
        if entries
        else cross.new_zeros(0, cross.shape[-1])
        for name in ("key", "value")
    )
    sizes = [0] * len(cross)
    for entry in entries:
        sizes[entry.memory] += len(entry.value)
    return Rows(keys, values, sizes, (len(values),))


def _distinct(ids: Sequence[Id]) -> list[Id]:
    check.expect(not isinstance(ids, (str, int)), "ids", "a sequence of ids", repr(ids), TypeError)
    ids, seen = list(ids), set()
    for name in ids:
        is_id = isinstance(name, (str, int)) and not isinstance(name, bool)
        check.expect(is_id, "ids", "texts or integers", type(name).__name__, TypeError)
        check.expect(is_whole(str(name)), "ids", "whole characters", repr(name))
        check.expect(name not in seen, "ids", "different ones", f"{name!r} twice")
        seen.add(name)
    return ids
