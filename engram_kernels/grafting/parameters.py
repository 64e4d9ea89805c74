"""Which parameters of a model can carry a graft, and where they lie."""

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor, nn

from .. import _checks as check
from .._io import read_json
from ..errors import EngramError
from ..hf.layers import MODEL_DTYPES, decoder_layers
from ..hf.placement import inner_names, is_sharded, plain_name, unwrapped
from ..hf.projection import is_plain
from ..hf.shards import SINGLE, index_of


def graftable_parameters(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """The parameters that a graft may change, by name, each once.

    Args:
        model: any model whose layers lie in an `nn.ModuleList`.
        include: glob patterns of parameter names, such as `"*.mlp.*"`. Default: every parameter of the
            largest stack of layers (of an encoder and a decoder, one of them); no embeddings, no final norm,
            no head.
        exclude: glob patterns of names to leave out of these.

    Returns:
        The model's own parameters by name, in its order.

    Raises:
        TypeError: `model` is none.
        ValueError: a pattern matches nothing.
        EngramError: a parameter cannot be grafted soundly: quantised, on the meta device or on another one
            than the rest, made in inference mode, or sharing its memory with another one.
    """
    check.expect(isinstance(model, nn.Module), "model", "a module", type(model).__name__, TypeError)
    model = unwrapped(model)
    named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    if include is None:
        stack = plain_name(decoder_layers(model)[0])
        chosen = {name for name in named if name.startswith(f"{stack}.")}
    else:
        patterns = _patterns("include", include)
        if not patterns:
            raise ValueError("include: expected at least one pattern, got none")
        chosen = set().union(*(_matches("include", pattern, named) for pattern in patterns))
    for pattern in _patterns("exclude", exclude):
        chosen -= _matches("exclude", pattern, named)
    parameters = {name: parameter for name, parameter in named.items() if name in chosen}
    if not parameters:
        raise ValueError("exclude: expected patterns that leave a parameter to graft, got none left")
    device = next(iter(parameters.values())).device
    for name, parameter in parameters.items():
        if is_sharded(parameter):
            raise EngramError(
                f"model: expected whole weights, got a part of {name!r} of several ranks: search on a model "
                "that is whole, and apply the graft to any"
            )
        if parameter.is_meta:
            raise EngramError(f"model: expected its weights in memory, got {name!r} on the meta device")
        if parameter.is_inference():
            raise EngramError(f"model: expected weights made outside inference mode, got {name!r}")
        if parameter.dtype not in MODEL_DTYPES:
            raise EngramError(
                f"model: expected float32, bfloat16 or float16, got {parameter.dtype} in {name!r}"
            )
        if not is_plain(parameter):
            raise EngramError(f"model: expected plain weights, got {type(parameter).__name__} in {name!r}")
        if parameter.device != device:
            raise EngramError(
                f"model: expected its layers on one device, got {device} and {parameter.device}"
            )
    # By memory, not by object: one parameter may be a view of another's.
    spans = sorted(
        (*check.span(parameter), name)
        for name, parameter in named.items()
        if parameter.numel() and not parameter.is_meta
    )
    reach, furthest = 0, ""
    for start, end, name in spans:
        if start < reach and not chosen.isdisjoint((furthest, name)):
            raise EngramError(f"model: expected a weight of its own in {name!r}, got that of {furthest!r}")
        if end > reach:
            reach, furthest = end, name
    return parameters


def _patterns(argument: str, patterns: Sequence[str]) -> Sequence[str]:
    if isinstance(patterns, str):
        raise TypeError(f"{argument}: expected a list of patterns, got the string {patterns!r}")
    return patterns


def _matches(argument: str, pattern: str, named: Mapping[str, object]) -> set[str]:
    found = {name for name in named if fnmatchcase(name, pattern)}
    if not found:
        raise ValueError(f"{argument}: expected a pattern that matches a parameter, got {pattern!r}")
    return found


def base_of(model: nn.Module, name: str | None = None) -> dict[str, str | None]:
    """What a graft says of its base: the name, by default the configuration's, and the commit on the Hub."""
    config = getattr(model, "config", None)
    known: str | None = getattr(config, "_name_or_path", None)
    if known and Path(known).is_dir():
        known = Path(known).name  # where a folder lies is nobody else's business
    return {"base_model": name or known or None, "base_revision": getattr(config, "_commit_hash", None)}


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters, by every name that a graft may have for them."""
    parameters = unwrapped(model).named_parameters(remove_duplicate=False)
    named = {plain_name(name): parameter for name, parameter in parameters}
    # An adapter moves the weight `x.weight` that it adapts to `x.base_layer.weight`: it is the same one.
    return named | {name.replace(".base_layer.", "."): weight for name, weight in named.items()}


def tensors_of(source: object, names: Sequence[str], argument: str) -> dict[str, Tensor]:
    """The tensors of those names in a model, a mapping, or a safetensors file or folder (mapped, not read).

    Raises:
        TypeError: `source` is none of these.
        EngramError: a tensor is missing, or a file cannot be read.
    """
    if isinstance(source, nn.Module):
        # A state dict has buffers too, such as the biases of a router.
        buffers = unwrapped(source).named_buffers(remove_duplicate=False)
        found: Mapping[str, Tensor] = {plain_name(name): buffer for name, buffer in buffers}
        found |= named_weights(source)
    elif isinstance(source, Mapping):
        found = by_inner_name(source)
    elif isinstance(source, (str, os.PathLike)):
        found = mapped_tensors(Path(source), names, argument)
    else:
        raise TypeError(f"{argument}: expected a model, a mapping or a path, got {type(source).__name__}")
    missing = [name for name in names if name not in found]
    if missing:
        raise EngramError(f"{argument}: expected a tensor {missing[0]!r}, got none of that name")
    return {name: found[name].detach() for name in names}


def by_inner_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict, also by the names that they have in the model without wrappers."""
    return {inner: tensors[name] for inner, name in inner_names(tensors).items()}


def mapped_tensors(path: Path, names: Sequence[str], argument: str) -> dict[str, Tensor]:
    """Those of the names that a safetensors file has, or a folder's shards; pages are read when used.

    Of a folder's files those that transformers would load: `model.safetensors`, else the shards of the index,
    else all that there are.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if path.is_file():
            shards = [path]
        elif (path / SINGLE).is_file():
            shards = [path / SINGLE]
        elif index := index_of(path):
            listed: dict[str, str] = read_json(index)["weight_map"]  # type: ignore[index]
            keys = inner_names(listed)
            shards = [path / name for name in sorted({listed[keys[name]] for name in names if name in keys})]
        else:
            shards = sorted(path.glob("*.safetensors"))
        if not shards:
            raise OSError("no safetensors file")
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                held = inner_names(file.keys())
                if twice := [name for name in names if name in held and name in tensors]:
                    raise OSError(f"{twice[0]!r} in several files, one of them {shard.name}: name the file")
                tensors |= {name: file.get_tensor(held[name]) for name in names if name in held}
        return tensors
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise EngramError(
            f"{argument}: expected safetensors at {str(path)!r}, got none that can be read ({error})"
        ) from error
