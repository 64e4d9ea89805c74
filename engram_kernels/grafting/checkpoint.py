"""A graft written into a checkpoint's files, without loading the model."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _checks as check
from ..errors import EngramError
from ..hf.shards import Checkpoint, checkpoint_folder
from .graft import Graft


def graft_checkpoint(
    graft: Graft,
    model: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    force: bool = False,
    link: bool = False,
) -> None:
    """Write a graft into a copy of a checkpoint: the bits that `graft.apply` and `save_model` give.

    One tensor is in memory at a time; shards and their index stay as they are. All checksums are compared
    before anything is written.

    Args:
        graft: made or loaded.
        model: a folder or a name on the Hub, of safetensors in the graft's dtype.
        directory: a new or empty one.
        force: write even if the model's weights are others.
        link: shards that the graft does not touch become hard links to the model's own, instead of copies.

    Raises:
        TypeError: `graft` is something else.
        OtherLayoutError: the files hold other tensors than the model in memory: load it, and use
            `graft.apply`.
        EngramError: the model's weights are others, or the directory is not empty or cannot be written.
            Nothing is left in its place then.

    Example:
        >>> graft_checkpoint(Graft.from_pretrained("my-skill"), "Qwen/Qwen3-0.6B", "qwen3-with-skill")
    """
    check.expect(isinstance(graft, Graft), "graft", "a Graft", type(graft).__name__, TypeError)
    checkpoint = Checkpoint(checkpoint_folder(model))
    names = graft.indices if force else graft.shapes
    dtype = next((values.dtype for values in graft.values.values()), torch.float32)
    checkpoint.expect({name: graft.shapes[name] for name in names}, dtype)
    if not force:
        for name, checksum in checkpoint.checksums(list(names)).items():
            if checksum != graft.checksums[name]:
                raise EngramError(
                    f"model: expected in {name!r} the weights that the graft was made for, got others "
                    "(force=True grafts them all the same)"
                )
    checkpoint.rewrite(directory, {name: _writer(graft, name) for name in graft.indices}, link)


def _writer(graft: Graft, name: str) -> Callable[[Tensor], None]:
    def write(weight: Tensor) -> None:
        weight.view(-1)[graft.indices[name].long()] = graft.values[name].to(weight.dtype)

    return write
