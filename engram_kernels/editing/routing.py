"""The routed expert that a fact is sent to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..hf.eval_mode import eval_mode
from ..hf.experts import routed_experts
from ..hf.hooks import Stop, capture, run_until
from ..hf.placement import input_device
from ..hf.tokens import check_length, encode_row
from .edit import Edit

if TYPE_CHECKING:
    from ..hf.tokens import Tokenizer


def routed_expert(model: nn.Module, tokenizer: Tokenizer, edit: Edit, layer: int) -> int:
    """The expert to which the router gives the largest weight at the subject's last token in the bare prompt.

    Args:
        model: a causal language model of transformers with routed experts.
        tokenizer: its tokenizer.
        edit: the fact that is to be written.
        layer: index of the decoder layer, counted from 0.

    Returns:
        The expert's number, for `open_expert`.

    Raises:
        TypeError, ValueError: there is no such layer.
        EngramError: the layer has no routed experts, or the prompt cannot be used.
    """
    experts = routed_experts(model, layer)
    row = encode_row(tokenizer, edit.subject, edit.prompt, edit.target, space=edit.space)
    check_length(model, row, edit.prompt_text)
    seen = []

    def see(_module, arguments, _keywords):
        seen.extend(arguments[1:])
        raise Stop

    with eval_mode(model), torch.no_grad(), capture(before={experts: see}):
        device = input_device(model)
        run_until(model, input_ids=torch.tensor([row.ids], device=device))
    chosen, shares = (part[row.subject] for part in seen)
    return int(chosen[shares.argmax()])
