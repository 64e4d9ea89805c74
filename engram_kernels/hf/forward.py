"""Forward passes of a model that do only what is asked of them: some logits, some layers, replayed states."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .hooks import capture
from .placement import input_device
from .tokens import Row, pad_rows


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward has an argument of that name; PEFT's wrapper hands it on to its base."""
    module = module.get_base_model() if hasattr(module, "get_base_model") else module
    return argument in _arguments(type(module))


@functools.cache
def _arguments(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def logits_at(model: nn.Module, rows: Tensor, columns: Tensor, **inputs) -> Tensor:
    """The predictions at some places `[places, vocabulary]`: the head sees these tokens and no others.

    Args:
        model: a causal language model.
        rows, columns: `[places]`, of the batch.
        inputs: of the model, `input_ids` among them.
    """
    head = model.get_output_embeddings()
    picked: list[bool] = []

    def pick(_module, arguments, keywords):
        states = arguments[0]
        if states.shape[:2] != inputs["input_ids"].shape:
            return None
        picked.append(True)
        return (states[rows.to(states.device), columns.to(states.device)][None],), keywords

    with capture(before={head: pick} if isinstance(head, nn.Module) else {}):
        logits = model(**inputs).logits
    if picked:
        # A view: the backward pass of an index would fill a second tensor of this size.
        return logits.flatten(0, 1).to(rows.device)
    return logits.to(rows.device)[rows, columns]


@torch.no_grad()
def target_predictions(
    model: nn.Module, rows: Sequence[Row], after: bool = False
) -> list[tuple[Tensor, list[int]]]:
    """A model's predictions at the targets of some texts, in one pass.

    Args:
        model: a causal language model.
        rows: the texts.
        after: also predict the token that follows each target.

    Returns:
        For each row the log-probabilities of its target's tokens, float64 on the CPU, and the likeliest
        tokens in their places, and after them.
    """
    device = input_device(model)
    ids, mask = pad_rows([row.ids if after else row.inputs for row in rows], device)
    # A token is predicted one position earlier.
    places = [(i, at - 1) for i, row in enumerate(rows) for at in range(row.target, len(row.ids) + after)]
    which, at = (torch.tensor(part, device=device) for part in zip(*places, strict=True))
    logits = logits_at(model, which, at, input_ids=ids, attention_mask=mask, use_cache=False)
    predicted = logits.float().log_softmax(-1)
    # What follows a target has no label; any will do.
    labels = [token for row in rows for token in [*row.ids[row.target :], *[0] * after]]
    chosen = predicted.gather(-1, torch.tensor(labels, device=device)[:, None])[:, 0].cpu().double()
    sizes = [len(row.ids) - row.target + after for row in rows]
    likeliest = predicted.argmax(-1).cpu().split(sizes)
    return [
        (mine[: len(mine) - after], top.tolist())
        for mine, top in zip(chosen.split(sizes), likeliest, strict=True)
    ]


@contextmanager
def replaying(layers: Iterable[nn.Module], states: Tensor | None, rest: tuple | None) -> Iterator[None]:
    """Some layers replaced by stubs that return these states, in a tuple with `rest` where there is one."""
    stubbed = list(layers)
    own = [layer.__dict__.get("forward") for layer in stubbed]

    def replay(*_arguments, **_keywords):
        return states if rest is None else (states, *rest)

    try:
        for layer in stubbed:
            layer.forward = replay
        yield
    finally:
        for layer, forward in zip(stubbed, own, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward
