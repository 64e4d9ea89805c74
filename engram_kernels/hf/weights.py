"""Weights of a saved model under the names that a model in memory has, by transformers' own conversion."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import EngramError
from .loading import gguf_file, import_transformers, without_progress_bars


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of each name the first one that its tensor has."""
    seen: dict[tuple, str] = {}
    firsts = {}
    for name, tensor in tensors.items():
        place = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()
        # What has no memory shares none.
        firsts[name] = seen.setdefault(place, name) if tensor.data_ptr() else name
    return firsts


def untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by name; of those that are one tensor under several names, the first."""
    return {name: tensors[name] for name, first in first_names(tensors).items() if name == first}


def read_as(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The parameters of a saved model of the same class, in memory and in the model's dtype.

    What a checkpoint calls otherwise (experts one by one, names without the class's prefix, GGUF) is
    converted as `from_pretrained` converts it. Takes the memory of a second model.

    Args:
        model: of transformers; its class and its configuration say what the weights become.
        path: a folder that `save_pretrained` wrote, or a GGUF file or a folder with one.

    Raises:
        EngramError: the model is not of transformers', or the path cannot be read as one of its class.
    """
    transformers = import_transformers()
    from safetensors import SafetensorError

    if not isinstance(model, transformers.PreTrainedModel):
        raise EngramError("a model of another library, whose names nothing here converts")
    gguf = gguf_file(path)
    folder, options = (gguf.parent, {"gguf_file": gguf.name}) if gguf else (path, {})
    dtype = next(model.parameters()).dtype
    try:
        with without_progress_bars(transformers):
            read, found = type(model).from_pretrained(
                folder, config=copy.deepcopy(model.config), dtype=dtype, output_loading_info=True, **options
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise EngramError(reason) from error
    missing = set(found["missing_keys"])
    return {
        name: weight.detach()
        for name, weight in read.named_parameters(remove_duplicate=False)
        if name not in missing and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
