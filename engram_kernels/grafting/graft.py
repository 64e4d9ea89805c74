"""A graft: positions of a model and the fine-tuned values that belong there."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._hashing import tensor_checksum
from ..errors import EngramError
from ..ops import unpack_mask
from . import files
from .applied import AppliedGraft


class Overlap(NamedTuple):
    """How many positions two grafts share: `shared`, of `mine` and `theirs`; `jaccard = shared / either`."""

    shared: int
    mine: int
    theirs: int
    jaccard: float


class Density(NamedTuple):
    """How many `entries` of `size` weights a graft sets in one kind of module of one layer (−1: in none)."""

    layer: int
    module: str
    entries: int
    size: int

    @property
    def share(self) -> float:
        return self.entries / self.size if self.size else 0.0


@dataclass
class Graft:
    """A skill as a sparse patch: `weight[indices] = values`, absolute fine-tuned values, bit for bit.

    Attributes:
        indices: by parameter name, ascending row-major positions `[n]`, int32 (int64 in tensors of more than
            2³¹ entries). Parameters without entries are left out.
        values: by parameter name, `[n]`, in the base's dtype.
        shapes: by name, of every parameter that could have been grafted.
        checksums: by name, of the same parameters of the base: dtype, shape and bits.
        base_model: name or folder of the base, as its configuration says.
        base_revision: the base's commit on the Hub, where it is known.
        recipe: how the positions were found.
        metrics: whatever was measured; written to the configuration.

    Example:
        >>> graft = Graft.from_pretrained("my-skill")
        >>> with graft.apply(model):
        ...     model.generate(**inputs)
        >>> # here the model is as it was, bit for bit

    Source: Panigrahi et al. 2023 (arXiv 2302.06600).
    """

    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    checksums: dict[str, str]
    base_model: str | None = None
    base_revision: str | None = None
    recipe: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)

    @classmethod
    def from_masks(
        cls,
        pre: Mapping[str, Tensor],
        ft: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        **attributes: object,
    ) -> Graft:
        """Make a graft of the entries of `ft` where packed masks are 1.

        Args:
            pre: the base's graftable tensors by name, for their shapes and checksums.
            ft: the fine-tuned tensors.
            masks: packed masks of `ek.pack_mask`, or of `ek.graft_top_k`.
            **attributes: of the graft: base_model, recipe, metrics.
        """
        indices, values = {}, {}
        for name, weight in pre.items():
            at = unpack_mask(masks[name], (weight.numel(),)).nonzero().flatten()
            if at.numel():
                values[name] = ft[name].detach().reshape(-1)[at].cpu()
                indices[name] = at.to(_index_dtype(weight.numel())).cpu()
        shapes = {name: tuple(weight.shape) for name, weight in pre.items()}
        checksums = {name: tensor_checksum(weight) for name, weight in pre.items()}
        return cls(indices, values, shapes, checksums, **attributes)

    @property
    def size(self) -> int:
        """The number of weights that the graft sets."""
        return sum(at.numel() for at in self.indices.values())

    @property
    def sparsity(self) -> float:
        """That number as a share of the graftable weights: 1e-4 is 0.01 %."""
        return self.size / max(1, sum(map(_count, self.shapes.values())))

    def apply(self, model: nn.Module, force: bool = False) -> AppliedGraft:
        """Write the values into a model; what is returned takes them back, bit for bit.

        Args:
            model: the base that the graft was made for.
            force: write even if its weights are others; values are rounded to the model's dtype then.

        Returns:
            The applied graft: `revert()` it, or use it as a context manager, or let it stand. It holds on to
            the model's tensors: revert it before the model is moved or converted.

        Raises:
            EngramError: the model lacks a parameter, or its weights are not the base's; it is unchanged.
        """
        return AppliedGraft(self, model, force)

    def merge_and_unload(self, model: nn.Module, force: bool = False) -> nn.Module:
        """Write the values into a model for good, and return the model.

        Raises:
            EngramError: as `apply`.
        """
        self.apply(model, force)
        return model

    def density(self) -> list[Density]:
        """Entries by layer and kind of module, in the model's order; layer −1 for what is in no layer."""
        table: dict[tuple[int, str], list[int]] = {}
        for name, shape in self.shapes.items():
            layer, kind = _place(name)
            row = table.setdefault((layer, kind), [0, 0])
            row[0] += self.indices[name].numel() if name in self.indices else 0
            row[1] += _count(shape)
        return [Density(layer, kind, entries, size) for (layer, kind), (entries, size) in table.items()]

    def overlap(self, other: Graft) -> Overlap:
        """Count the positions that both grafts set."""
        shared = sum(
            int(torch.isin(at, other.indices[name], assume_unique=True).sum())
            for name, at in self.indices.items()
            if name in other.indices
        )
        either = self.size + other.size - shared
        return Overlap(shared, self.size, other.size, shared / either if either else 0.0)

    @staticmethod
    def union(grafts: Sequence[Graft], conflicts: str = "average") -> Graft:
        """Join grafts of one base.

        Args:
            grafts: at least one.
            conflicts: what stands where several grafts set one position: "average", the mean of their values
                (taken in fp32, rounded once), or "first", the value of the first graft that sets it.

        Returns:
            A new graft, without metrics.

        Raises:
            ValueError: no graft, or an unknown rule.
            EngramError: the grafts were made for different bases.
        """
        if conflicts not in ("average", "first"):
            raise ValueError(f"conflicts: expected 'average' or 'first', got {conflicts!r}")
        if not grafts:
            raise ValueError("grafts: expected at least one, got none")
        first = grafts[0]
        shapes: dict[str, tuple[int, ...]] = {}
        checksums: dict[str, str] = {}
        for graft in grafts:
            for name, checksum in graft.checksums.items():
                if checksums.setdefault(name, checksum) != checksum:
                    raise EngramError(f"grafts: expected grafts of one base, got two different {name!r}")
            shapes |= graft.shapes
        indices, values = {}, {}
        for name in shapes:
            given = [graft for graft in grafts if name in graft.indices]
            if given:
                indices[name], values[name] = _join(
                    [graft.indices[name] for graft in given],
                    [graft.values[name] for graft in given],
                    conflicts,
                )
        recipe = {"union": [graft.recipe for graft in grafts], "conflicts": conflicts}
        return Graft(indices, values, shapes, checksums, first.base_model, first.base_revision, recipe)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `graft_config.json` and `graft_model.safetensors` into a new folder: all of it or nothing.

        Raises:
            EngramError: the folder exists and is not empty, or cannot be written.
        """
        files.save(self, directory)

    @classmethod
    def from_pretrained(cls, name_or_directory: str | os.PathLike, revision: str | None = None) -> Graft:
        """Read a graft from a folder, or from the Hugging Face Hub.

        Args:
            name_or_directory: a folder that `save_pretrained` wrote, or a repository's name.
            revision: of the repository.

        Raises:
            EngramError: there is none, or its files are incomplete or were changed.
        """
        return cls(**files.load(name_or_directory, revision))

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, commit_message: str | None = None
    ) -> str:
        """Upload the graft's folder to the Hugging Face Hub; return the commit's address.

        Args:
            repo_id: such as "user/skill"; made where there is none.
            private: whether a repository that is made is private. Default: the account's own.
            commit_message: default "Upload graft".
        """
        return files.push(self, repo_id, private, commit_message or "Upload graft")


def _count(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _index_dtype(size: int) -> torch.dtype:
    return torch.int32 if size <= 2**31 else torch.int64


def _place(name: str) -> tuple[int, str]:
    """("model.layers.3.mlp.down_proj.weight") → (3, "mlp.down_proj.weight")."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return (int(found[1]), name[found.end() :]) if found else (-1, name)


def _join(indices: list[Tensor], values: list[Tensor], conflicts: str) -> tuple[Tensor, Tensor]:
    """All positions once, ascending, with the mean or the first of the values given for each."""
    positions, order = torch.cat(indices).sort(stable=True)
    given = torch.cat(values)[order]
    unique, which, counts = positions.unique_consecutive(return_inverse=True, return_counts=True)
    first = given[counts.cumsum(0) - counts]
    if conflicts == "first":
        return unique, first
    total = torch.zeros(len(unique), dtype=torch.float32, device=given.device)
    total.index_add_(0, which, given.float())
    # One value stands as it is: a sum of one is exact, a NaN's bits might not be.
    return unique, torch.where(counts == 1, first, (total / counts).to(given.dtype))
