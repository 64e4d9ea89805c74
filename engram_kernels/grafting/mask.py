"""A learned mask over the parameters of a model: `γ = σ(s (S − bias))`, s = −1 in the base mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .. import _checks as check
from ..ops import (
    GraftPlan,
    _foreach_graft_blend_,
    graft_blend,
    graft_top_k,
    pack_mask,
    top_k_mask,
    unpack_mask,
)
from ..ops.waiting import raises_at_once
from .density import layer_and_kind
from .recipes import Recipe

# Choices of parameters whose lists are kept: the buckets of a step, which come again in the next.
_PLANS = 64


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(x is y for x, y in zip(some, others, strict=True))


class GraftMask:
    """The logits S of a mask, the two models it blends, and the operations on them.

    For those who compose with their own autograd, `parameters` gives blended weights that are differentiable
    in the logits, for `torch.func.functional_call`.

    Args:
        pre, ft: the tensors of the two models, by parameter name.
        recipe: what the logits begin with.
        size: the number k of positions that the mask shall have.
        seed: of the logits' noise.

    Attributes:
        names: of the parameters.
        pre, ft: their tensors in the two models.
        logits: S, fp32.
        base: packed base masks, or None.
        bias: the gate's bias.
        size: k.

    Raises:
        TypeError, ValueError: an argument that cannot be used.

    Example:
        >>> mask = GraftMask(pre, ft, RECIPES["panigrahi"], size=10_000)
        >>> for logits in mask.logits:
        ...     logits.requires_grad_()
        >>> loss = loss_of(torch.func.functional_call(model, mask.parameters(), args))
        >>> loss.backward()  # gradients in mask.logits
    """

    @raises_at_once
    def __init__(
        self, pre: Mapping[str, Tensor], ft: Mapping[str, Tensor], recipe: Recipe, size: int, seed: int = 0
    ):
        check.expect(isinstance(recipe, Recipe), "recipe", "a Recipe", type(recipe).__name__, TypeError)
        missing = [name for name in pre if name not in ft]
        check.expect(not missing, "ft", "a tensor for each of pre's names", f"none of {missing[:1]}")
        self.names = list(pre)
        self.pre = [pre[name] for name in self.names]
        self.ft = [ft[name] for name in self.names]
        self.bias = recipe.bias
        self.size = size
        self.base: list[Tensor] | None = None
        self._plans: dict[tuple[int, ...], GraftPlan] = {}
        self.logits = [
            torch.full(weight.shape, recipe.outside, dtype=torch.float32, device=weight.device)
            for weight in self.pre
        ]
        everything = [(list(range(len(self.names))), size)]
        self._shares = self._by_layer() if recipe.layered else everything
        if recipe.base or recipe.inside != recipe.outside:
            largest = self._best(graft_top_k, self.pre, self.ft)
            for logits, mask in zip(self.logits, largest, strict=True):
                logits[unpack_mask(mask, logits.shape)] = recipe.inside
            self.base = largest if recipe.base else None
        if recipe.noise:
            generator = torch.Generator().manual_seed(seed)
            for logits in self.logits:
                drawn = torch.rand(logits.shape, generator=generator, dtype=torch.float32, device="cpu")
                logits += recipe.noise * drawn.to(logits.device)

    def parameters(self) -> dict[str, Tensor]:
        """θ by name, differentiable in the logits."""
        return {
            name: graft_blend(pre, ft, logits, base, self.bias)
            for name, pre, ft, logits, base in zip(
                self.names, self.pre, self.ft, self.logits, self._bases(), strict=True
            )
        }

    def blend_(self, out: Sequence[Tensor]) -> None:
        """Write θ into tensors of the parameters' shapes."""
        _foreach_graft_blend_(out, self.pre, self.ft, self.logits, self.base, self.bias)

    def step_(
        self, which: Sequence[int], grads: Sequence[Tensor], out: Sequence[Tensor], lr: float, l1: float
    ) -> None:
        """Take a gradient step on the logits of some parameters, and write their next θ, which is contiguous.

        The lists are made ready once for each choice of parameters, and used again with the same `out`.
        """
        self._plan(tuple(which), out).step_(grads, lr, l1)

    def _plan(self, which: tuple[int, ...], out: Sequence[Tensor]) -> GraftPlan:
        take = lambda tensors: [tensors[i] for i in which]  # noqa: E731
        logits, plan = take(self.logits), self._plans.get(which)
        if plan is None or not (_same(plan.out, out) and _same(plan.logits, logits)):
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            base = None if self.base is None else take(self.base)
            plan = GraftPlan(logits, take(self.pre), take(self.ft), base, self.bias, out)
            self._plans[which] = plan
        return plan

    @raises_at_once
    @torch.no_grad()
    def rebase_(self) -> None:
        """Make the k positions of the highest score `s S` the base mask, and keep every score."""
        self._flip_()
        self.base = self._best(top_k_mask, self.logits)
        self._plans.clear()
        self._flip_()

    def open(self) -> list[Tensor]:
        """Packed masks of the gates above one half."""
        masks = []
        for logits, base in zip(self.logits, self._bases(), strict=True):
            flipped = logits > self.bias
            masks.append(pack_mask(flipped if base is None else flipped ^ unpack_mask(base, logits.shape)))
        return masks

    def __repr__(self) -> str:
        total = sum(logits.numel() for logits in self.logits)
        return f"GraftMask({self.size:,} of {total:,} weights in {len(self.names)} parameters)"

    def _by_layer(self) -> list[tuple[list[int], int]]:
        """The parameters of each layer, and its share of the k positions, by how many weights changed."""
        layers: dict[int, list[int]] = {}
        for i, name in enumerate(self.names):
            layers.setdefault(layer_and_kind(name)[0], []).append(i)
        changed = [int((one != other).sum()) for one, other in zip(self.pre, self.ft, strict=True)]
        counts = changed if sum(changed) >= self.size else [weight.numel() for weight in self.pre]
        total, seen, shares = sum(counts), 0, []
        for which in layers.values():
            before = self.size * seen // total
            seen += sum(counts[i] for i in which)
            shares.append((which, self.size * seen // total - before))
        return shares

    def _best(self, choose: Callable[..., list[Tensor]], *tensors: Sequence[Tensor]) -> list[Tensor]:
        """Packed masks of the best positions, of each share its number."""
        masks: dict[int, Tensor] = {}
        for which, count in self._shares:
            masks |= zip(which, choose(*([given[i] for i in which] for given in tensors), count), strict=True)
        return [masks[i] for i in range(len(self.names))]

    def _bases(self) -> Sequence[Tensor | None]:
        return self.base if self.base is not None else [None] * len(self.names)

    def _flip_(self) -> None:
        """S ← s S: from logits to scores, and back."""
        for logits, base in zip(self.logits, self._bases(), strict=True):
            if base is not None:
                logits[unpack_mask(base, logits.shape)] *= -1
