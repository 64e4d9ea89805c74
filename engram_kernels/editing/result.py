"""What edits did, and how to undo them, take one out, keep them, and do them again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import _checks as check
from .._hashing import tensor_checksum
from ..errors import EngramError
from ..hf.projection import Projection, output_projection
from ..ops import apply_low_rank_
from .edit import Edit


@dataclass(frozen=True)
class EditRecord:
    """What one edit did.

    Attributes:
        edit: the fact.
        probability_before: `p(target | prompt)` of the whole target before any write.
        probability_after: the same after all writes of the call that made the edit.
        losses: of every step of the value's optimisation.
        key_norm: norm of the averaged key.
        value_norm: norm of the value that the projection answered before.
        change_norm: norm of the change of the value.
    """

    edit: Edit
    probability_before: float
    probability_after: float
    losses: list[float]
    key_norm: float
    value_norm: float
    change_norm: float


@dataclass(frozen=True)
class SkippedEdit:
    """An edit that was not made.

    Attributes:
        number: its place in what was asked for.
        edit: the fact.
        reason: one sentence.
    """

    number: int
    edit: Edit
    reason: str


@dataclass(frozen=True)
class Write:
    """One rank-n write as it was done: `weight += left @ right`.

    Attributes:
        module: name of the projection.
        left, right: float32, `[out, n]` and `[n, in]`; `leftᵀ = (λI + K rightᵀ)⁻¹ E`.
        keys, changes: `K [n, in]` and `E [n, out]`, float32: what was to be written.
        ridge: `λ`.
        edits: `n` numbers: to which record each row belongs.
    """

    module: str
    left: Tensor
    right: Tensor
    keys: Tensor
    changes: Tensor
    ridge: float
    edits: tuple[int, ...]


@dataclass
class Site:
    """One matrix that was written.

    Attributes:
        module: name of the projection.
        layer: index of the decoder layer.
        transposed: whether the model keeps the matrix as `[in, out]`.
        base_checksum: of the weight before the first write.
        edited_checksum: of the weight after the last; None where the writes were never done in this order.
        experts: how many experts share the tensor that it is a part of, the name's last number being its own;
            None where it is a weight by itself.
        dtype: of the weight, such as "bfloat16"; None in files that do not say it.
    """

    module: str
    layer: int
    transposed: bool
    base_checksum: str
    edited_checksum: str | None = None
    experts: int | None = None
    dtype: str | None = None
    _projection: Projection | None = field(default=None, repr=False, compare=False)
    _original: Tensor | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, projection: Projection) -> Site:
        """The site as it is now, with a copy of its weight."""
        return cls(
            module=projection.name,
            layer=projection.layer,
            transposed=projection.transposed,
            base_checksum=matrix_checksum(projection),
            experts=getattr(projection.module, "count", None),
            dtype=str(projection.module.weight.dtype).removeprefix("torch."),
            _projection=projection,
            _original=snapshot(projection),
        )

    def put_back(self) -> None:
        """Put the copied weight back."""
        restore(self._projection, self._original)


@dataclass
class EditResult:
    """Edits, done or loaded: a report, a low-rank adapter, and an exact undo.

    Used as a context manager it takes the edits back at the end of the block. Its length is their number.

    Attributes:
        records: one `EditRecord` an edit, in the order in which they were asked for.
        writes: the writes in the order in which they were done.
        sites: the matrices that were written.
        skipped: the edits that were asked for and not made.

    Example:
        >>> with editor.edit(Edit("The Eiffel Tower", "{} is located in the city of", "Rome")) as result:
        ...     print(result.records[0].probability_after)
        >>> # here the model is as it was, bit for bit
    """

    records: list[EditRecord]
    writes: list[Write]
    sites: list[Site]
    skipped: list[SkippedEdit] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def modules(self) -> list[str]:
        """The names of the projections that were written."""
        return [site.module for site in self.sites]

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """`left [out, n]` and `right [n, in]`, float32: `left @ right` is the sum of all changes of a module.

        Raises:
            ValueError: no edit wrote that module.
        """
        writes = [write for write in self.writes if write.module == module]
        if not writes:
            raise ValueError(f"module: expected one of {self.modules}, got {module!r}")
        left, right = zip(*((write.left, write.right) for write in writes), strict=True)
        return torch.cat(left, dim=1), torch.cat(right, dim=0)

    @property
    def applied(self) -> bool:
        """Whether the edits stand in a model that this result knows, and can be reverted."""
        return any(site._original is not None for site in self.sites)

    def revert(self, force: bool = False) -> None:
        """Put the overwritten matrices back, bit for bit. Nothing happens where nothing is applied.

        Args:
            force: put them back even if one was changed since; what changed it is lost.

        Raises:
            EngramError: a matrix was changed since, by a later edit for instance, and `force` is False.
        """
        if not self.applied:
            return
        if not force:
            self._check_unchanged()
        for site in self.sites:
            site.put_back()
            site._projection = site._original = None

    def apply(self, model: torch.nn.Module, force: bool = False) -> EditResult:
        """Do the same writes on a model: on the weights they were made for, bit for bit.

        Args:
            model: with the layers these edits were made for.
            force: write even if its matrices are not the ones that these edits were made for.

        Returns:
            This result, which can be reverted then.

        Raises:
            EngramError: a matrix of the model is another one, or this result stands in a model already.
        """
        if self.applied:
            raise EngramError(
                "model: expected one for a result that is not applied, got a result that is: revert it first"
            )
        projections = []
        for site in self.sites:
            projection = output_projection(model, site.layer)
            left, right = self.factors(site.module)
            shape, expected = list(projection.matrix.shape), [left.shape[0], right.shape[1]]
            if projection.name != site.module or shape != expected:
                raise EngramError(
                    f"model: expected a matrix {expected} in {site.module!r}, "
                    f"got {shape} in {projection.name!r}"
                )
            if not force and matrix_checksum(projection) != site.base_checksum:
                raise EngramError(
                    f"model: expected in {site.module!r} the weights that the edit was made for, got others "
                    "(force=True edits them all the same)"
                )
            projections.append(projection)
        originals = [snapshot(projection) for projection in projections]
        for site, projection, original in zip(self.sites, projections, originals, strict=True):
            site._projection, site._original = projection, original
        try:
            self._write()
        except BaseException:
            for site in self.sites:
                site.put_back()
                site._projection = site._original = None
            raise
        return self

    def remove(self, number: int) -> None:
        """Take one edit out of the others, as if it had never been made.

        Where edits were written jointly, the others are written anew without it, from their keys and changes:
        exact for one layer. Where they were written one after the other, its write is left out, and the later
        ones stay as they were found, with it in place. Over several layers, each keeps what it was to add.

        Args:
            number: of the record, from 0.

        Raises:
            TypeError, ValueError: there is no such record, or it is the only one: revert that.
            EngramError: a matrix was changed since; nothing is removed then.
        """
        check.integer("number", number)
        if not 0 <= number < len(self):
            raise ValueError(f"number: expected from 0 to {len(self) - 1}, got {number}")
        if len(self) == 1:
            raise ValueError("number: expected one of several edits, got the only one: revert the result")
        if self.applied:
            self._check_unchanged()
        previous = self.writes
        try:
            kept = [_without(write, number) for write in previous]
        except torch.linalg.LinAlgError as error:
            raise EngramError(
                f"number: expected edits that stand without {number}, got dependent ones"
            ) from error
        self.writes = [write for write in kept if write is not None]
        try:
            if self.applied:
                for site in self.sites:
                    site.put_back()
                self._write()
        except BaseException:
            self.writes = previous
            for site in self.sites:
                site.put_back()
            self._write()
            raise
        del self.records[number]
        # A matrix that only this edit wrote is as it was.
        written = {write.module for write in self.writes}
        self.sites = [site for site in self.sites if site.module in written]
        if not self.applied:
            for site in self.sites:
                site.edited_checksum = None

    def __enter__(self) -> EditResult:
        return self

    def __exit__(self, kind, _exception, _traceback) -> None:
        try:
            self.revert()
        except EngramError as error:
            if kind is None:
                raise
            # The exception in flight says more than its consequence here.
            warnings.warn(f"the edits stay in the model: {error}", stacklevel=2)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write the edits into a new directory, as a LoRA adapter that PEFT loads: all of it or nothing.

        `adapter_config.json` and `adapter_model.safetensors` are the adapter, exact in float32: `B = left`,
        `A = right`, scale 1. `edit.json` and `edit.safetensors` hold what `from_pretrained` needs beside.

        Raises:
            EngramError: the directory exists and is not empty, or cannot be written.
        """
        from .files import save_result

        save_result(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> EditResult:
        """Read what `save_pretrained` wrote; `apply` puts it into a model.

        Raises:
            EngramError: the directory does not hold saved edits.
        """
        from .files import load_result

        return load_result(directory)

    @classmethod
    def stack(cls, results: Sequence[EditResult], force: bool = False) -> EditResult:
        """Several results as one, which does their writes one after the other, and is not applied.

        The values of each were found without the others, unless it was made on the model with those applied.

        Args:
            results: at least one, in the order of their writes.
            force: join them even if they were made for different weights.

        Raises:
            TypeError: `results` holds something else.
            ValueError: it is empty.
            EngramError: one was made for other weights than the first one's, or than what one before it left;
                or, whatever `force` says, for a matrix of another shape.
        """
        results = list(results)
        if not results:
            raise ValueError("results: expected at least one, got none")
        for result in results:
            if not isinstance(result, cls):
                raise TypeError(f"results: expected EditResult objects, got {type(result).__name__}")
        _check_same_weights(results, force)
        records, writes, skipped, sites, asked = [], [], [], {}, 0
        for result in results:
            writes += [
                replace(write, edits=tuple(edit + len(records) for edit in write.edits))
                for write in result.writes
            ]
            records += result.records
            skipped += [replace(item, number=item.number + asked) for item in result.skipped]
            asked += len(result.records) + len(result.skipped)
            for site in result.sites:
                alone = replace(site, edited_checksum=None, _projection=None, _original=None)
                sites.setdefault(site.module, alone)
        return cls(records, writes, list(sites.values()), skipped)

    def _write(self) -> None:
        """Do all writes on the matrices as they are, and note what they give."""
        projections = {site.module: site._projection for site in self.sites}
        for write in self.writes:
            write_(projections[write.module], write)
        for site in self.sites:
            # A forced base, or another device's arithmetic, leaves another matrix: revert must know that one.
            site.edited_checksum = matrix_checksum(site._projection)

    def _check_unchanged(self) -> None:
        for site in self.sites:
            if matrix_checksum(site._projection) != site.edited_checksum:
                raise EngramError(
                    f"model: expected {site.module!r} as this edit left it, got it changed since: "
                    "revert later edits first, or give force=True"
                )


def _check_same_weights(results: list[EditResult], force: bool) -> None:
    """Raise unless each matrix of a result is as the first one found it, or as one before it left it."""
    known: dict[str, set[str | None]] = {}
    shapes: dict[str, list[int]] = {}
    for number, result in enumerate(results):
        for write in result.writes:
            shape = [write.left.shape[0], write.right.shape[1]]
            if shapes.setdefault(write.module, shape) != shape:
                raise EngramError(
                    f"results: expected a matrix {shapes[write.module]} in {write.module!r}, "
                    f"got {shape} in number {number}"
                )
        for site in result.sites:
            seen = known.setdefault(site.module, {site.base_checksum})
            if site.base_checksum not in seen and not force:
                raise EngramError(
                    "results: expected edits made for the same weights, or one on top of the other, got "
                    f"number {number} made for others in {site.module!r} (force=True joins them all the same)"
                )
            seen.add(site.edited_checksum)


def _without(write: Write, number: int) -> Write | None:
    """The write without one edit, and with the later ones renumbered; None where nothing is left of it."""
    kept = [place for place, edit in enumerate(write.edits) if edit != number]
    edits = tuple(write.edits[place] - (write.edits[place] > number) for place in kept)
    if not kept:
        return None
    if len(kept) == len(write.edits):
        return replace(write, edits=edits)
    right, keys, changes = write.right[kept], write.keys[kept], write.changes[kept]
    system = keys.double() @ right.double().T
    system.diagonal().add_(write.ridge)
    left = torch.linalg.solve(system, changes.double()).T.float()
    return Write(write.module, left, right, keys, changes, write.ridge, edits)


def write_(projection: Projection, write: Write) -> None:
    """`weight += left @ right`, in place."""
    matrix = projection.matrix
    apply_low_rank_(matrix, write.left.to(matrix.device), write.right.to(matrix.device))
    # A caller's autocast keeps copies of the weights in its own dtype, and does not see this write.
    torch.clear_autocast_cache()


def snapshot(projection: Projection) -> Tensor:
    """A copy of the weight as it lies in memory."""
    return projection.module.weight.detach().clone()


@torch.no_grad()
def restore(projection: Projection, original: Tensor) -> None:
    """Put a snapshot back."""
    projection.module.weight.copy_(original)
    torch.clear_autocast_cache()


def matrix_checksum(projection: Projection) -> str:
    """A digest of the weight's dtype, shape and bits."""
    return tensor_checksum(projection.module.weight)
