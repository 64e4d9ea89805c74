"""A model in evaluation mode, whatever modes its caller is in."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch off dropout, compiled code, and the caller's autocast and inference mode, for a while.

    Compiled code (`model.compile()`) does not call the hooks that are added after it was made.

    Gradients are recorded within, whatever the caller's mode: put `torch.no_grad()` inside to do without.
    """
    training = [(module, module.training) for module in model.modules()]
    kinds = {parameter.device.type for parameter in model.parameters()}
    compiled = [(module, module._compiled_call_impl) for module in model.modules()]
    compiled = [(module, code) for module, code in compiled if code is not None]
    model.eval()
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        with torch.inference_mode(False), ExitStack() as stack:
            for kind in filter(torch.amp.is_autocast_available, sorted(kinds)):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        # A module's own flag may differ from the model's, where a part of it is frozen.
        for module, flag in training:
            module.training = flag
        for module, code in compiled:
            module._compiled_call_impl = code
