"""Forward passes of the value's optimisation that run only what depends on the value.

`δ` is added to the edited projection's output at the subject's last token. Nothing below that layer, and no
token before that one, depends on it. So the tokens before it are read once, for attention's keys and values,
and those from it on up to the layer, for the hidden states that enter it. Each step then runs the latter
through the layers from the edited one up: stubs in the place of the layers below replay the recorded states,
and a cache holds the recorded keys and values. No model's code is repeated here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...hf.cache import PrefixCache, inputs_after, read_prefixes
from ...hf.forward import logits_at, replaying
from ...hf.hooks import Stop, capture, run_until
from ...hf.layers import decoder_layers
from ...hf.projection import Projection
from ...hf.tokens import pad_rows
from .batching import EditBatch


@dataclass(frozen=True)
class Record:
    """What was recorded in the unedited model.

    Attributes:
        keys: `[rows, in]` float32, the projection's inputs at the subjects' last tokens.
        values: `[rows, out]` float32, its answers.
        context: what later steps start from, where it was asked for.
    """

    keys: Tensor
    values: Tensor
    context: Context | None


@dataclass(frozen=True)
class Context:
    """The states that do not depend on `δ`; every subject's last token is in column 0.

    Attributes:
        ids, mask: `[rows, S]`, the tokens from the subject's last one on; `mask` is 0 where a row has ended.
        prefix: of the tokens before them, in the layers from the edited one up; None where there are none.
        hidden: `[rows, S, width]`, what enters the edited layer; None for the first layer.
        rest: what the first layer returned beside its hidden states; None where it returned them alone.
    """

    ids: Tensor
    mask: Tensor
    prefix: PrefixCache | None
    hidden: Tensor | None
    rest: tuple | None

    def select(self, rows: Tensor) -> Context:
        """The same for some of the rows."""
        return Context(
            self.ids[rows],
            self.mask[rows],
            None if self.prefix is None else self.prefix.select(rows),
            None if self.hidden is None else self.hidden[rows.to(self.hidden.device)],
            self.rest,
        )


@torch.no_grad()
def record(model: nn.Module, projection: Projection, batch: EditBatch, incremental: bool) -> Record:
    """Run the unedited model over all rows up to the projection; `incremental`: with a context.

    Raises:
        EngramError: the model keeps something else than keys and values of every token.
    """
    layers = decoder_layers(model)[1]
    prefix, starts = None, torch.zeros_like(batch.subjects)
    if incremental:
        starts = batch.subjects
        before = [ids[: row.subject] for ids, row in zip(batch.inputs, batch.rows, strict=True)]
        # Where edits have as many rows, these begin with the same sampled texts.
        alike = len({len(one.rows) for one in batch.edits}) == 1
        prefix = read_prefixes(model, before, len(before) // len(batch.edits) if alike else len(before))
    tokens = [ids[start:] for ids, start in zip(batch.inputs, starts.tolist(), strict=True)]
    ids, mask = pad_rows(tokens, batch.subjects.device)
    # Some models (OPT) flatten [rows, longest, width] before their MLP.
    flat = torch.arange(len(ids), device=ids.device) * ids.shape[1] + batch.subjects - starts
    seen: dict = {}

    def see_projection(_module, arguments, output):
        for name, tensor in (("keys", projection.inputs(arguments[0])), ("values", output)):
            states = tensor.reshape(-1, tensor.shape[-1])
            seen[name] = states[flat.to(states.device)].float()
        raise Stop

    def see_layer(_module, arguments, keywords):
        seen["hidden"] = arguments[0] if arguments else keywords["hidden_states"]

    def see_first(_module, _arguments, output):
        seen["rest"] = output[1:] if isinstance(output, tuple) else None

    # The projection may be the first layer itself, of which nothing else is needed then.
    after = {layers[0]: see_first, projection.module: see_projection}
    with capture(before={layers[projection.layer]: see_layer}, after=after):
        plain = {"input_ids": ids, "attention_mask": mask}
        run_until(model, **(inputs_after(model, prefix, ids, mask) if incremental else plain))
    context = None
    if incremental:
        prefix = None if prefix is None else prefix.above(projection.layer)
        hidden = seen["hidden"] if projection.layer > 0 else None
        context = Context(ids, mask, prefix, hidden, seen.get("rest"))
    return Record(seen["keys"], seen["values"], context)


@contextmanager
def adding(projection: Projection, delta: Tensor, flat: Tensor) -> Iterator[None]:
    """Add `delta [rows, out]` to the projection's output at the tokens `flat` of the flattened batch."""

    def add(_module, _arguments, output):
        states = output.reshape(-1, output.shape[-1])
        change = delta.to(states.dtype)
        # Out of place: the backward pass may need the output as it was.
        return states.index_put((flat.to(states.device),), change, accumulate=True).view_as(output)

    with capture(after={projection.module: add}):
        yield


def full_logits(model: nn.Module, projection: Projection, batch: EditBatch, delta: Tensor) -> Tensor:
    """The predictions at the batch's places with `δ [rows, out]`, by a whole pass: `[places, vocabulary]`."""
    ids, mask = pad_rows(batch.inputs, batch.subjects.device)
    flat = torch.arange(len(ids), device=ids.device) * ids.shape[1] + batch.subjects
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with adding(projection, delta, flat):
        return logits_at(model, batch.place_rows, batch.place_positions, **inputs)


def partial_logits(
    model: nn.Module, projection: Projection, batch: EditBatch, context: Context, delta: Tensor
) -> Tensor:
    """The same from the recorded states: layers from the edited one up, tokens from the subject's last on."""
    rows, width = context.ids.shape
    flat = torch.arange(rows, device=context.ids.device) * width
    columns = batch.place_positions - batch.subjects[batch.place_rows]
    below = decoder_layers(model)[1][: projection.layer]
    inputs = inputs_after(model, context.prefix, context.ids, context.mask)
    with replaying(below, context.hidden, context.rest), adding(projection, delta, flat):
        return logits_at(model, batch.place_rows, columns, **inputs)
