"""Save a causal language model and its tokenizer."""

from __future__ import annotations

import os

from torch import nn

from .._io import let_all_read, new_directory
from ..errors import EngramError
from .loading import import_transformers, without_progress_bars


def save_model(model: nn.Module, tokenizer, directory: str | os.PathLike) -> None:
    """Write a model and its tokenizer into a new directory, as transformers does: all of it or nothing.

    Args:
        model: a model of transformers with its weights in memory.
        tokenizer: its tokenizer.
        directory: a new or empty one.

    Raises:
        EngramError: the model wears an adapter, or the directory is not empty or cannot be written.

    Example:
        >>> save_model(model, tokenizer, "smollm2-in-rome")
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise EngramError(
            "model: expected one without an adapter, got one with a LoRA, of which transformers would save "
            "the LoRA alone: merge it into its base first"
        )
    with new_directory(directory) as folder, without_progress_bars(import_transformers()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        let_all_read(folder)
