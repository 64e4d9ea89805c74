"""One routed expert of a mixture, opened for edits.

All experts of a layer are one tensor, and no hook sees inside of their module. While an expert is open, its
part is computed a second time by a module of its own, whose hooks see its keys and add to its output.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from ..errors import EngramError
from .layers import decoder_layer


class Expert(nn.Module):
    """The output projection of one expert; its weight `[out, in]` is a view of all experts' tensor."""

    def __init__(self, experts: nn.Module, number: int):
        super().__init__()
        # In a tuple, so that they do not become a submodule of this one, which is within them.
        self._experts = (experts,)
        self.number, self.count = number, experts.down_proj.shape[0]

    @property
    def weight(self) -> Tensor:
        return self._experts[0].down_proj[self.number]

    def forward(self, keys: Tensor) -> Tensor:
        return F.linear(keys, self.weight)

    def keys(self, states: Tensor) -> Tensor:
        """The inputs of the expert's output projection: states `[tokens, width]` to keys `[tokens, in]`."""
        experts = self._experts[0]
        return experts._apply_gate(F.linear(states, experts.gate_up_proj[self.number]))


@contextmanager
def open_expert(model: nn.Module, layer: int, expert: int) -> Iterator[Expert]:
    """Let one routed expert be the output projection of its layer, for edits, statistics and `apply`.

    With the tokens' states `x` and the weights `w` that the router gave to the experts which it chose,

        y = Σ_e w_e W_e h_e(x)

    The keys of expert `e` are `h_e(x)` for the tokens that the router sends to it, else 0: a prompt whose
    subject goes to other experts has no part in the key, and does not see the edit. What is added to its
    output counts `w_e` times. Opening changes nothing that the model computes; an edit stays when the
    block ends, and can be reverted at any time. Statistics are over the expert's own tokens alone: raise
    `Editor(tokens=…)` accordingly.

    Args:
        model: a causal language model of transformers with fused experts, such as Mixtral or Qwen3-MoE.
        layer: index of the decoder layer, counted from 0.
        expert: its number, counted from 0; `routed_expert` gives the one that the router prefers for a fact.

    Raises:
        TypeError, ValueError: there is no such layer or expert.
        EngramError: the layer has no routed experts, they are not gated linear maps, or one is open already.

    Example:
        >>> expert = routed_expert(model, tokenizer, edit, layer=6)
        >>> with open_expert(model, 6, expert):
        ...     result = Editor(model, tokenizer).edit(edit, layers=6)
    """
    experts = routed_experts(model, layer)
    count = experts.down_proj.shape[0]
    check.integer("expert", expert)
    if not 0 <= expert < count:
        raise ValueError(f"expert: expected from 0 to {count - 1} in layer {layer}, got {expert}")
    if opened_expert(experts) is not None:
        raise EngramError(f"layer: expected one with no expert open, got {layer}: one at a time")
    opened, own = Expert(experts, expert), experts.__dict__.get("forward")
    _check_gated(opened, experts.forward, layer)

    def forward(self: nn.Module, states: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        # By `self`, so that a copy of the model uses its own expert.
        mine = opened_expert(self)
        plain = types.MethodType(type(self).forward, self) if own is None else own
        sent = chosen == mine.number
        keys = mine.keys(states).masked_fill(~sent.any(-1, keepdim=True), 0.0)
        share = (shares * sent).sum(-1, keepdim=True)
        # Zero, unless a hook changed the output.
        added = mine(keys) - mine.forward(keys)
        return plain(states, chosen, shares) + (share * added).to(states.dtype)

    experts.forward, experts.opened = types.MethodType(forward, experts), (opened,)
    try:
        yield opened
    finally:
        del experts.opened
        if own is None:
            del experts.forward
        else:
            experts.forward = own


def routed_experts(model: nn.Module, layer: int) -> nn.Module:
    """The module of a layer's routed experts.

    Raises:
        TypeError, ValueError: there is no such layer.
        EngramError: it has none, or none of a layout that is known.
    """
    found = list(filter(is_fused, decoder_layer(model, layer)[1].modules()))
    if len(found) != 1:
        raise EngramError(f"layer: expected one whose routed experts are one tensor, got {layer} without any")
    return found[0]


def opened_expert(experts: nn.Module) -> Expert | None:
    """The expert that is open, if one is."""
    return getattr(experts, "opened", (None,))[0]


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the experts of a layer in one tensor for each of their products."""
    return all(
        isinstance(module._parameters.get(name), Tensor) and module._parameters[name].dim() == 3
        for name in ("gate_up_proj", "down_proj")
    )


@torch.no_grad()
def _check_gated(opened: Expert, plain, layer: int) -> None:
    """Check on random states that the expert computes what the experts' module computes of it alone."""
    weight = opened.weight
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, weight.shape[0], generator=generator, device="cpu", dtype=torch.float32).to(
        weight
    )
    chosen = torch.full((4, 1), opened.number, device=weight.device)
    try:
        expected = plain(states, chosen, torch.ones_like(states[:, :1]))
        off = (opened(opened.keys(states)) - expected).abs().max()
        same = bool(off <= 64 * torch.finfo(weight.dtype).eps * expected.abs().max())
    except (AttributeError, RuntimeError, TypeError):
        same = False
    if not same:
        raise EngramError(f"layer: expected gated linear maps as experts, got others in {layer}")
