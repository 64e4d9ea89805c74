"""A mask that learns in the model's own parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._ranks import ALONE, Ranks
from ..errors import EngramError
from ..hf.swapped_weights import swapped_weights
from .mask import GraftMask
from .recipes import Recipe

# Gradients are used, and freed, whenever so many bytes of them have come: few launches, and no copy of the
# model in gradients.
BUCKET = 16 << 20


class MaskTraining:
    """The model with θ in its parameters, and a mask that learns from their gradients as they come.

    As a context manager it gives the parameters other memory, for θ, and afterwards their own back, with
    their gradients and flags, after errors too.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        mask: GraftMask,
        plan: Recipe,
        ranks: Ranks = ALONE,
    ):
        self.model, self.mask, self.plan, self.ranks = model, mask, plan, ranks
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.last = True  # whether the present backward pass is the step's last
        self.pending: list[int] = []  # gradients that have come
        self.done: set[int] = set()  # and were used, in this step
        self.ever: set[int] = set()

    def __enter__(self) -> MaskTraining:
        self.theta = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in self.mask.pre]
        self.mask.blend_(self.theta)
        with ExitStack() as stack:
            stack.enter_context(lone_gradients(self.model))
            stack.enter_context(swapped_weights(self.model, dict(zip(self.names, self.theta, strict=True))))
            stack.enter_context(arriving_gradients(self.parameters, self._arrived))
            self._way_back = stack.pop_all()
        return self

    def __exit__(self, *_details) -> None:
        self._way_back.close()

    def _arrived(self, i: int, _parameter: nn.Parameter) -> None:
        # On several ranks gradients may come in several orders.
        if not self.last or self.ranks.size > 1:
            return
        if i in self.done or i in self.pending:
            raise EngramError(
                "pre_model: expected each weight's gradient once in a backward pass, got it in parts: "
                "use checkpointing with use_reentrant=False"
            )
        self.pending.append(i)
        if sum(gradient.nbytes for gradient in self._gradients()) >= BUCKET:
            self._step()

    def flush(self) -> None:
        """Use the gradients that are left, and be ready for the next step."""
        # Gradients of earlier batches alone wait here for parameters that the last batch did not use.
        waiting = set(self.pending)
        self.pending += [i for i, p in enumerate(self.parameters) if p.grad is not None and i not in waiting]
        if self.ranks.size > 1:
            self._share()
        self._step()
        if not self.done:
            raise EngramError("loss_fn: expected a loss that depends on the graftable weights, got none")
        self.done.clear()
        # A caller's autocast keeps copies of the weights, and does not see what was written.
        torch.clear_autocast_cache()

    def _share(self) -> None:
        """Add the gradients of all ranks; one that has none of a parameter gives zeros."""
        self.pending = sorted(set().union(*self.ranks.each(lambda: self.pending)))
        for i in self.pending:
            parameter = self.parameters[i]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.ranks.sum_(parameter.grad)

    def rebase(self) -> None:
        """Take the best k positions."""
        self.mask.rebase_()
        self.mask.blend_(self.theta)
        torch.clear_autocast_cache()

    def report(self) -> None:
        """Warn of weights that no gradient ever reached: nothing was learned about them."""
        missed = [name for i, name in enumerate(self.names) if i not in self.ever]
        if missed:
            warnings.warn(
                f"no gradient reached {len(missed)} of {len(self.names)} parameters, such as {missed[0]!r}: "
                "experts that no token chose, or reentrant checkpointing of frozen inputs",
                stacklevel=3,
            )

    def _gradients(self) -> list[Tensor]:
        return [gradient for i in self.pending if (gradient := self.parameters[i].grad) is not None]

    def _step(self) -> None:
        if not self.pending:
            return
        grads = self._gradients()
        if not check.is_finite(torch.nn.utils.get_total_norm(grads, math.inf)):
            finite = map(check.is_finite, grads)
            bad = next(self.names[i] for i, good in zip(self.pending, finite, strict=True) if not good)
            raise EngramError(f"loss_fn: expected finite gradients, got NaN or infinity in {bad!r}")
        out = [self.theta[i] for i in self.pending]
        self.mask.step_(self.pending, grads, out, self.plan.lr, self.plan.l1)
        for i in self.pending:
            self.parameters[i].grad = None
        self.done.update(self.pending)
        self.ever.update(self.pending)
        self.pending.clear()


@contextmanager
def lone_gradients(model: nn.Module) -> Iterator[None]:
    """A model none of whose parameters asks for a gradient or has one; afterwards they are as they were."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            _restore(parameter, False, None)
        yield
    finally:
        for entry in before:
            _restore(*entry)


@contextmanager
def arriving_gradients(
    parameters: Sequence[nn.Parameter], arrived: Callable[[int, nn.Parameter], None]
) -> Iterator[None]:
    """Call `arrived(i, parameter)` when the i-th parameter's gradient has come, in the backward pass."""
    with ExitStack() as stack:
        for i, parameter in enumerate(parameters):
            parameter.requires_grad_(True)
            stack.callback(parameter.register_post_accumulate_grad_hook(partial(arrived, i)).remove)
        yield


def _restore(parameter: nn.Parameter, requires_grad: bool, gradient: Tensor | None) -> None:
    parameter.requires_grad_(requires_grad)
    parameter.grad = gradient
