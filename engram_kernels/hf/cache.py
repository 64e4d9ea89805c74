"""What a decoder keeps of the tokens it has read, and the passes that start from there.

This is the only code that knows how transformers hands a cache in and out: as `past_key_values` before 5.24,
as `cache` since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import EngramError
from .forward import takes
from .hooks import Stop, capture, run_until
from .layers import decoder_layers
from .placement import input_device
from .tokens import pad_rows


def cache_inputs(model: nn.Module, cache=None, use_cache: bool | None = True) -> dict:
    """The inputs by which a model goes on from a cache, or begins one of its own kind, and returns it."""
    return {_argument(model): cache, "use_cache": use_cache}


def _argument(model: nn.Module) -> str:
    return "past_key_values" if takes(model, "past_key_values") else "cache"


def output_cache(output):
    """The cache in a model's output; None where there is none."""
    return getattr(output, "cache" if hasattr(output, "cache") else "past_key_values", None)


def generation_cache(given: Mapping):
    """The cache in what `generate` gives `prepare_inputs_for_generation`; None where there is none."""
    return given.get("cache", given.get("past_key_values"))


def empty_cache(config):
    """A cache without tokens for a decoder of this configuration."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


def filled_cache(pairs: Iterable[tuple[Tensor, Tensor]]):
    """A cache of each layer's keys and values; new ones are appended to copies, not written into these."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def keeps_the_whole_past(cache) -> bool:
    """Whether every layer of a cache keeps keys and values of all tokens: no window, no state."""
    from transformers.cache_utils import DynamicLayer

    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


def keys_and_values(cache, depth: int, rows: int, tokens: int) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values `[rows, heads, tokens, size]` of all layers; None if a layer keeps something else."""
    layers = getattr(cache, "layers", [])
    kept = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    plain = len(layers) == depth and all(
        isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.shape[::2] == (rows, tokens)
        for pair in kept
        for tensor in pair
    )
    return kept if plain else None


@dataclass(frozen=True)
class PrefixCache:
    """Attention's keys and values of each row's first tokens, whose last one is in the last column.

    Attributes:
        mask: `[rows, P]`, 1 where there is a token.
        cached: by layer, keys and values `[rows, heads, P, size]`, 0 where there is no token.
    """

    mask: Tensor
    cached: list[tuple[Tensor, Tensor]]

    def select(self, rows: Tensor) -> PrefixCache:
        """The same for some of the rows."""
        return PrefixCache(
            self.mask[rows],
            [(keys[rows.to(keys.device)], values[rows.to(keys.device)]) for keys, values in self.cached],
        )

    def above(self, layer: int) -> PrefixCache:
        """The keys and values from `layer` up; of those below no more than their length, for the mask."""
        length = self.mask.new_zeros(()).expand(len(self.mask), 1, self.mask.shape[1], 1)
        return PrefixCache(self.mask, [(length, length)] * layer + self.cached[layer:])


def inputs_after(model: nn.Module, prefix: PrefixCache | None, ids: Tensor, mask: Tensor) -> dict:
    """The inputs of a pass over tokens `[rows, longest]`, padded on the right, that follow a prefix."""
    before = mask[:, :0] if prefix is None else prefix.mask
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.cat([before, mask], 1),
        **cache_inputs(model, filled_cache([] if prefix is None else prefix.cached)),
    }
    if takes(model, "position_ids"):
        # Padding takes the last token's position: beyond it there may be none.
        inputs["position_ids"] = before.sum(1, keepdim=True) + (mask.cumsum(1) - 1).clamp(min=0)
    return inputs


def read_prefixes(model: nn.Module, rows: Sequence[list[int]], period: int) -> PrefixCache | None:
    """The keys and values of some rows of tokens; None where all rows are empty.

    Every `period`-th row may begin alike: what these share is read once.

    Raises:
        EngramError: the model keeps something else than keys and values of every token.
    """
    shared = [common_beginning(rows[place::period]) for place in range(period)]
    prefix = None
    if any(shared):
        prefix = _read(model, shared)
        prefix = prefix.select(torch.arange(len(rows), device=prefix.mask.device) % period)
    rest = [row[len(shared[number % period]) :] for number, row in enumerate(rows)]
    return _read(model, rest, prefix) if any(rest) else prefix


@torch.no_grad()
def read_once(model: nn.Module, tokens: Sequence[int], rows: int):
    """A cache in which so many rows have read these tokens."""
    cache = empty_cache(model.config)
    ids = torch.tensor([list(tokens)], device=input_device(model))
    _run_to_the_head(model, input_ids=ids, **cache_inputs(model, cache))
    cache.batch_repeat_interleave(rows)
    return cache


def common_beginning(rows: Sequence[list[int]]) -> list[int]:
    """The longest common beginning."""
    first = rows[0]
    for length, tokens in enumerate(zip(*rows, strict=False)):
        if len(set(tokens)) > 1:
            return first[:length]
    return first[: min(map(len, rows))]


@torch.no_grad()
def _read(model: nn.Module, rows: Sequence[list[int]], before: PrefixCache | None = None) -> PrefixCache:
    """Read some tokens after those that stand before them."""
    ids, mask = pad_rows(rows, input_device(model))
    inputs = inputs_after(model, before, ids, mask)
    _run_to_the_head(model, **inputs)
    mask = inputs["attention_mask"]
    depth = len(decoder_layers(model)[1])
    cached = keys_and_values(inputs[_argument(model)], depth, len(rows), mask.shape[1])
    if cached is None:
        raise EngramError("model: expected one that keeps keys and values of every token, got another")
    # Stable: tokens keep their order behind the columns that have none.
    order = mask.argsort(dim=1, stable=True)[:, mask.shape[1] - int(mask.sum(1).max()) :]
    mask = mask.gather(1, order)

    def aligned(tensor: Tensor) -> Tensor:
        index, inside = (part.to(tensor.device)[:, None, :, None] for part in (order, mask))
        gathered = tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))
        return gathered.masked_fill(inside == 0, 0.0)

    return PrefixCache(mask, [(aligned(keys), aligned(values)) for keys, values in cached])


def _run_to_the_head(model: nn.Module, **inputs) -> None:
    """A pass for what it leaves in the cache: no prediction is made."""
    head = model.get_output_embeddings()

    def stop(*_arguments):
        raise Stop

    with capture(before={head: stop} if isinstance(head, nn.Module) else {}):
        run_until(model, **inputs)
