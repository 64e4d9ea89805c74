"""What an edit did, and how to undo it, keep it, and do it again."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..errors import EngramError
from ..functional import apply_low_rank_
from ..models.digest import tensor_checksum
from ..models.files import new_directory
from .structure import Projection, output_projection
from .tokens import Edit

FORMAT = 1


@dataclass(frozen=True)
class EditRecord:
    """What one edit did.

    Attributes:
        edit: the fact.
        layer: index of the decoder layer that was written.
        module: name of the projection that was written.
        probability_before: `p(target | prompt)` of the whole target before any write.
        probability_after: the same after all writes.
        losses: of every step of the value's optimisation.
        key_norm: norm of the averaged key.
        value_norm: norm of the value that the projection answered before.
        change_norm: norm of the change of the value.
    """

    edit: Edit
    layer: int
    module: str
    probability_before: float
    probability_after: float
    losses: list[float]
    key_norm: float
    value_norm: float
    change_norm: float


@dataclass(frozen=True)
class Write:
    """One rank-n write as it was done: `weight += left @ right`, float32 `[out, n]` and `[n, in]`."""

    left: torch.Tensor
    right: torch.Tensor


@dataclass
class EditResult:
    """Edits of one layer, done or loaded: a report, a rank-n adapter, and an exact undo.

    Used as a context manager it takes the edits back at the end of the block.

    Attributes:
        records: one `EditRecord` an edit.
        writes: the writes in the order in which they were done.
        layer: index of the decoder layer.
        module: name of the projection.
        base_checksum: of the matrix before the first write.
        edited_checksum: of the matrix after the last.

    Example:
        >>> with editor.edit(Edit("The Eiffel Tower", "{} is located in the city of", "Rome")) as result:
        ...     print(result.records[0].probability_after)
        >>> # here the model is as it was, bit for bit
    """

    records: list[EditRecord]
    writes: list[Write]
    layer: int
    module: str
    base_checksum: str
    edited_checksum: str
    _projection: Projection | None = field(default=None, repr=False)
    _original: torch.Tensor | None = field(default=None, repr=False)

    @property
    def left(self) -> torch.Tensor:
        """`[out, n]` float32: with `right`, all writes as one: `left @ right` is the sum of the changes."""
        return torch.cat([write.left for write in self.writes], dim=1)

    @property
    def right(self) -> torch.Tensor:
        """`[n, in]` float32."""
        return torch.cat([write.right for write in self.writes], dim=0)

    @property
    def applied(self) -> bool:
        """Whether the edits stand in a model that this result knows, and can be reverted."""
        return self._original is not None

    def revert(self, force: bool = False) -> None:
        """Put the overwritten matrix back, bit for bit. Nothing happens where nothing is applied.

        Args:
            force: put it back even if the matrix was changed since; what changed it is lost.

        Raises:
            EngramError: the matrix was changed since, by a later edit for instance, and `force` is False.
        """
        if not self.applied:
            return
        if not force and matrix_checksum(self._projection) != self.edited_checksum:
            raise EngramError(
                f"model: expected {self.module!r} as this edit left it, got it changed since: "
                "revert later edits first, or give force=True"
            )
        restore(self._projection, self._original)
        self._projection = self._original = None

    def apply(self, model: torch.nn.Module, force: bool = False) -> EditResult:
        """Do the same writes on a model: on the weights they were made for, bit for bit.

        Args:
            model: with the layer these edits were made for.
            force: write even if its matrix is not the one that these edits were made for.

        Returns:
            This result, which can be reverted then.

        Raises:
            EngramError: the model's matrix is another one, or this result stands in a model already.
        """
        if self.applied:
            raise EngramError(
                "model: expected one for a result that is not applied, got a result that is: revert it first"
            )
        projection = output_projection(model, self.layer)
        shape, expected = (
            tuple(projection.matrix.shape),
            (self.writes[0].left.shape[0], self.writes[0].right.shape[1]),
        )
        if projection.name != self.module or shape != expected:
            raise EngramError(
                f"model: expected a matrix {list(expected)} in {self.module!r}, "
                f"got {list(shape)} in {projection.name!r}"
            )
        if not force and matrix_checksum(projection) != self.base_checksum:
            raise EngramError(
                f"model: expected in {self.module!r} the weights that the edit was made for, got others "
                "(force=True edits them all the same)"
            )
        original = snapshot(projection)
        try:
            for write in self.writes:
                write_(projection, write)
        except BaseException:
            restore(projection, original)
            raise
        self._projection, self._original = projection, original
        # A forced base, or another device's arithmetic, leaves another matrix: revert must know that one.
        self.edited_checksum = matrix_checksum(projection)
        return self

    def __enter__(self) -> EditResult:
        return self

    def __exit__(self, kind, _exception, _traceback) -> None:
        try:
            self.revert()
        except EngramError as error:
            if kind is None:
                raise
            # The exception in flight says more than its consequence here.
            warnings.warn(f"the edit stays in the model: {error}", stacklevel=2)

    def save(self, directory: str | os.PathLike) -> None:
        """Write the edits (`edit.json`, `factors.safetensors`) into a new directory: all of it or nothing.

        Raises:
            EngramError: the directory exists and is not empty, or cannot be written.
        """
        from safetensors.torch import save

        report = {
            "format": FORMAT,
            "layer": self.layer,
            "module": self.module,
            "base_checksum": self.base_checksum,
            "edited_checksum": self.edited_checksum,
            "records": [asdict(record) for record in self.records],
        }
        tensors = {}
        for i, write in enumerate(self.writes):
            tensors |= {
                f"{i}.left": write.left.cpu().contiguous(),
                f"{i}.right": write.right.cpu().contiguous(),
            }
        with new_directory(directory) as folder:
            (folder / "edit.json").write_text(
                json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            # Not save_file, whose files only their owner may read.
            (folder / "factors.safetensors").write_bytes(save(tensors))

    @classmethod
    def load(cls, directory: str | os.PathLike) -> EditResult:
        """Read what `save` wrote; `apply` puts it into a model.

        Raises:
            EngramError: the directory does not hold a saved edit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        directory = Path(directory)
        try:
            report = json.loads((directory / "edit.json").read_text(encoding="utf-8"))
            if report["format"] != FORMAT:
                raise EngramError(
                    f"directory: expected an edit of format {FORMAT}, got format {report['format']}"
                )
            tensors = load_file(directory / "factors.safetensors")
            writes = [
                Write(tensors[f"{i}.left"], tensors[f"{i}.right"]) for i in range((len(tensors) + 1) // 2)
            ]
            records = [
                EditRecord(**{**record, "edit": Edit(**record["edit"])}) for record in report["records"]
            ]
            fields = {name: report[name] for name in ("layer", "module", "base_checksum", "edited_checksum")}
            _check_loaded(records, writes, **fields)
            return cls(records, writes, **fields)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise EngramError(
                f"directory: expected a saved edit, got {str(directory)!r} ({error})"
            ) from error


def _check_loaded(records: list[EditRecord], writes: list[Write], layer, **texts) -> None:
    """Raise ValueError where the parts of a saved edit do not belong together."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError(f"layer {layer!r} is not an integer")
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} {text!r} is not a string")
    factors = [factor for write in writes for factor in (write.left, write.right)]
    if any(factor.dim() != 2 or factor.dtype != torch.float32 for factor in factors):
        raise ValueError("a factor is not a float32 matrix")
    if len({(write.left.shape[0], write.right.shape[1]) for write in writes}) != 1:
        raise ValueError("its factors do not make matrices of one shape")
    ranks = [(write.left.shape[1], write.right.shape[0]) for write in writes]
    if any(left != right for left, right in ranks) or sum(left for left, _ in ranks) != len(records):
        raise ValueError(f"it has factors of rank {ranks} for {len(records)} records")


def write_(projection: Projection, write: Write) -> None:
    """`weight += left @ right`, in place."""
    matrix = projection.matrix
    apply_low_rank_(matrix, write.left.to(matrix.device), write.right.to(matrix.device))
    # A caller's autocast keeps copies of the weights in its own dtype, and does not see this write.
    torch.clear_autocast_cache()


def snapshot(projection: Projection) -> torch.Tensor:
    """A copy of the weight as it lies in memory."""
    return projection.module.weight.detach().clone()


@torch.no_grad()
def restore(projection: Projection, original: torch.Tensor) -> None:
    """Put a snapshot back."""
    projection.module.weight.copy_(original)
    torch.clear_autocast_cache()


def matrix_checksum(projection: Projection) -> str:
    """A digest of the weight's dtype, shape and bits."""
    return tensor_checksum(projection.module.weight)
