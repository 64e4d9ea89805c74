"""The entries of several grafts of one base in one: by a rule, or as whole models are joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import _checks as check
from .._hashing import tensor_checksum
from ..errors import EngramError
from .joining import METHODS, Options, join

# What is set where several grafts set one position, of their values alone.
RULES = ("average", "first")


class Entries(Protocol):
    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    checksums: dict[str, str]


def common_base(grafts: Sequence[Entries]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes and checksums of all grafts.

    Raises:
        EngramError: they were made for different bases.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    checksums: dict[str, str] = {}
    for graft in grafts:
        for name, checksum in graft.checksums.items():
            if checksums.setdefault(name, checksum) != checksum:
                raise EngramError(f"grafts: expected grafts of one base, got two different {name!r}")
        shapes |= graft.shapes
    return shapes, checksums


def by_rule(grafts: Sequence[Entries], rule: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All positions; where several grafts set one, the mean of their values or the first one's."""
    indices, values = {}, {}
    for name in _names(grafts):
        given = [graft for graft in grafts if name in graft.indices]
        indices[name], values[name] = _ruled(
            [graft.indices[name] for graft in given], [graft.values[name] for graft in given], rule
        )
    return indices, values


def by_method(
    grafts: Sequence[Entries],
    base: Mapping[str, Tensor],
    checksums: Mapping[str, str],
    method: str,
    options: Options,
    seed: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All positions, with their changes from the base joined; those that end as the base are left out."""
    options.method_of(method)
    generator = torch.Generator().manual_seed(seed)
    indices, values = {}, {}
    for name in _names(grafts):
        weight = base[name].detach()
        if tensor_checksum(weight) != checksums[name]:
            raise EngramError(
                f"base: expected in {name!r} the weights that the grafts were made for, got others"
            )
        given = [(graft.indices.get(name), graft.values.get(name)) for graft in grafts]
        at = torch.cat([index for index, _ in given if index is not None]).unique()
        old = weight.flatten()[at.to(weight.device).long()].cpu()
        tuned = []
        for index, value in given:
            new = old.clone()
            if index is not None:
                new[torch.searchsorted(at, index)] = value.to(new.dtype)
            tuned.append(new)
        joined = join(old, tuned, method, options, generator)
        moved = joined != old
        if bool(moved.any()):
            indices[name], values[name] = at[moved], joined[moved]
    if not indices:
        raise EngramError(f"grafts: expected changes that {method!r} leaves some of, got none left")
    return indices, values


def check_method(method: object) -> None:
    known = (*RULES, *METHODS)
    check.expect(method in known, "method", f"one of {', '.join(known)}", repr(method))


def _names(grafts: Sequence[Entries]) -> list[str]:
    return list(dict.fromkeys(name for graft in grafts for name in graft.indices))


def _ruled(indices: list[Tensor], values: list[Tensor], rule: str) -> tuple[Tensor, Tensor]:
    """All positions once, ascending, with the mean or the first of the values given for each."""
    positions, order = torch.cat(indices).sort(stable=True)
    given = torch.cat(values)[order]
    unique, which, counts = positions.unique_consecutive(return_inverse=True, return_counts=True)
    first = given[counts.cumsum(0) - counts]
    if rule == "first":
        return unique, first
    total = torch.zeros(len(unique), dtype=torch.float32, device=given.device)
    total.index_add_(0, which, given.float())
    # One value stays as it is: a sum of one is exact, a NaN's bits might not be.
    return unique, torch.where(counts == 1, first, (total / counts).to(given.dtype))
