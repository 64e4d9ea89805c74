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
