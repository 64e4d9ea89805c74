"""Text generation: every step reads one token a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .cache import cache_inputs, output_cache


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
    device = model.get_input_embeddings().weight.device
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
def greedy(model: nn.Module, rows: Sequence[list[int]], count: int) -> list[list[int]]:
    """Continue rows of tokens by the likeliest ones, as the model's own `generate` does it.

    Rows are padded on the left, so that one pass reads them all. What a model's generation settings ask for
    besides (a penalty for repetition, sampling) is left out.

    Args:
        model: a causal language model of transformers.
        rows: the tokens of each text; none is empty.
        count: how many to write after each, at most; a row may end earlier by its end-of-text token.

    Returns:
        What was written after each row.
    """
    device = model.get_input_embeddings().weight.device
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    written = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, pad_token_id=0,
        do_sample=False, num_beams=1, repetition_penalty=1.0, temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    return written[:, longest:].tolist()
