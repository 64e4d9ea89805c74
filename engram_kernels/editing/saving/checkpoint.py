"""Saved edits written into a checkpoint's files, without loading the model."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ... import _checks as check
from ..._hashing import tensor_checksum
from ...errors import EngramError
from ...hf.shards import Checkpoint, OtherLayoutError, checkpoint_folder
from ...ops import apply_low_rank_
from ...ops.waiting import raises_at_once
from ..writing.records import EditedModule
from .result import EditResult


def edit_checkpoint(
    edits: EditResult,
    model: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    force: bool = False,
    link: bool = False,
) -> None:
    """Write edits into a copy of a checkpoint: the bits that `edits.apply` and `save_model` give.

    Only the edited matrices are in memory, one at a time; shards, their index and all other tensors stay as
    they are. All checksums are compared before anything is written.

    Args:
        edits: made or loaded.
        model: a folder or a name on the Hub, of safetensors in the dtype that the edits were made in.
        directory: a new or empty one.
        force: write even if the matrices are not the ones that the edits were made for.
        link: shards that no edit touches become hard links to the model's own, instead of copies.

    Raises:
        TypeError: `edits` is something else.
        OtherLayoutError: the files hold other tensors than the model in memory, as those of a mixture of
            experts, of another dtype or quantised ones do: load it, and use `edits.apply`.
        EngramError: a matrix is another one, or becomes another one than when the edits were made, or the
            directory is not empty or cannot be written. Nothing is left in its place then.

    Example:
        >>> edit_checkpoint(EditResult.from_pretrained("tower-in-rome"), "Qwen/Qwen3-0.6B", "qwen3-in-rome")
    """
    check.expect(isinstance(edits, EditResult), "edits", "an EditResult", type(edits).__name__, TypeError)
    mixed = [edited.module for edited in edits.edited_modules if edited.experts is not None]
    if mixed:
        raise OtherLayoutError(f"model: expected matrices by themselves, got an expert's, {mixed[0]!r}")
    checkpoint = Checkpoint(checkpoint_folder(model))
    modules = {f"{edited.module}.weight": edited for edited in edits.edited_modules}
    shapes = {}
    for name, edited in modules.items():
        left, right = edits.factors(edited.module)
        shape = (left.shape[0], right.shape[1])
        shapes[name] = shape[::-1] if edited.transposed else shape
    checkpoint.expect(shapes, getattr(torch, edits.edited_modules[0].dtype))
    if not force:
        for name, checksum in checkpoint.checksums(list(modules)).items():
            if checksum != modules[name].base_checksum:
                raise EngramError(
                    f"model: expected in {modules[name].module!r} the weights that the edit was made for, "
                    "got others (force=True edits them all the same)"
                )
    changes = {name: _writer(edits, edited, force) for name, edited in modules.items()}
    checkpoint.rewrite(directory, changes, link)


def _writer(edits: EditResult, edited: EditedModule, force: bool) -> Callable[[Tensor], None]:
    @raises_at_once
    def write(weight: Tensor) -> None:
        matrix = weight.T if edited.transposed else weight
        for one in edits.writes:
            if one.module == edited.module:
                apply_low_rank_(matrix, one.left, one.right)
        if not force and edited.edited_checksum not in (None, tensor_checksum(weight)):
            raise EngramError(
                f"model: expected {edited.module!r} to become what it became when the edits were made, "
                "got other bits: of changed factors, or of another device (force=True takes them)"
            )

    return write
