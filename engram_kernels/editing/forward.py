"""The forward passes of the value's optimisation: one whole pass, and then the little that depends on δ.

`δ` is added to the edited projection's output at the subject's last token. Nothing below that layer, and
no token left of the subject, depends on it. So one whole pass records the hidden states that enter the layer,
and the attention keys and values of all tokens left of the subject. Every step then runs the tokens from the
subject on through the layers from the edited one up: the layers below are replaced by stubs that replay the
recorded states, and a cache object carries the recorded keys and values. No model's code is repeated here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..models.layers import decoder_layers
from .layout import Layout
from .passes import logits_at, replaying, takes
from .structure import Projection
from .tokens import pad_rows


@dataclass(frozen=True)
class Record:
    """What one whole pass of the unedited model saw.

    Attributes:
        keys: `[rows, in]` float32, the projection's inputs at the subjects' last tokens.
        values: `[rows, out]` float32, its answers.
        logits: `[places, vocabulary]`, what was predicted at the layout's places.
        context: what later steps start from, or None where the model does not give it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    logits: torch.Tensor
    context: Context | None


@dataclass(frozen=True)
class Context:
    """The states that do not depend on `δ`, aligned so that every subject's last token is in column 0.

    Attributes:
        ids, positions, mask: `[rows, S]`, the tokens from the subject on; `mask` is 0 where a row has ended.
        left: `[rows, P]`, 1 where there is a token left of the subject.
        hidden: `[rows, S, width]`, what enters the edited layer; None for the first layer.
        cached: by layer from the edited one up, attention keys and values left of the subject, `[rows, heads,
            P, size]`.
        rest: what the first layer returned beside its hidden states; None where it returned them alone.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    left: torch.Tensor
    hidden: torch.Tensor | None
    cached: list[tuple[torch.Tensor, torch.Tensor]]
    rest: tuple | None

    def select(self, rows: torch.Tensor) -> Context:
        """The same for some of the rows."""
        return Context(
            self.ids[rows],
            self.positions[rows],
            self.mask[rows],
            self.left[rows],
            None if self.hidden is None else self.hidden[rows.to(self.hidden.device)],
            [(keys[rows.to(keys.device)], values[rows.to(keys.device)]) for keys, values in self.cached],
            self.rest,
        )


@torch.no_grad()
def record(model: nn.Module, projection: Projection, layout: Layout, cached: bool) -> Record:
    """Run the whole unedited model once over all rows, padded on the right; `cached`: with a context."""
    _, layers = decoder_layers(model)
    seen: dict = {}
    rows = torch.arange(len(layout.rows), device=layout.subjects.device)

    def see_projection(_module, inputs, output):
        # Some models (OPT) flatten [rows, longest, width] before their MLP.
        flat = rows * layout.lengths.max() + layout.subjects
        for name, tensor in (("keys", inputs[0]), ("values", output)):
            states = tensor.reshape(-1, tensor.shape[-1])
            seen[name] = states[flat.to(states.device)].float()

    def see_layer(_module, inputs, keywords):
        seen["hidden"] = inputs[0] if inputs else keywords["hidden_states"]

    def see_first(_module, _inputs, output):
        seen["rest"] = output[1:] if isinstance(output, tuple) else None

    hooks = [
        projection.module.register_forward_hook(see_projection),
        layers[projection.layer].register_forward_pre_hook(see_layer, with_kwargs=True),
        layers[0].register_forward_hook(see_first),
    ]
    ids, mask = pad_rows([row.inputs for row in layout.rows], layout.subjects.device)
    cache = {"past_key_values": _new_cache(), "use_cache": True} if cached else {"use_cache": False}
    try:
        logits = logits_at(
            model, layout.place_rows, layout.place_positions,
            input_ids=ids, attention_mask=mask, **cache,
        )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    context = None
    if cached:
        context = _context(layout, ids, cache["past_key_values"], projection.layer, len(layers), seen)
    return Record(seen["keys"], seen["values"], logits, context)


def _context(layout: Layout, ids, cache, first: int, count: int, seen: dict) -> Context | None:
    """Align what the whole pass left behind; None where its cache is not one of plain keys and values."""
    cached = keys_and_values(cache, count, len(layout.rows), ids.shape[1], first)
    if cached is None:
        return None
    subjects, lengths = layout.subjects[:, None], layout.lengths[:, None]
    # Column c of the left part is token c − P + subject; column c of the rest is token c + subject.
    left = torch.arange(-int(subjects.max()), 0, device=ids.device) + subjects
    right = torch.arange(int((lengths - subjects).max()), device=ids.device) + subjects
    inside = right < lengths
    right = torch.minimum(right, lengths - 1)

    def gather_left(tensor):
        index = left.clamp(min=0).to(tensor.device)[:, None, :, None]
        gathered = tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))
        return gathered * (left >= 0).to(tensor.device, tensor.dtype)[:, None, :, None]

    hidden = None
    if first > 0:
        hidden = seen["hidden"]
        hidden = hidden.gather(1, right.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))
    return Context(
        ids=ids.gather(1, right),
        positions=right,
        mask=inside.long(),
        left=(left >= 0).long(),
        hidden=hidden,
        cached=[(gather_left(keys), gather_left(values)) for keys, values in cached],
        rest=seen["rest"],
    )


@contextmanager
def adding(projection: Projection, owner: torch.Tensor, flat: torch.Tensor) -> Iterator[dict]:
    """Add `delta[owner]` to the projection's output at the tokens `flat` of the flattened batch.

    Yields a dictionary in which the caller puts `delta` `[edits, out]` before every pass.
    """
    given: dict = {}

    def add(_module, _inputs, output):
        states = output.reshape(-1, output.shape[-1])
        change = given["delta"].to(states.dtype)[owner.to(states.device)]
        # Out of place: the backward pass may need the output as it was.
        return states.index_put((flat.to(states.device),), change, accumulate=True).view_as(output)

    hook = projection.module.register_forward_hook(add)
    try:
        yield given
    finally:
        hook.remove()


def full_logits(model, projection: Projection, layout: Layout, delta: torch.Tensor) -> torch.Tensor:
    """Predictions at the layout's places with `δ`, by a whole pass: `[places, vocabulary]`."""
    rows = torch.arange(len(layout.rows), device=layout.subjects.device)
    with adding(projection, layout.owner, rows * layout.lengths.max() + layout.subjects) as given:
        given["delta"] = delta
        return whole_logits(model, layout)


