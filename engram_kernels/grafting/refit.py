"""Other values at a graft's positions: fine-tuning of these weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._progress import Progress
from ..errors import EngramError
from ..hf.placement import is_sharded
from ..ops import sparse_apply_
from ..ops.waiting import raises_at_once
from .applied import AppliedGraft, Delta
from .batches import checked, endless, moved, own_loss
from .parameters import named_weights
from .training import arriving_gradients, lone_gradients


class Refit:
    """The values at a graft's positions, as one fp32 vector, and the gradient that comes for each.

    Args:
        model: with the graft in it.
        graft: its positions and first values.
    """

    def __init__(self, model: nn.Module, graft: Delta):
        named = named_weights(model)
        self.names = list(graft.indices)
        self.parameters = [named[name] for name in self.names]
        for name, parameter in zip(self.names, self.parameters, strict=True):
            check.expect(not is_sharded(parameter), "model", "whole weights", f"a part of {name!r}")
        devices = [parameter.device for parameter in self.parameters]
        self.indices = [graft.indices[n].to(d) for n, d in zip(self.names, devices, strict=True)]
        self.sizes = [at.numel() for at in self.indices]
        self.values = torch.cat([graft.values[name].float() for name in self.names]).to(devices[0])
        self.values.grad = torch.zeros_like(self.values)
        self.gradients = self.values.grad.split(self.sizes)

    def arrived(self, i: int, parameter: nn.Parameter) -> None:
        """Keep the gradient at the positions, and free the rest."""
        assert parameter.grad is not None
        chosen = parameter.grad.reshape(-1)[self.indices[i]]
        self.gradients[i].add_(chosen.to(self.values.device, torch.float32))
        parameter.grad = None

    def check_gradients(self) -> None:
        """Name a weight whose gradient is not finite."""
        if not check.is_finite(self.values.grad):
            bad = next(n for n, g in zip(self.names, self.gradients, strict=True) if not check.is_finite(g))
            raise EngramError(f"loss_fn: expected finite gradients, got NaN or infinity in {bad!r}")

    @raises_at_once
    def write(self) -> None:
        """Round the values into the model's weights."""
        sparse_apply_([p.detach() for p in self.parameters], self.indices, self.rounded())
        torch.clear_autocast_cache()

    def rounded(self) -> list[Tensor]:
        """The values of each parameter, in its dtype and on its device."""
        parts = self.values.split(self.sizes)
        return [part.to(p.device, p.dtype) for part, p in zip(parts, self.parameters, strict=True)]


def refit(
    model: nn.Module,
    graft: Delta,
    batches: Iterable,
    loss_fn: Callable[[nn.Module, object], Tensor] | None,
    steps: int,
    lr: float,
    progress: Progress | None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train the values at a graft's positions by Adam, and give the model back as it was.

    Returns:
        The values by name, in the graft's dtype, on the CPU; and the loss of every step.
    """
    applied = AppliedGraft(model, graft)
    applied.write()
    try:
        with torch.inference_mode(False), torch.enable_grad(), lone_gradients(model):
            free, losses = Refit(model, graft), []
            optimizer = torch.optim.Adam([free.values], lr)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
            with arriving_gradients(free.parameters, free.arrived):
                for step, batch in zip(range(steps), endless(batches), strict=False):
                    loss = (loss_fn or own_loss)(model, moved(batch, model))
                    losses.append(checked(loss))
                    loss.backward()
                    free.check_gradients()
                    optimizer.step()
                    schedule.step()
                    free.values.grad.zero_()
                    free.write()
                    if progress:
                        progress("refit", step + 1, steps)
            values = dict(zip(free.names, [value.cpu() for value in free.rounded()], strict=True))
    finally:
        applied.revert(force=True)
    return values, losses
