"""Where a model's weights are: in a wrapper, in shards, in main memory or on a disk."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._ranks import together
from ..errors import EngramError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of a wrapper that computes the same: `torch.compile`'s, or one of data parallelism."""
    while isinstance(model, nn.Module):
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            break
    return model


def whole_model(model: nn.Module) -> nn.Module:
    """The model inside of its wrappers, for a search that runs on this rank alone.

    Raises:
        EngramError: other ranks hold replicas of it, which would differ then.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel) and together():
        raise EngramError(
            "model: expected the model itself, got it in DistributedDataParallel, where an edit of one rank "
            "alone leaves the replicas different: give model.module, and make the same edits on every rank"
        )
    return unwrapped(model)


def plain_name(path: str) -> str:
    """A module's name without the wrappers of `torch.compile` on its way."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def is_compiled(model: nn.Module) -> bool:
    """Whether a part of a model runs compiled: such code does not see hooks that come later."""
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def is_sharded(weight: object) -> bool:
    """Whether a weight is divided among processes: a DTensor, of tensor parallelism or FSDP2."""
    # By its parts, as importing the class takes a while where no model is divided.
    return hasattr(weight, "placements") and hasattr(weight, "to_local")


def sharding(model: nn.Module, path: str) -> str:
    """What divided the weights of a module among processes, in words."""
    parts = path.split(".")
    above = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts) + 1)]
    return "FSDP2" if any(hasattr(module, "unshard") for module in above) else "tensor parallelism"


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's own weights elsewhere, and brings them for each forward pass."""
    return offload_hook(module) is not None


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its tokens: the device of its embeddings, or the one that they are brought to."""
    embeddings = model.get_input_embeddings()
    hook = offload_hook(embeddings)
    return embeddings.weight.device if hook is None else torch.device(hook.execution_device)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers by name, as in the `state_dict` of the model without wrappers.

    What is offloaded is on the meta device, and `stored` reads it.
    """
    found = unwrapped(model).state_dict(keep_vars=True)
    return {plain_name(name): found[name] for name in sorted(found)}


def stored(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The values of one of `named_tensors`: itself, what accelerate keeps of it, or its parts of all ranks.

    A tensor that is divided is gathered: every rank asks for it, and for no other meanwhile.
    """
    if is_sharded(tensor):
        return tensor.detach().full_tensor()
    if not tensor.is_meta:
        return tensor.detach()
    path, _, own = name.rpartition(".")
    hook = offload_hook(unwrapped(model).get_submodule(path))
    if hook is None or hook.weights_map.get(own) is None:
        raise EngramError(
            f"model: expected its weights in memory, got {name!r} on the meta device, without values"
        )
    return hook.weights_map[own]


def offload_hook(module: nn.Module):
    """The hook by which accelerate brings a module's weights; None where there is none that does."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
            return one
    return None