def whole_logits(model, layout: Layout) -> torch.Tensor:
    """The model's predictions at the layout's places: `[places, vocabulary]`."""
    ids, mask = pad_rows([row.inputs for row in layout.rows], layout.subjects.device)
    return logits_at(
        model, layout.place_rows, layout.place_positions,
        input_ids=ids, attention_mask=mask, use_cache=False,
    )  # fmt: skip


def partial_logits(
    model, projection: Projection, layout: Layout, context: Context, delta: torch.Tensor
) -> torch.Tensor:
    """The same from the recorded states: layers from the edited one up, tokens from the subject on."""
    rows, width = context.ids.shape
    first = torch.arange(rows, device=context.ids.device) * width
    columns = layout.place_positions - layout.subjects[layout.place_rows]
    positions = {"position_ids": context.positions} if takes(model, "position_ids") else {}
    below = decoder_layers(model)[1][: projection.layer]
    with replaying(below, context.hidden, context.rest), adding(projection, layout.owner, first) as given:
        given["delta"] = delta
        return logits_at(
            model, layout.place_rows, columns,
            input_ids=context.ids, attention_mask=torch.cat([context.left, context.mask], 1),
            past_key_values=_new_cache(projection.layer, context), use_cache=True, **positions,
        )  # fmt: skip


def keys_and_values(
    cache, depth: int, rows: int, tokens: int, first: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Keys and values `[rows, heads, tokens, width]` of layers from `first` on, if they keep only these."""
    layers = getattr(cache, "layers", [])
    kept = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers][first:]
    plain = len(layers) == depth and all(
        isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tensor.shape[::2] == (rows, tokens)
        for pair in kept
        for tensor in pair
    )
    return kept if plain else None


def _new_cache(layer: int = 0, context: Context | None = None):
    """An empty cache, or one whose layers add new keys and values to the recorded ones and keep nothing."""
    from transformers import DynamicCache

    cache = DynamicCache()
    if context is not None:
        recorded = _recorded_layer()
        # The stubs ask for nothing, but the model asks its first layer how many tokens went before.
        length = context.left.new_zeros((1, 1, context.left.shape[1], 1))
        cache.layers = [recorded(length, length) for _ in range(layer)]
        cache.layers += [recorded(keys, values) for keys, values in context.cached]
    return cache


@functools.cache
def _recorded_layer() -> type:
    """A cache layer's class; transformers is imported when it is asked for."""
    from transformers.cache_utils import DynamicLayer

    class Recorded(DynamicLayer):
        def __init__(self, keys, values):
            super().__init__()
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

        def update(self, key_states, value_states, *_arguments, **_keywords):
            return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)

    return Recorded
