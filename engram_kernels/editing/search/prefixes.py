"""Text before a prompt, sampled from the model, so that an edit holds wherever its subject stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...errors import EngramError
from ...hf.generation import sample
from ...hf.tokens import context_length, open_ids

# Common first words; after a beginning-of-text token alone a chat model opens a dialogue.
FIRST_WORDS = ("The", "Therefore", "Because", "I", "You")
TOP_K = 5


def sample_prefixes(model, tokenizer, lengths: Sequence[tuple[int, int]], seed: int) -> list[str]:
    """Sample text from the model's five likeliest next tokens, without touching the global random state.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        lengths: pairs `(tokens, how many)`: `((5, 10), (10, 10))` is ten texts of five tokens and ten of ten.
        seed: of the sampling.

    Returns:
        As many texts as asked for, on one line each, in the order of `lengths`.

    Raises:
        EngramError: a text would be longer than the model's context.
    """
    wanted = [tokens for tokens, count in lengths for _ in range(count)]
    if not wanted:
        return []
    limit = context_length(model)
    if limit is not None and max(wanted) > limit:
        raise EngramError(
            f"contexts: expected at most {limit} tokens, the model's context, got {max(wanted)}"
        )
    rows = [open_ids(tokenizer, FIRST_WORDS[i % len(FIRST_WORDS)]) for i in range(len(wanted))]
    counts = [max(0, tokens - len(row)) for tokens, row in zip(wanted, rows, strict=True)]
    draws = _draws(counts, seed)

    def choose(numbers: list[int], logits: torch.Tensor) -> list[int]:
        top = logits.cpu().topk(min(TOP_K, logits.shape[-1]))
        noise = torch.stack([next(draws[i]) for i in numbers])[:, : top.values.shape[1]]
        choice = (top.values.softmax(-1) / noise).argmax(-1, keepdim=True)
        return top.indices.gather(-1, choice).flatten().tolist()

    rows = sample(model, rows, counts, choose)
    return [" ".join(tokenizer.decode(row, skip_special_tokens=True).split()) for row in rows]


def _draws(counts: list[int], seed: int) -> list[Iterator[torch.Tensor]]:
    """Exponential noise `[TOP_K]` of each row's tokens: the greatest probability over noise is drawn."""
    generator = torch.Generator().manual_seed(seed)
    draws: list[list[torch.Tensor]] = [[] for _ in counts]
    for step in range(max(counts)):
        growing = [i for i, count in enumerate(counts) if step < count]
        noise = torch.empty(len(growing), TOP_K, dtype=torch.float32, device="cpu")
        for i, row in zip(growing, noise.exponential_(generator=generator), strict=True):
            draws[i].append(row)
    return [iter(rows) for rows in draws]
