"""Backward passes of models whose weights accelerate keeps elsewhere: no more than one layer is live."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .placement import offload_hook


class _Place(NamedTuple):
    """A weight that is brought for each forward pass, and the view of it that a backward pass needs."""

    hook: object
    name: str
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # from the weight's first element


@contextmanager
def weights_read_again(model: nn.Module) -> Iterator[None]:
    """Let a backward pass read again what accelerate offloads, instead of keeping it since the forward pass.

    Autograd keeps every weight that a gradient passes through, so that at the end of a forward pass all
    offloaded layers above the edited one would be in memory. Weights that are read again have the same bits.
    Nothing happens for models that are in memory.
    """
    brought: dict[int, tuple[object, str, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor | _Place:
        found = brought.get(tensor.untyped_storage().data_ptr()) if brought else None
        if found is None:
            return tensor
        hook, name, weight = found
        offset = tensor.storage_offset() - weight.storage_offset()
        return _Place(hook, name, tensor.dtype, tensor.shape, tensor.stride(), offset)

    def unpack(kept: Tensor | _Place) -> Tensor:
        if not isinstance(kept, _Place):
            return kept
        weight = kept.hook.weights_map[kept.name].to(kept.hook.execution_device, kept.dtype)
        return weight.as_strided(kept.size, kept.stride, weight.storage_offset() + kept.offset)

    with ExitStack() as stack:
        hooks = [hook for module in model.modules() if (hook := offload_hook(module)) is not None]
        for hook in hooks:
            hook.pre_forward = partial(_bring, hook, hook.pre_forward, brought)
            hook.post_forward = partial(_take_away, hook.post_forward, brought)
            stack.callback(_restore, hook)
        if hooks:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        yield


def _bring(hook, bring, brought: dict, module: nn.Module, *arguments, **keywords):
    inputs = bring(module, *arguments, **keywords)
    for name, weight in module.named_parameters(recurse=hook.place_submodules):
        if not weight.is_meta:
            brought[weight.untyped_storage().data_ptr()] = hook, name, weight
    return inputs


def _take_away(take_away, brought: dict, module: nn.Module, output):
    for weight in module.parameters():
        if not weight.is_meta:
            brought.pop(weight.untyped_storage().data_ptr(), None)
    return take_away(module, output)


def _restore(hook) -> None:
    del hook.pre_forward, hook.post_forward
