"""The states of a few tokens in one module: `repr_tools.get_reprs_at_idxs` of the libraries.

Theirs runs the whole model and the vocabulary over all tokens. Nothing above the module is needed: ours stops
there, and batches texts of like length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..hf.hooks import Stop, capture, run_until
from ..hf.tokens import pad_rows
from .patching import Declined

ROWS = 64


@torch.no_grad()
def states_at(
    model, tok, contexts: list[str], idxs: list[list[int]], layer: int, module_template: str, track: str
) -> Tensor | tuple[Tensor, Tensor]:
    """What enters or leaves a module at some tokens of some texts, the mean over the tokens of each.

    Args:
        model: a causal language model.
        tok: its tokenizer.
        contexts: the texts.
        idxs: for each text, positions of tokens.
        layer: put into the template.
        module_template: of the module's name.
        track: `"in"`, `"out"` or `"both"`.

    Returns:
        `[texts, width]` in the model's type; for `"both"` what enters and what leaves.

    Raises:
        Declined: the library's own positions depend on its padding, or the module is of another kind.
    """
    if track not in ("in", "out", "both") or not contexts:
        raise Declined("it is asked for nothing that is known here")
    if model.training:
        raise Declined("the model is in training mode")
    if len(contexts) > 1 and tok.padding_side != "right":
        raise Declined(f"the tokenizer pads on the {tok.padding_side}")
    ids = tok(list(contexts))["input_ids"]
    lowest = 0 if len(ids) > 1 else -len(ids[0])
    if not all(lowest <= i < len(row) for row, places in zip(ids, idxs, strict=True) for i in places):
        raise Declined("a position is counted from the end of a padded text, or lies past its own text")
    name = module_template.format(layer)
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise Declined(str(error)) from error
    seen: dict[str, Tensor] = {}

    def enters(_module, arguments, keywords):
        seen["in"] = arguments[0] if arguments else keywords.get("hidden_states")
        if track == "in":
            raise Stop

    def leaves(_module, _arguments, output):
        seen["out"] = output[0] if isinstance(output, tuple) else output
        raise Stop

    wanted = ("in", "out") if track == "both" else (track,)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: dict[str, list[Tensor]] = {kind: [] for kind in wanted}
    device = next(model.parameters()).device
    with capture(before={module: enters}, after={module: leaves}):
        for start in range(0, len(order), ROWS):
            batch = order[start : start + ROWS]
            tokens, mask = pad_rows([ids[i] for i in batch], device)
            run_until(model, input_ids=tokens, attention_mask=mask)
            for kind in wanted:
                states = seen.get(kind)
                if states is None or states.shape[:2] != tokens.shape:
                    raise Declined(f"{name} has no states [texts, tokens, width]")
                found[kind] += [states[row, idxs[i]].mean(0) for row, i in enumerate(batch)]
    # Back into the order of the texts.
    places = torch.tensor(order, device=device).argsort()
    stacked = [torch.stack(found[kind])[places] for kind in wanted]
    return stacked[0] if len(stacked) == 1 else (stacked[0], stacked[1])
