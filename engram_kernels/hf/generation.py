"""Text generation: every step reads one token a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .cache import PrefixCache, cache_inputs, common_beginning, inputs_after, output_cache, read_prefixes
from .forward import logits_at, takes
from .placement import input_device
from .tokens import pad_rows


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
    device = input_device(model)
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    written = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, pad_token_id=0,
        do_sample=False, num_beams=1, repetition_penalty=1.0, temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    return written[:, longest:].tolist()


@torch.no_grad()
def write_on(
    model: nn.Module,
    rows: Sequence[list[int]],
    tokens: int,
    ends: Callable[[list[int]], bool],
    prefix: PrefixCache | None = None,
) -> list[list[int]]:
    """Continue rows of tokens greedily, all at once, each until it ends.

    Args:
        model: a causal language model.
        rows: the tokens of each text; none is empty.
        tokens: how many at most to write after each.
        ends: whether what was written after a row is all that is wanted.
        prefix: what the model has read before each row; None: nothing, and what all rows begin with, such as
            a system's message, is read once.

    Returns:
        What was written after each row.
    """
    if prefix is None and len(rows) > 1:
        # Each row keeps a token of its own, whose prediction is wanted.
        shared = common_beginning([row[:-1] for row in rows])
        prefix = read_prefixes(model, [shared] * len(rows), 1)
        rows = [row[len(shared) :] for row in rows]
    ids, mask = pad_rows(rows, input_device(model))
    inputs = inputs_after(model, prefix, ids, mask)
    numbers, places = torch.arange(len(rows), device=ids.device), mask.sum(-1) - 1
    written: list[list[int]] = [[] for _ in rows]
    writing = set(range(len(rows)))
    while True:
        chosen = logits_at(model, numbers, places, **inputs).argmax(-1).to(ids.device)
        for row, token in enumerate(chosen.tolist()):
            if row in writing:
                written[row].append(token)
                if len(written[row]) == tokens or ends(written[row]):
                    writing.remove(row)
        if not writing:
            return written
        # The cache was filled in place; a row that has ended reads on, and no other sees it.
        seen = inputs["attention_mask"]
        inputs |= {
            "input_ids": chosen[:, None],
            "attention_mask": torch.cat([seen, seen.new_ones(len(seen), 1)], 1),
        }
        if takes(model, "position_ids"):
            inputs["position_ids"] = seen.sum(-1, keepdim=True)
        places = torch.zeros_like(places)
