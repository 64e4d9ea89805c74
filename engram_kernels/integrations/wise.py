"""What EasyEdit's WISE needs beside the edit: an unrelated text, and one text at a time."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import EngramError
from ..hf.cache import generation_cache


def unrelated_text(tokenizer, texts: Sequence[str], prompt: str, subject: str, tokens: int) -> str:
    """The first tokens of a text that does not name the subject; the prompt chooses which, always the same.

    Raises:
        EngramError: all texts name the subject.
    """
    others = [text for text in texts if subject.casefold() not in text.casefold()]
    if not others:
        raise EngramError(f"corpus: expected a text that does not name {subject!r}, got none")
    text = others[zlib.crc32(prompt.encode()) % len(others)].strip()
    ids = tokenizer(text[: 16 * tokens], add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids[:tokens])


class TextByText(nn.Module):
    """A module that decides by all that it reads at once, given text by text, whole and without padding.

    WISE chooses one of two matrices by the mean over all tokens of all texts of a pass, which for EasyEdit is
    one text, read from its first token on whenever a token is written. So a text that is gone on with from a
    cache is given with what stands before; what the layers above have in the cache stays.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self._mask: Tensor | None = None
        self._cached = 0
        self._read = torch.empty(0)

    def before(self, _model: nn.Module, _arguments: tuple, inputs: Mapping) -> None:
        """The model's forward pre-hook: what of the pass is padding, and how much of it is in the cache."""
        cache = generation_cache(inputs)
        self._mask = inputs.get("attention_mask")
        self._cached = 0 if cache is None else cache.get_seq_length()

    def forward(self, states: Tensor) -> Tensor:
        new = states.shape[1]
        if self._cached:
            states = torch.cat([self._read.expand(len(states), -1, -1), states], 1)
        self._read = states
        mask = states.new_ones(states.shape[:2]) if self._mask is None else self._mask
        found = []
        for text, inside in zip(states, mask.bool(), strict=True):
            answer = self.module(text[inside][None])[0]
            found.append(answer.new_zeros(len(text), answer.shape[-1]).index_put((inside,), answer))
        return torch.stack(found)[:, -new:]
