"""Save a causal language model and its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .._io import let_all_read, write_directory
from ..errors import EngramError
from .loading import import_transformers, without_progress_bars
from .placement import is_sharded, unwrapped


def save_model(model: nn.Module, tokenizer, directory: str | os.PathLike) -> None:
    """Write a model and its tokenizer into a new directory, as transformers does: all of it or nothing.

    Of the ranks of a run that name the directory, one writes it, and all wait. A model whose weights are
    divided among ranks is gathered by rank 0: all of them make this call.

    Args:
        model: a model of transformers with its weights in memory.
        tokenizer: its tokenizer.
        directory: a new or empty one.

    Raises:
        EngramError: the model wears an adapter, its generation_config is one that transformers does not save,
            or the directory is not empty or cannot be written.

    Example:
        >>> save_model(model, tokenizer, "smollm2-in-rome")
    """
    model = unwrapped(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise EngramError(
            "model: expected one without an adapter, got one with a LoRA, of which transformers would save "
            "the LoRA alone: merge it into its base first"
        )
    state = _gathered(model) if any(map(is_sharded, model.parameters())) else None

    def write(folder: Path) -> None:
        with without_progress_bars(import_transformers()), _alone(model):
            _save(model, folder, state)
            tokenizer.save_pretrained(folder)
            let_all_read(folder)

    write_directory(directory, write, rank=None if state is None else 0)


def _save(model: nn.Module, folder: Path, state: dict[str, Tensor] | None) -> None:
    try:
        model.save_pretrained(folder, state_dict=state)
    except ValueError as error:
        if not str(error).startswith("GenerationConfig is invalid"):
            raise
        reason = " ".join(str(error).split("\n")[1:2]).removeprefix("- ")
        raise EngramError(
            f"model: expected a generation_config that transformers saves, got an invalid one: {reason}"
        ) from error


def _gathered(model: nn.Module) -> dict[str, Tensor]:
    """The whole tensors of a divided model in main memory on rank 0; nothing on the others."""
    keep, state = torch.distributed.get_rank() == 0, {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if is_sharded(tensor) else tensor
        if keep:
            state[name] = whole.cpu()
    return state


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Let transformers save on this rank: by itself it writes on rank 0, and has all ranks wait for that."""
    settings, own = model.config.__dict__, model.__dict__
    divided = settings.pop("distributed_config", None)
    own["should_save_on_this_rank"] = lambda *_: True
    try:
        yield
    finally:
        del own["should_save_on_this_rank"]
        if divided is not None:
            settings["distributed_config"] = divided
