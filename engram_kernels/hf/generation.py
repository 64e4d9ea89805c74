"""Text generation: every step reads one token a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .cache import cache_inputs, output_cache
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
