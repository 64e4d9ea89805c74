"""The tokens that later passes start from: what attention keeps of them, read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import EngramError
from .forward import Reached, run_until_reached, takes
from .layers import decoder_layers
from .tokens import pad_rows


@dataclass(frozen=True)
class Left:
    """Attention's keys and values of tokens, aligned so that every row's last one is in the last column.

    Attributes:
        mask: `[rows, P]`, 1 where there is a token.
        cached: by layer, keys and values `[rows, heads, P, size]`, 0 where there is no token.
    """

    mask: Tensor
    cached: list[tuple[Tensor, Tensor]]

    def select(self, rows: Tensor) -> Left:
        """The same for some of the rows."""
        return Left(
            self.mask[rows],
            [(keys[rows.to(keys.device)], values[rows.to(keys.device)]) for keys, values in self.cached],
        )

    def above(self, layer: int) -> Left:
        """The same without what the layers below `layer` keep, but for its length, which models ask for."""
        length = self.mask.new_zeros(()).expand(len(self.mask), 1, self.mask.shape[1], 1)
        return Left(self.mask, [(length, length)] * layer + self.cached[layer:])


def inputs_after(model: nn.Module, left: Left | None, ids: Tensor, mask: Tensor) -> dict:
    """The inputs of a pass over tokens `[rows, longest]`, padded on the right, that stand after `left`."""
    before = mask[:, :0] if left is None else left.mask
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.cat([before, mask], 1),
        "past_key_values": _cache(left),
        "use_cache": True,
    }
    if takes(model, "position_ids"):
        # Padding takes the last token's position: beyond it there may be none.
        inputs["position_ids"] = before.sum(1, keepdim=True) + (mask.cumsum(1) - 1).clamp(min=0)
    return inputs


def read_prefixes(model: nn.Module, rows: Sequence[list[int]], period: int) -> Left | None:
    """What attention keeps of some rows of tokens; None where all are empty.

    Every `period`-th row may begin alike: what these share is read once.

    Raises:
        EngramError: the model keeps something else than keys and values of every token.
    """
    shared = [_shared(rows[place::period]) for place in range(period)]
    left = None
    if any(shared):
        left = _read(model, shared)
        left = left.select(torch.arange(len(rows), device=left.mask.device) % period)
    rest = [row[len(shared[number % period]) :] for number, row in enumerate(rows)]
    return _read(model, rest, left) if any(rest) else left


def _shared(rows: Sequence[list[int]]) -> list[int]:
    """The longest common beginning."""
    first = rows[0]
    for length, tokens in enumerate(zip(*rows, strict=False)):
        if len(set(tokens)) > 1:
            return first[:length]
    return first[: min(map(len, rows))]


@torch.no_grad()
def _read(model: nn.Module, rows: Sequence[list[int]], before: Left | None = None) -> Left:
    """Read some tokens after those that stand before them."""
    ids, mask = pad_rows(rows, model.get_input_embeddings().weight.device)
    inputs = inputs_after(model, before, ids, mask)
    head = model.get_output_embeddings()

    def stop(_module, _inputs):
        raise Reached

    hook = head.register_forward_pre_hook(stop) if isinstance(head, nn.Module) else None
    try:
        run_until_reached(model, **inputs)
    finally:
        if hook is not None:
            hook.remove()
    mask = inputs["attention_mask"]
    depth = len(decoder_layers(model)[1])
    cached = keys_and_values(inputs["past_key_values"], depth, len(rows), mask.shape[1])
    if cached is None:
        raise EngramError("model: expected one that keeps keys and values of every token, got another")
    # Stable: tokens keep their order behind the columns that have none.
    order = mask.argsort(dim=1, stable=True)[:, mask.shape[1] - int(mask.sum(1).max()) :]
    mask = mask.gather(1, order)

    def aligned(tensor: Tensor) -> Tensor:
        index, inside = (part.to(tensor.device)[:, None, :, None] for part in (order, mask))
        gathered = tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))
        return gathered.masked_fill(inside == 0, 0.0)

    return Left(mask, [(aligned(keys), aligned(values)) for keys, values in cached])


def keys_and_values(cache, depth: int, rows: int, tokens: int) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values `[rows, heads, tokens, width]` of all layers, if they keep only these."""
    layers = getattr(cache, "layers", [])
    kept = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    plain = len(layers) == depth and all(
        isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.shape[::2] == (rows, tokens)
        for pair in kept
        for tensor in pair
    )
    return kept if plain else None


def _cache(left: Left | None):
    """A cache that holds what went before; new keys and values are added to it, not written into it."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in [] if left is None else left.cached:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache
