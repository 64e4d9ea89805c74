"""Find by structure, not by name, the stack of layers of a model."""

import torch
from torch import nn

from .. import _checks as check
from ..errors import EngramError
from .placement import unwrapped

# Of the weights that are read, edited and grafted.
MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of weights, if it is one.

    Raises:
        ValueError: it is not.
    """
    expected = "torch.float32, torch.bfloat16 or torch.float16"
    check.expect(dtype in MODEL_DTYPES, "dtype", expected, dtype)
    return dtype


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of decoder layers and its name: the largest `ModuleList` of blocks of one class.

    Raises:
        TypeError: `model` is not a module.
        EngramError: the model has no such list, or two stacks, an encoder and a decoder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Hugging Face model, got {type(model).__name__}")
    model = unwrapped(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise EngramError(
            "model: expected a causal language model, which reads and writes in one stack of layers, got "
            f"{type(model).__name__}, an encoder and a decoder"
        )
    stacks = [
        (sum(parameter.numel() for parameter in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and len({type(unwrapped(block)) for block in module}) == 1
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
        TypeError: `model` is not a module, or `layer` not an integer.
        ValueError: `layer` is out of range.
        EngramError: the model has no decoder layers.
    """
    check.integer("layer", layer)
    stack, layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer: expected from 0 to {len(layers) - 1} for this model, got {layer}")
    return f"{stack}.{layer}", layers[layer]


def adapter_settings(model: nn.Module) -> list[tuple]:
    """The settings of a model's adapters that no tensor shows: which are on, which merged, how strong."""
    return [
        (
            name,
            bool(getattr(module, "disable_adapters", False)),
            *(str(getattr(module, what, None)) for what in ("active_adapters", "merged_adapters", "scaling")),
        )
        for name, module in model.named_modules()
        if hasattr(module, "base_layer")
    ]
