"""Where a model's weights are: in a wrapper, in shards, in main memory or on a disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._ranks import together
from ..errors import EngramError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# What DataParallel and its kin put before each name.
_PARALLEL = "module."


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
            "alone leaves the replicas different: give the group of the ranks too, so that all make one edit"
        )
    return unwrapped(model)


def plain_name(path: str) -> str:
    """A module's name without the wrappers of `torch.compile` on its way."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def inner_names(names: Iterable[str]) -> dict[str, str]:
    """Names of a state dict by those that they have in the model without wrappers, to look them up.

    A state dict of a model in torch.compile's or a data parallel wrapper has `_orig_mod.` or `module.` before
    each name. Where a model calls a part of itself so, that name is there too.
    """
    found = {}
    for name in (names := list(names)):
        inner = plain_name(name)
        while inner.startswith(_PARALLEL):
            inner = inner.removeprefix(_PARALLEL)
        found[inner] = name
    return found | {name: name for name in names}


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names that it has without torch.compile's or a data parallel wrapper."""
    plain = {plain_name(name): tensor for name, tensor in tensors.items()}
    while plain and all(name.startswith(_PARALLEL) for name in plain):
        plain = {name.removeprefix(_PARALLEL): tensor for name, tensor in plain.items()}
    return plain


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


def whole(weight: Tensor) -> Tensor:
    """A weight with the parts of all ranks, every one of which makes this call; one by itself as it is."""
    weight = weight.detach()
    return weight.full_tensor() if is_sharded(weight) else weight


@torch.no_grad()
def keep_part_(weight: Tensor, full: Tensor) -> None:
    """Write a whole tensor into a weight that is divided: this rank's part of it, without communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    copies = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    weight.detach().to_local().copy_(copies.redistribute(placements=weight.placements).to_local())


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight, in its memory."""
    return weight.detach().to_local() if is_sharded(weight) else weight


def mirrors(model: nn.Module) -> ProcessGroup | None:
    """The group of the ranks that divide a model among them; None where it is whole."""
    for parameter in unwrapped(model).parameters():
        if is_sharded(parameter):
            mesh = parameter.device_mesh
            return mesh.get_group() if mesh.ndim == 1 else torch.distributed.group.WORLD
    return None


def divide_again(model: nn.Module) -> None:
    """Have FSDP2 give up the whole weights that it keeps after some passes: writes to them would be lost."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if is_fsdp(module):
            module.reshard()


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 (`fully_shard`) divides a module's weights."""
    return hasattr(module, "reshard") and hasattr(module, "unshard")


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
