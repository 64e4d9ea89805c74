"""Edits that were made: how to undo them, take one out, keep them, and make them again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ... import _checks as check
from ..._io import new_directory
from ...errors import EngramError
from ...hf.fingerprints import note_edited
from ...hf.hub import HubFolder
from ...hf.placement import unwrapped
from ...hf.projection import output_projection
from ..health import Health
from ..writing.records import EditedModule, EditRecord, SkippedEdit, Write, joined_factors, joint_write
from ..writing.weights import Snapshot, matrix_checksum
from .adapter import save_adapter
from .compression import compressed
from .files import Content, load_edits, save_edits
from .history import Standing, note

SHOWN = 3


@dataclass(repr=False)
class EditResult(HubFolder):
    """Edits, made or loaded: a report, a low-rank adapter, and an exact undo.

    Used as a context manager it takes the edits back at the end of the block. Its length is their number.

    A saved folder is a LoRA adapter that PEFT loads, exact in float32: `adapter_config.json` and
    `adapter_model.safetensors`, with `B = left`, `A = right`, scale 1. `edit.json` and `edit.safetensors`
    hold what `from_pretrained` needs beside it.

    Attributes:
        records: one `EditRecord` an edit, in the order in which they were asked for.
        writes: the writes in the order in which they were done.
        edited_modules: the matrices that were written.
        skipped: the edits that were asked for and not made.
        health: how the model fared, a `Health` a batch; the last one of a run that `stop_on` ended is of the
            batch that was taken back.

    Example:
        >>> with editor.edit(Edit("The Eiffel Tower", "{} is located in the city of", "Rome")) as result:
        ...     print(result.records[0].probability_after)
        >>> # here the model is as it was, bit for bit
    """

    records: list[EditRecord]
    writes: list[Write]
    edited_modules: list[EditedModule]
    skipped: list[SkippedEdit] = field(default_factory=list)
    health: list[Health] = field(default_factory=list)
    _originals: dict[str, Snapshot] = field(default_factory=dict, compare=False)
    # What the model's history has of these edits, while they stand in it.
    _standing: list[Standing] = field(default_factory=list, compare=False)

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        counts = f"edits={len(self)}, skipped={len(self.skipped)}, applied={self.applied}"
        lines = [f"EditResult({counts}, modules={self.modules})"]
        for record in self.records[:SHOWN]:
            chances = f"{record.probability_before:.4f} → {record.probability_after:.4f}"
            took = "" if record.took else ", did not take"
            lines.append(f"  {record.edit.prompt_text} → {record.edit.target}: p {chances}{took}")
        more = len(self) - SHOWN
        return "\n".join([*lines, f"  and {more} more"] if more > 0 else lines)

    @property
    def modules(self) -> list[str]:
        """The names of the projections that were written."""
        return [edited.module for edited in self.edited_modules]

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """`left [out, n]` and `right [n, in]`, float32: `left @ right` is the sum of all changes of a module.

        Raises:
            ValueError: no edit wrote that module.
        """
        check.expect(module in self.modules, "module", f"one of {self.modules}", repr(module))
        return joined_factors(write for write in self.writes if write.module == module)

    @property
    def applied(self) -> bool:
        """Whether the edits are in a model now, and can be reverted by this result."""
        return bool(self._originals)

    def revert(self, force: bool = False) -> None:
        """Put the overwritten matrices back, bit for bit. Nothing happens where nothing is applied.

        Args:
            force: put them back even if one was changed since; what changed it is lost.

        Raises:
            EngramError: a matrix was changed since, by a later edit for instance, and `force` is False.
        """
        if not force:
            self._check_unchanged()
        self._restore()
        self._originals = {}
        self._standing.clear()

    def apply(self, model: torch.nn.Module, force: bool = False) -> EditResult:
        """Do the same writes on a model: on the weights they were made for, bit for bit.

        Args:
            model: with the layers these edits were made for.
            force: write even if its matrices are not the ones that these edits were made for.

        Returns:
            This result, which can be reverted then.

        Raises:
            EngramError: a matrix of the model is another one, or becomes another one than when the edits were
                made, or this result stands in a model already; the model is unchanged then.
        """
        if self.applied:
            raise EngramError(
                "model: expected one for a result that is not applied, got a result that is: revert it first"
            )
        model = unwrapped(model)
        projections = {}
        for edited in self.edited_modules:
            projection = output_projection(model, edited.layer)
            left, right = self.factors(edited.module)
            shape, expected = list(projection.matrix.shape), [left.shape[0], right.shape[1]]
            if projection.name != edited.module or shape != expected:
                raise EngramError(
                    f"model: expected a matrix {expected} in {edited.module!r}, "
                    f"got {shape} in {projection.name!r}"
                )
            if not force and matrix_checksum(projection) != edited.base_checksum:
                raise EngramError(
                    f"model: expected in {edited.module!r} the weights that the edit was made for, "
                    "got others (force=True edits them all the same)"
                )
            projections[edited.module] = projection
        self._originals = {name: Snapshot(projection) for name, projection in projections.items()}
        recorded = [edited.edited_checksum for edited in self.edited_modules]
        try:
            self._write()
            if not force:
                self._check_outcome(recorded)
                for edited in self.edited_modules:
                    note_edited(edited.base_checksum, edited.edited_checksum)
        except BaseException:
            self._restore()
            self._originals = {}
            for edited, checksum in zip(self.edited_modules, recorded, strict=True):
                edited.edited_checksum = checksum
            raise
        self._standing = note(model, self.records, self.writes)
        return self

    def remove(self, number: int) -> None:
        """Take one edit out of the others, as if it had never been made.

        The others of a joint write are written anew, from their keys and residuals: for one layer this is
        exact. Of edits that were written one after the other, its own write is left out; the later ones,
        which were found with it in place, stay. Over several layers each layer keeps what it was to add.

        Args:
            number: of the record, from 0.

        Raises:
            TypeError, ValueError: there is no such record, or it is the only one: revert that.
            EngramError: a matrix was changed since; nothing is removed then.
        """
        check.integer("number", number)
        check.expect(0 <= number < len(self), "number", f"from 0 to {len(self) - 1}", number)
        check.expect(len(self) > 1, "number", "one of several edits", "the only one: revert the result")
        self._check_unchanged()
        previous = self.writes
        try:
            kept = [write.without(number) for write in previous]
        except torch.linalg.LinAlgError as error:
            raise EngramError(
                f"number: expected edits that stand without {number}, got dependent ones"
            ) from error
        self.writes = [write for write in kept if write is not None]
        try:
            self._restore()
            self._write()
        except BaseException:
            self.writes = previous
            self._restore()
            self._write()
            raise
        del self.records[number]
        del self._standing[number : number + 1]
        # A matrix that only this edit wrote is as it was.
        written = {write.module for write in self.writes}
        self.edited_modules = [edited for edited in self.edited_modules if edited.module in written]
        self._originals = {name: own for name, own in self._originals.items() if name in written}
        if not self.applied:
            for edited in self.edited_modules:
                edited.edited_checksum = None

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

    @classmethod
    def merge(cls, results: Sequence[EditResult], force: bool = False) -> EditResult:
        """Several results as one, which does their writes one after the other, and is not applied.

        The values of each were found without the others, unless it was made on the model with those applied.

        Args:
            results: at least one, in the order of their writes.
            force: merge them even if they were made for different weights.

        Raises:
            TypeError: `results` holds something else.
            ValueError: it is empty.
            EngramError: one was made for other weights than the first one's, or than what one before it left;
                or, whatever `force` says, for a matrix of another shape.
        """
        results = list(results)
        check.expect(len(results) > 0, "results", "at least one", "none")
        for result in results:
            kind = type(result).__name__
            check.expect(isinstance(result, cls), "results", "EditResult objects", kind, TypeError)
        _check_same_weights(results, force)
        merged, asked = cls([], [], []), 0
        for result in results:
            first = len(merged)
            for write in result.writes:
                merged.writes.append(replace(write, edits=tuple(first + edit for edit in write.edits)))
            merged.skipped += [replace(item, number=item.number + asked) for item in result.skipped]
            merged.records += result.records
            merged.health += result.health
            asked += len(result.records) + len(result.skipped)
            for edited in result.edited_modules:
                if edited.module not in merged.modules:
                    merged.edited_modules.append(replace(edited, edited_checksum=None))
        return merged

    @classmethod
    def join(cls, results: Sequence[EditResult]) -> EditResult:
        """Several results as one joint write, which is not applied: as if their edits had been made at once.

        For jobs without a connection: each finds the values of its share of the edits in the same model with
        the same covariance, and saves its result. For one layer the joint write of all is exact, where
        `merge` adds what each wrote by itself. Over several layers the keys of the upper ones, and what
        remains to be written there, are those that each job saw with its own edits below.

        Args:
            results: at least one, with one write a matrix each, in the order of the edits.

        Raises:
            TypeError: `results` holds something else.
            ValueError: it is empty.
            EngramError: the results were made for other weights, for other matrices or with another ridge,
                wrote a matrix more than once, or have dependent keys.

        Example:
            >>> shares = [EditResult.from_pretrained(f"share-{number}") for number in range(8)]
            >>> EditResult.join(shares).apply(model)
        """
        results = list(results)
        merged = cls.merge(results)
        if any(write.ridge is None for write in merged.writes):
            raise EngramError("results: expected joint writes, got some whose rows stand alone: merge them")
        modules = {edited.module: edited.base_checksum for edited in results[0].edited_modules}
        for number, result in enumerate(results):
            bases = {edited.module: edited.base_checksum for edited in result.edited_modules}
            if bases != modules:
                raise EngramError(
                    f"results: expected edits of the same matrices, made for the same weights, got others in "
                    f"number {number}"
                )
            if len(result.writes) > len(modules):
                raise EngramError(
                    f"results: expected one write a matrix, got {len(result.writes)} of {len(modules)} in "
                    f"number {number}: batches that were found one on top of the other"
                )
        ridges = {write.ridge for write in merged.writes}
        if len(ridges) > 1:
            raise EngramError(f"results: expected one ridge, got {', '.join(f'{one:g}' for one in ridges)}")
        try:
            merged.writes = [
                joint_write([write for write in merged.writes if write.module == module])
                for module in modules
            ]
        except torch.linalg.LinAlgError as error:
            raise EngramError("results: expected independent keys, or a ridge, got dependent ones") from error
        return merged

    def save_adapter(self, directory: str | os.PathLike, rank: int | None = None) -> dict[str, float]:
        """Write the changes alone as a LoRA adapter that PEFT loads, of a smaller rank if one is asked for.

        An adapter's rank is the number of edits, or of their tokens, and servers take some hundred at most.

        Args:
            directory: a new or empty one.
            rank: at most that many a matrix, those that change the answers to the edits' keys most; None:
                all.

        Returns:
            By module, which share of what the answers change by is lost, as Frobenius norms.

        Raises:
            TypeError, ValueError: `rank` is no positive integer.
            EngramError: the directory is not empty or cannot be written.

        Example:
            >>> lost = result.save_adapter("facts-64", rank=64)
        """
        if rank is not None:
            check.integer("rank", rank, at_least=1)
        factors, lost = {}, {}
        for module in self.modules:
            left, right = self.factors(module)
            keys = torch.cat([write.keys for write in self.writes if write.module == module])
            narrow = (left, right, 0.0) if rank is None else compressed(left, right, rank, keys)
            factors[module], lost[module] = narrow[:2], narrow[2]
        with new_directory(directory) as folder:
            save_adapter(folder, self.edited_modules, factors)
        return lost

    def _save_pretrained(self, save_directory: Path) -> None:
        save_edits(
            save_directory,
            Content(self.records, self.writes, self.edited_modules, self.skipped, self.health),
        )

    @classmethod
    def _read_folder(cls, folder: Path) -> EditResult:
        return cls(*load_edits(folder))

    def _restore(self) -> None:
        """Put the matrices back as they were before the first write."""
        for original in self._originals.values():
            original.restore()

    def _write(self) -> None:
        """Do all writes on the matrices of the model they are applied to, and note what they give."""
        if not self.applied:
            return
        for write in self.writes:
            write.apply_(self._originals[write.module].projection)
        for edited in self.edited_modules:
            # A forced base, or another device's arithmetic, leaves another matrix: revert must know that one.
            edited.edited_checksum = matrix_checksum(self._originals[edited.module].projection)

    def _check_outcome(self, recorded: Sequence[str | None]) -> None:
        """Make sure that the matrices became what is recorded of them, where something is."""
        for edited, checksum in zip(self.edited_modules, recorded, strict=True):
            if checksum is not None and edited.edited_checksum != checksum:
                raise EngramError(
                    f"model: expected {edited.module!r} to become what it became when the edits were made, "
                    "got other bits: of changed factors, or of another device (force=True takes them)"
                )

    def _check_unchanged(self) -> None:
        if not self.applied:
            return
        for edited in self.edited_modules:
            if matrix_checksum(self._originals[edited.module].projection) != edited.edited_checksum:
                raise EngramError(
                    f"model: expected {edited.module!r} as this edit left it, got it changed since: "
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
        for edited in result.edited_modules:
            seen = known.setdefault(edited.module, {edited.base_checksum})
            if edited.base_checksum not in seen and not force:
                raise EngramError(
                    "results: expected edits made for the same weights, or one on top of the other, got "
                    f"number {number} made for others in {edited.module!r} "
                    "(force=True merges them all the same)"
                )
            seen.add(edited.edited_checksum)
