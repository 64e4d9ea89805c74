"""Texts as tokens that a model goes on from, and as batches."""

import torch


def open_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a text that goes on: without the special token that some tokenizers close a text by."""
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, return_special_tokens_mask=True)
        ids, special = list(encoding["input_ids"]), encoding["special_tokens_mask"]
        # Of an empty text, what begins it stays.
        while len(ids) > 1 and special[len(ids) - 1]:
            ids.pop()
        return ids
    # A slow one's own word on which tokens it added is not to be relied on.
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    closed = list(tokenizer(text)["input_ids"])
    if not plain:
        return closed[:1]
    leading = next((i for i in range(len(closed)) if closed[i : i + len(plain)] == plain), 0)
    return closed[:leading] + plain


def pad_rows(rows: list[list[int]], device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both `[rows, longest]`, padded on the right.

    Causal attention never looks to the right, and other attention goes by the mask: padding there needs no
    pad token and no position ids.
    """
    longest = max(map(len, rows))
    ids = [row + [0] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return tuple(torch.tensor(part, dtype=torch.int64, device=device) for part in (ids, mask))
