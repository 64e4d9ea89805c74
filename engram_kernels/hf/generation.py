"""Text generation: every step reads one token a row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from .cache import (
    cache_inputs,
    common_beginning,
    empty_cache,
    keeps_the_whole_past,
    output_cache,
    read_once,
)
from .placement import input_device


@torch.no_grad()
def sample(
    model: nn.Module,
    rows: Sequence[list[int]],
    counts: Sequence[int],
    choose: Callable[[list[int], Tensor], Sequence[int]],
) -> list[list[int]]:
    """Continue rows of tokens, each by its own number of tokens.

    The rows go in step from their first tokens, so that none needs padding: a row reads its own tokens while
    it has some, and then those that are chosen for it.

    Args:
        model: a causal language model.
        rows: the tokens of each text; none is empty.
        counts: how many to write after each.
        choose: `choose(numbers, logits)` gives the next token of the rows of these numbers; `logits`
            `[rows, vocabulary]`, float32, on the model's device.

    Returns:
        The rows with what was written.
    """
    device = input_device(model)
    rows = [list(row) for row in rows]
    ends = [len(row) + count for row, count in zip(rows, counts, strict=True)]
    done, cache = 0, None
    while any(len(row) < end for row, end in zip(rows, ends, strict=True)):
        upto = done + 1 if done else min(map(len, rows))
        # A row that has ended reads anything: the batch keeps its shape, and no row sees another.
        ids = torch.tensor([(row[done:upto] or [0]) for row in rows], device=device)
        output = model(input_ids=ids, **cache_inputs(model, cache))
        cache, done = output_cache(output), upto
        numbers = [i for i, row in enumerate(rows) if len(row) == done < ends[i]]
        if numbers:
            logits = output.logits[torch.tensor(numbers, device=output.logits.device), -1].float()
            for number, token in zip(numbers, choose(numbers, logits), strict=True):
                rows[number].append(int(token))
    return rows


@torch.no_grad()
def greedy(
    model: nn.Module, rows: Sequence[list[int]], count: int, ends: Callable[[list[int]], bool] | None = None
) -> list[list[int]]:
    """Continue rows of tokens by the likeliest ones, all at once, by the model's own `generate`.

    What all rows begin with, such as a system's message, is read once where attention has no window. What a
    model's generation settings ask for besides (a penalty for repetition, sampling) is left out.

    Args:
        model: a causal language model of transformers.
        rows: the tokens of each text; none is empty.
        count: how many to write after each, at most.
        ends: whether what was written after a row is all that is wanted; it is asked after each token.

    Returns:
        What was written after each row, up to where it ends: with `ends`, a closing token or `count`.
    """
    if not rows:
        return []
    device, longest = input_device(model), max(map(len, rows))
    shared = []
    if len(rows) > 1 and keeps_the_whole_past(empty_cache(model.config)):
        # Each row keeps a token of its own, whose prediction is wanted.
        shared = common_beginning([row[:-1] for row in rows])
    # Padding stands between what is shared and what is not, where a window would count it.
    padding = [longest - len(row) for row in rows]
    begun, pairs = len(shared), list(zip(rows, padding, strict=True))
    ids = torch.tensor([shared + [0] * pad + row[begun:] for row, pad in pairs], device=device)
    mask = torch.tensor(
        [[1] * begun + [0] * pad + [1] * (len(row) - begun) for row, pad in pairs], device=device
    )
    ended = _Ends(longest, len(rows), closing_tokens(model), ends)
    written = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, pad_token_id=0, stopping_criteria=[ended],
        do_sample=False, num_beams=1, repetition_penalty=1.0, temperature=None, top_p=None, top_k=None,
        **(cache_inputs(model, read_once(model, shared, len(rows))) if shared else {}),
    )  # fmt: skip
    return [row[:length] for row, length in zip(written[:, longest:].tolist(), ended.lengths, strict=True)]


def closing_tokens(model: nn.Module) -> frozenset[int]:
    """The tokens after which a model has said all, by its generation settings."""
    ids = model.generation_config.eos_token_id
    return frozenset([] if ids is None else ids if isinstance(ids, list) else [ids])


class _Ends:
    """A stopping criterion of transformers: a bool a row, and how long each has become until then."""

    def __init__(
        self, start: int, rows: int, closing: Collection[int], ends: Callable[[list[int]], bool] | None
    ):
        self.start, self.closing, self.ends = start, closing, ends
        self.lengths = [0] * rows
        self._writing = [True] * rows

    def __call__(self, ids: Tensor, _scores: object, **_kwargs: object) -> Tensor:
        for row, written in enumerate(ids[:, self.start :].tolist()):
            if self._writing[row]:
                self.lengths[row] = len(written)
                ended = written[-1] in self.closing or (self.ends is not None and self.ends(written))
                self._writing[row] = not ended
        return ~torch.tensor(self._writing, device=ids.device)
