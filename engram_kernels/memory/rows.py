"""Rows of latents and the memories that they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .. import _checks as check


@dataclass
class Rows:
    """Latents in one matrix, memory after memory.

    Attributes:
        keys: the latents that addressing weights come from, [T, C].
        values: the latents to be stored, [T, C]; the keys themselves where none were given.
        sizes: the number of rows of each memory; their sum is T.
        shape: the leading dimensions as they were given, [N] or [batch, N].
    """

    keys: Tensor
    values: Tensor
    sizes: list[int]
    shape: tuple[int, ...]

    @property
    def owners(self) -> list[int]:
        """The memory of each row."""
        return [number for number, size in enumerate(self.sizes) for _ in range(size)]

    @property
    def counts(self) -> Tensor:
        """The number of rows of each memory, [batch]."""
        return torch.tensor(self.sizes, device=self.values.device)

    @property
    def cu_seqlens(self) -> Tensor:
        """Where each memory's rows begin and end, [batch + 1]."""
        return torch.tensor([0, *self.sizes], device=self.values.device).cumsum(0)

    def summed(self, rows: Tensor) -> Tensor:
        """Sum what belongs to these rows, [T, …], for each memory: [batch, …]."""
        owners = torch.tensor(self.owners, dtype=torch.int64, device=rows.device)
        return rows.new_zeros(len(self.sizes), *rows.shape[1:]).index_add(0, owners, rows)

    def keyed(self, dtype: torch.dtype) -> Tensor:
        """How many rows of each memory have a key that is not their value in `dtype`, [batch]."""
        if self.keys is self.values:
            return torch.zeros_like(self.counts)
        keys, values = self.keys, self.values
        # What is equal in a narrower dtype is equal in a wider one, without a copy.
        if keys.dtype != values.dtype or torch.promote_types(keys.dtype, dtype) != dtype:
            keys, values = keys.to(dtype), values.to(dtype)
        own = (keys != values).any(-1)
        return self.summed(own.long())

    def groups(self) -> Iterator[tuple[slice, tuple[int, ...]]]:
        """Memories that can be worked on at once, and the leading shape of their rows, in the rows' order.

        All memories where each has the same number of rows, else one after the other, without the empty ones.
        """
        if len(set(self.sizes)) == 1:
            yield slice(0, len(self.sizes)), (len(self.sizes), self.sizes[0])
            return
        for number, size in enumerate(self.sizes):
            if size:
                yield slice(number, number + 1), (1, size)

    def split(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """What belongs to these rows, [T, …], by group: the memories, and [memories, n, …]."""
        start = 0
        for memories, (count, size) in self.groups():
            yield memories, rows[start : start + count * size].reshape(count, size, *rows.shape[1:])
            start += count * size


def rows_of(
    values: Tensor,
    keys: Tensor | None,
    batch: int,
    latent: int,
    memory: int | None,
    cu_seqlens: Tensor | None,
    name: str = "values",
) -> Rows:
    """Check latents, and find out which memory each row belongs to.

    A matrix [N, C] belongs to the memory of that number, which may be left out where there is only one; with
    `cu_seqlens` its rows `cu_seqlens[i] : cu_seqlens[i + 1]` belong to memory i. A tensor [batch, N, C] has a
    block for each memory.

    Raises:
        ValueError: wrong shape, device, number or bounds, or a latent that is NaN or infinite.
        TypeError: wrong dtype.
    """
    meaning = f"shape [N, {latent}] or [{batch}, N, {latent}]"
    check.floating(name, values)
    check.expect(values.dim() in (2, 3) and values.shape[-1] == latent, name, meaning, list(values.shape))
    if keys is not None:
        check.floating("keys", keys)
        check.shape("keys", keys, values.shape, f"as {name}")
        check.same_device("keys", keys, values.device)
    if values.dim() == 3:
        check.expect(values.shape[0] == batch, name, meaning, list(values.shape))
        check.expect(memory is None, "memory", f"None for {name} with a block for each memory", memory)
        check.expect(cu_seqlens is None, "cu_seqlens", f"None for {name} with a block for each memory", "one")
        sizes = [values.shape[1]] * batch
    elif cu_seqlens is not None:
        check.expect(memory is None, "memory", "None with cu_seqlens", memory)
        sizes = _sizes(cu_seqlens, batch, len(values))
    else:
        number = number_of(memory, batch)
        sizes = [len(values) if i == number else 0 for i in range(batch)]
    check.finite(name, values)
    if keys is not None:
        check.finite("keys", keys)
    flat = values.reshape(-1, latent)
    addressed = flat if keys is None else keys.reshape(-1, latent)
    return Rows(addressed, flat, sizes, tuple(values.shape[:-1]))


def number_of(memory: int | None, batch: int) -> int:
    """The number of the memory that is meant; None means the only one.

    Raises:
        ValueError, TypeError: none of the `batch` memories.
    """
    number = 0 if memory is None and batch == 1 else memory
    check.expect(number is not None, "memory", f"a number, as there are {batch} memories", "None")
    check.integer("memory", number)
    check.expect(0 <= number < batch, "memory", f"from 0 to {batch - 1}", number)
    return number


def _sizes(cu_seqlens: Tensor, batch: int, rows: int) -> list[int]:
    is_tensor = isinstance(cu_seqlens, Tensor)
    check.expect(is_tensor, "cu_seqlens", "a tensor", type(cu_seqlens).__name__, TypeError)
    integers = (torch.int64, torch.int32)
    check.expect(cu_seqlens.dtype in integers, "cu_seqlens", "int64 or int32", cu_seqlens.dtype, TypeError)
    check.shape("cu_seqlens", cu_seqlens, (batch + 1,), "[batch + 1]")
    bounds = cu_seqlens.tolist()
    sizes = [end - start for start, end in pairwise(bounds)]
    sound = bounds[0] == 0 and bounds[-1] == rows and min(sizes) >= 0
    check.expect(sound, "cu_seqlens", f"bounds that rise from 0 to {rows}", bounds)
    return sizes
