"""Weights with PEFT's adapters merged into them, and the models that wear the adapters left as they are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from ..errors import EngramError

ADAPTER = "adapter_config.json"


def holds_an_adapter(path: Path) -> bool:
    """Whether a folder is one that PEFT's `save_pretrained` wrote."""
    return (path / ADAPTER).is_file()


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that a model computes with, under the names that they have without its adapters.

    Active adapters are merged one layer at a time, by PEFT itself, into copies.

    Yields:
        Names, and tensors: the model's own where no adapter changes them.
    """
    wrapped = [name for name, module in model.named_modules() if _wraps(module)]
    # An adapter inside another one's layer is merged with that.
    outermost = [name for name in wrapped if not any(name.startswith(f"{other}.") for other in wrapped)]
    for name in outermost:
        for inner, weight in _merged(model.get_submodule(name)):
            yield _plain(f"{name}.{inner}"), weight
    for name, weight in model.named_parameters(remove_duplicate=False):
        if not any(name.startswith(f"{module}.") for module in outermost):
            yield _plain(name), weight.detach()


def with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """A model of the same weights, in the same memory, that wears the adapter of a folder.

    Raises:
        EngramError: PEFT is missing, or the adapter does not fit the model.
    """
    try:
        import peft
    except ImportError as error:
        raise EngramError("peft is needed to read an adapter: pip install peft") from error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            worn = peft.PeftModel.from_pretrained(_twin(model), str(folder))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise EngramError(f"an adapter that does not fit the model ({_first_line(error)})") from error
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise EngramError(f"an adapter that does not fit the model ({_first_line(warning.message)})")
    return worn


def _wraps(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's around one of the model's; PEFT need not be there."""
    return any(
        kind.__name__ in ("BaseTunerLayer", "AuxiliaryTrainingWrapper")
        and kind.__module__.startswith("peft.")
        for kind in type(module).__mro__
    )


def _merged(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of one wrapped layer as it computes with them."""
    twin = _twin(layer, clone=True)
    around = [module for module in twin.modules() if _wraps(module)]
    for module in reversed(around):
        if hasattr(module, "merge") and not module.disable_adapters and module.active_adapters:
            if not module.merged:
                module.merge()
    inner = twin
    while _wraps(inner):
        if hasattr(inner, "base_layer"):
            inner = inner.base_layer
        else:  # a module that is trained whole
            saved = getattr(inner, "modules_to_save", {})
            active = [name for name in getattr(inner, "active_adapters", []) if name in saved]
            whole = active and not inner.disable_adapters
            inner = saved[active[0]] if whole else inner.original_module
    for name, weight in inner.named_parameters():
        yield name, weight.detach()


def _twin(module: nn.Module, clone: bool = False) -> nn.Module:
    """A copy of the modules around the same memory, or around clones of it."""
    memo: dict[int, object] = {
        id(weight): nn.Parameter(weight.detach().clone() if clone else weight.detach(), requires_grad=False)
        for weight in module.parameters()
    }
    memo |= {id(buffer): buffer for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
