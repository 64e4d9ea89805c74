"""The forward passes of the value's optimisation: what does not depend on δ once, then the little that does.

`δ` is added to the edited projection's output at the subject's last token. Nothing below that layer, and
no token left of the subject, depends on it. So the tokens left of the subject are read once, for attention's
keys and values, and those from the subject on up to the layer, for the hidden states that enter it. Each step
then runs the latter through the layers from the edited one up: the layers below are replaced by stubs that
replay the recorded states, and a cache object carries the recorded keys and values. No model's code is
repeated here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..hf.cache import PrefixCache, inputs_after, read_prefixes
from ..hf.forward import logits_at, replaying
from ..hf.hooks import Stop, run_until
from ..hf.layers import decoder_layers
from ..hf.projection import Projection
from ..hf.tokens import pad_rows
from .layout import Layout


@dataclass(frozen=True)
class Record:
    """What the unedited model saw.

    Attributes:
        keys: `[rows, in]` float32, the projection's inputs at the subjects' last tokens.
        values: `[rows, out]` float32, its answers.
        context: what later steps start from, where it was asked for.
    """

    keys: torch.Tensor
    values: torch.Tensor
    context: Context | None


@dataclass(frozen=True)
class Context:
    """The states that do not depend on `δ`; every subject's last token is in column 0.

    Attributes:
        ids, mask: `[rows, S]`, the tokens from the subject on; `mask` is 0 where a row has ended.
        left: of the tokens before them, by the layers from the edited one up; None where there are none.
        hidden: `[rows, S, width]`, what enters the edited layer; None for the first layer.
        rest: what the first layer returned beside its hidden states; None where it returned them alone.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    left: PrefixCache | None
    hidden: torch.Tensor | None
    rest: tuple | None

    def select(self, rows: torch.Tensor) -> Context:
        """The same for some of the rows."""
        return Context(
            self.ids[rows],
            self.mask[rows],
            None if self.left is None else self.left.select(rows),
            None if self.hidden is None else self.hidden[rows.to(self.hidden.device)],
            self.rest,
        )


def _left_of_subjects(model: nn.Module, layout: Layout) -> PrefixCache | None:
    """What stands left of the subjects' last tokens; the texts of all edits begin with the same prefixes."""
    rows = [row.inputs[: row.subject] for row in layout.rows]
    return read_prefixes(model, rows, period=len(rows) // len(layout.texts))


@torch.no_grad()
def record(model: nn.Module, projection: Projection, layout: Layout, incremental: bool) -> Record:
    """Run the unedited model over all rows up to the projection; `incremental`: with a context.

    Raises:
        EngramError: the model keeps something else than keys and values of every token.
    """
    _, layers = decoder_layers(model)
    left = _left_of_subjects(model, layout) if incremental else None
    starts = layout.subjects if incremental else torch.zeros_like(layout.subjects)
    tokens = [row.inputs[start:] for row, start in zip(layout.rows, starts.tolist(), strict=True)]
    ids, mask = pad_rows(tokens, layout.subjects.device)
    # Some models (OPT) flatten [rows, longest, width] before their MLP.
    flat = torch.arange(len(ids), device=ids.device) * ids.shape[1] + layout.subjects - starts
    seen: dict = {}

    def see_projection(_module, inputs, output):
        for name, tensor in (("keys", inputs[0]), ("values", output)):
            states = tensor.reshape(-1, tensor.shape[-1])
            seen[name] = states[flat.to(states.device)].float()
        raise Stop

    def see_layer(_module, inputs, keywords):
        seen["hidden"] = inputs[0] if inputs else keywords["hidden_states"]

    def see_first(_module, _inputs, output):
        seen["rest"] = output[1:] if isinstance(output, tuple) else None

    hooks = [
        projection.module.register_forward_hook(see_projection),
        layers[projection.layer].register_forward_pre_hook(see_layer, with_kwargs=True),
        layers[0].register_forward_hook(see_first),
    ]
    plain = {"input_ids": ids, "attention_mask": mask}
    try:
        run_until(model, **(inputs_after(model, left, ids, mask) if incremental else plain))
    finally:
        for hook in hooks:
            hook.remove()
    context = None
    if incremental:
        context = Context(
            ids=ids,
            mask=mask,
            left=None if left is None else left.above(projection.layer),
            hidden=seen["hidden"] if projection.layer > 0 else None,
            rest=seen.get("rest"),
        )
    return Record(seen["keys"], seen["values"], context)


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
    below = decoder_layers(model)[1][: projection.layer]
    with replaying(below, context.hidden, context.rest), adding(projection, layout.owner, first) as given:
        given["delta"] = delta
        inputs = inputs_after(model, context.left, context.ids, context.mask)
        return logits_at(model, layout.place_rows, columns, **inputs)
