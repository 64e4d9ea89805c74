"""The fine-tuned weights, wherever they lie: in a model, with adapters or without, in tensors, in files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import EngramError
from ..hf.adapters import holds_an_adapter, merged_weights, with_adapter
from ..hf.loading import gguf_file
from ..hf.placement import is_sharded, plain_name, unwrapped
from ..hf.projection import is_plain
from ..hf.weights import read_as
from .parameters import by_inner_name, mapped_tensors

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike

_READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tuned_tensors(
    source: Source, model: nn.Module, names: Sequence[str], argument: str, others: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The tensors of those names in a fine-tuned model, with its adapters merged.

    Args:
        source: a model (PEFT's and transformers' adapters are merged layer by layer, into copies), a mapping
            of tensors, a safetensors file or folder (mapped, not read), an adapter's folder, a checkpoint
            whose names or experts are laid out otherwise, or a GGUF file (read as transformers reads them).
        model: the base; what is read from files comes in its dtypes.
        names: of its parameters.
        argument: what the caller calls the source.
        others: names that are read too where they are there.

    Raises:
        TypeError: `source` is none of these.
        EngramError: a tensor is missing, or a file cannot be read.
    """
    found = _found(source, model, names, others, argument)
    missing = [name for name in names if name not in found]
    if missing:
        raise EngramError(f"{argument}: expected a tensor {missing[0]!r}, got none of that name")
    wanted = [*names, *(name for name in others if name in found)]
    if not isinstance(source, (str, os.PathLike)):
        for name in wanted:
            if not (is_plain(found[name]) or is_sharded(found[name])):
                kind = f"{type(found[name]).__name__} of {found[name].dtype}"
                raise EngramError(f"{argument}: expected plain weights, got {kind} in {name!r}")
        return {name: found[name].detach() for name in wanted}
    own = dict(model.named_parameters(remove_duplicate=False))
    for name in wanted:
        if found[name].dtype not in _READABLE:
            raise EngramError(f"{argument}: expected plain weights, got {found[name].dtype} in {name!r}")
    return {name: found[name].to(own[name].dtype) if name in own else found[name] for name in wanted}


def _found(
    source: Source, model: nn.Module, names: Sequence[str], others: Sequence[str], argument: str
) -> Mapping[str, Tensor]:
    if isinstance(source, nn.Module):
        return {plain_name(name): weight for name, weight in merged_weights(unwrapped(source))}
    if isinstance(source, Mapping):
        return by_inner_name(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"{argument}: expected a model, a mapping or a path, got {type(source).__name__}")
    path = Path(source)
    saved = (path / "config.json").is_file()
    try:
        if holds_an_adapter(path):
            return dict(merged_weights(with_adapter(model, path)))
        if gguf_file(path) or (saved and not any(path.glob("*.safetensors"))):
            return read_as(model, path)
    except EngramError as error:
        raise EngramError(f"{argument}: expected weights at {str(path)!r}, got {error}") from error
    found = mapped_tensors(path, [*names, *others], argument)
    if all(name in found for name in names) or not saved:
        return found
    try:
        return read_as(model, path)
    except EngramError:
        return found  # what is missing by its plain name says more


def changed_names(pre: Mapping[str, Tensor], ft: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors whose bits differ; another shape or dtype is a difference."""
    return [name for name, weight in pre.items() if name in ft and not _same(weight, ft[name])]


def split_tuned(
    source: Source, model: nn.Module, graftable: Mapping[str, Tensor], argument: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The fine-tuned graftable tensors, and the names of the other parameters in which the model changed."""
    others = {
        name: weight.detach()
        for name, weight in model.named_parameters()
        if name not in graftable and not weight.is_meta
    }
    ft = tuned_tensors(source, model, list(graftable), argument, list(others))
    return {name: ft[name] for name in graftable}, changed_names(others, ft)


def check_difference(
    pre: Mapping[str, Tensor], ft: Mapping[str, Tensor], outside: Sequence[str], argument: str
) -> None:
    """Raise unless all weights are finite and some of them changed."""
    for name, weight in ft.items():
        for whose, tensor in ((argument, weight), ("pre_model", pre[name])):
            if not bool(tensor.isfinite().all()):
                at = int((~tensor.isfinite()).flatten().nonzero()[0])
                raise EngramError(
                    f"{whose}: expected finite weights, got {tensor.flatten()[at].item()} in {name!r} at {at}"
                )
    if changed_names(pre, ft):
        return
    if outside:
        reason = f"what changed lies outside of them: {listed(outside)} (include=… takes such)"
    else:
        reason = "is it the base, an adapter that is switched off, or a training that changed nothing?"
    raise EngramError(
        f"{argument}: expected weights that differ from the base's, got the same in all {len(pre)} "
        f"graftable parameters; {reason}"
    )


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def _same(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    # Bits, and NaN for the same NaN: as they would be grafted.
    return torch.equal(
        one.detach().contiguous().flatten().view(torch.uint8),
        two.detach().to(one.device).contiguous().flatten().view(torch.uint8),
    )
