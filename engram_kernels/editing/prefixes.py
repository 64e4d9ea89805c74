"""Text before a prompt, sampled from the model, so that an edit holds wherever its subject stands."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import EngramError
from ..hf.tokens import context_length, open_ids, pad_rows

# Common first words; after a beginning-of-text token alone a chat model opens a dialogue.
FIRST_WORDS = ("The", "Therefore", "Because", "I", "You")
TOP_K = 5


@torch.no_grad()
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
    generator = torch.Generator().manual_seed(seed)
    device = model.get_input_embeddings().weight.device
    while True:
        growing = [i for i, row in enumerate(rows) if len(row) < wanted[i]]
        if not growing:
            break
        ids, mask = pad_rows([rows[i] for i in growing], device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        last = torch.tensor([len(rows[i]) - 1 for i in growing], device=logits.device)
        top = (
            logits[torch.arange(len(growing), device=logits.device), last]
            .float()
            .cpu()
            .topk(min(TOP_K, logits.shape[-1]))
        )
        choice = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
        for i, token in zip(growing, top.indices.gather(-1, choice).flatten().tolist(), strict=True):
            rows[i].append(token)
    return [" ".join(tokenizer.decode(row, skip_special_tokens=True).split()) for row in rows]
