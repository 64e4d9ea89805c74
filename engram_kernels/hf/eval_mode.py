"""A model in evaluation mode, whatever modes its caller is in."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from .placement import is_compiled


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch off dropout, compiled code, and the caller's autocast and inference mode, for a while.

    Gradients are recorded within, whatever the caller's mode: put `torch.no_grad()` inside to do without.
    """
    training = [(module, module.training) for module in model.modules()]
    kinds = {parameter.device.type for parameter in model.parameters()}
    model.eval()
    try:
        with torch.inference_mode(False), ExitStack() as stack:
            for kind in filter(torch.amp.is_autocast_available, sorted(kinds)):
                stack.enter_context(torch.autocast(kind, enabled=False))
            if is_compiled(model):
                # Its code does not look for hooks.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        # A module's own flag may differ from the model's, where a part of it is frozen.
        for module, flag in training:
            module.training = flag
