"""Find by structure, not by name, the stack of layers of a model."""

from torch import nn

from ..errors import EngramError


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of decoder layers and its name: the largest `ModuleList` of blocks of one class.

    Raises:
        EngramError: the model has no such list.
    """
    stacks = [
        (sum(parameter.numel() for parameter in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and len({type(block) for block in module}) == 1
    ]
    if not stacks:
        raise EngramError(
            "model: expected its decoder layers in an nn.ModuleList of blocks of one class, got none"
        )
    _, name, layers = max(stacks, key=lambda stack: stack[0])
    return name, layers


def decoder_layer(model: nn.Module, layer: int) -> tuple[str, nn.Module]:
    """One of the decoder layers and its name.

    Raises:
        TypeError: `layer` is not an integer.
        ValueError: `layer` is out of range.
        EngramError: the model has no decoder layers.
    """
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer: expected an integer, got {type(layer).__name__}")
    stack, layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer: expected from 0 to {len(layers) - 1} for this model, got {layer}")
    return f"{stack}.{layer}", layers[layer]


def adapter_settings(model: nn.Module) -> list[tuple]:
    """What its tensors do not tell of the adapters in a model: which are on, which merged, how strong."""
    return [
        (
            name,
            bool(getattr(module, "disable_adapters", False)),
            *(str(getattr(module, what, None)) for what in ("active_adapters", "merged_adapters", "scaling")),
        )
        for name, module in model.named_modules()
        if hasattr(module, "base_layer")
    ]
