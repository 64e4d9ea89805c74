"""Digests of a model's weights: each tensor once, several at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .._hashing import plain_tensors, tensor_checksum
from .layers import adapter_settings, decoder_layers
from .placement import is_sharded, local, named_tensors, plain_name, stored, unwrapped
from .projection import Projection

# Where a model came from and what it returns beside its states say nothing about the states.
IRRELEVANT = frozenset({
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "distributed_config",
    "id2label", "label2id", "num_labels", "problem_type", "return_dict", "output_attentions",
    "output_hidden_states", "use_cache", "tie_word_embeddings",
})  # fmt: skip

# By parameter or buffer: its state when it was read, and its checksums.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
# By the checksum of a matrix that edits wrote in this process: of what it was before the first of them.
_unedited: dict[str, str] = {}


def note_edited(before: str, after: str) -> None:
    """Remember that edits made the matrix of one checksum into that of another."""
    _unedited[after] = _unedited.get(before, before)


def weights_checksums(model: nn.Module) -> dict[str, str]:
    """The checksum of every tensor of a model, by name; all are read."""
    return dict(part for parts in _checksums(model, named_tensors(model)).values() for part in parts)


def states_fingerprint(model: nn.Module, projection: Projection, unedited: bool = False) -> str:
    """A digest of the configuration and of every tensor on which a projection's inputs depend.

    It outlives edits of that projection, of the layers above it and of the head; `unedited`: also those of
    the layers below, whose matrices count as what they were before (`note_edited`). A tensor that was read
    before is not read again until it is replaced or written; only writes through `.data` go unseen.
    """
    model = unwrapped(model)
    feeding = _feeding(model, projection)
    states = {name: _state(tensor) for name, tensor in feeding.items()}
    missing = [name for name, tensor in feeding.items() if _known.get(tensor, ((),))[0] != states[name]]
    for name, parts in _checksums(model, {name: feeding[name] for name in missing}).items():
        _known[feeding[name]] = states[name], parts
    digest = hashlib.sha256(
        json.dumps(_relevant(model.config.to_dict()), sort_keys=True, default=str).encode()
    )
    for adapter in adapter_settings(model):
        digest.update(repr(adapter).encode())
    for tensor in feeding.values():
        for part, checksum in _known[tensor][1]:
            checksum = _unedited.get(checksum, checksum) if unedited else checksum
            digest.update(f"{part} {checksum}".encode())
    return digest.hexdigest()


def _feeding(model: nn.Module, projection: Projection) -> dict[str, Tensor]:
    """The tensors on which the projection's inputs depend: not its own, nor those of what lies above."""
    stack, layers = decoder_layers(model)
    above = [f"{stack}.{i}" for i in range(projection.layer + 1, len(layers))]
    head = model.get_output_embeddings()
    if head is not None and head is not model.get_input_embeddings():
        above += [name for name, module in model.named_modules() if module is head]
    skipped = tuple(f"{plain_name(path)}." for path in (*above, projection.path))
    return {name: tensor for name, tensor in named_tensors(model).items() if not name.startswith(skipped)}


def _relevant(settings: Mapping) -> dict:
    """The settings on which states may depend, also of the configurations within."""
    return {
        name: _relevant(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in IRRELEVANT
    }


def _state(tensor: Tensor) -> tuple:
    """A value that changes when a tensor is replaced or written; inference tensors count no writes."""
    return tuple(
        (part, inner.data_ptr(), object() if inner.is_inference() else inner._version)
        for part, inner in plain_tensors("", local(tensor))
    )


def _checksums(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, list[tuple[str, str]]]:
    """By name, the names and checksums of the plain tensors that each is made of."""

    def of(name: str) -> list[tuple[str, str]]:
        whole = stored(model, name, tensors[name])
        return [(part, tensor_checksum(inner)) for part, inner in plain_tensors(name, whole)]

    # What is divided is gathered in one order on every rank.
    found = {name: of(name) for name, tensor in tensors.items() if is_sharded(tensor)}
    others = [name for name in tensors if name not in found]
    # Digests leave the interpreter to others; each thread holds one tensor that is offloaded.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found |= zip(others, pool.map(of, others), strict=True)
    return found
